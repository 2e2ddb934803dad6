"""A recipe as toggles: which passes its text names, with which options, and the text back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sdopt import pages, registry, spec
from sdopt.passes.base import Pass
from sdopt.pipeline import Pipeline
from sdopt.spec import Item
from sdopt.ui import specs

REFUSED = tuple(name for name in specs.RUN if name in registry.PASSES)
"""Passes that run code which a text names: not for whoever can open a page."""

DEFAULT = "@fast"


@dataclasses.dataclass(frozen=True)
class Toggle:
    """One pass as the page offers it."""

    name: str
    summary: str
    numerics: str
    options: tuple[pages.Option, ...]


def toggles() -> list[Toggle]:
    """Every pass that is known here, plug-ins too, in the order of the registry."""
    found = []
    for name in registry.table("passes"):
        if name not in REFUSED:
            page = pages.page(registry.resolve("passes", name), ())
            found.append(Toggle(name, page.summary, page.numerics, page.options))
    return found


def expanded(text: str) -> str:
    """The text with its presets written out.

    Raises:
        SdoptError: it cannot be read.
    """
    items: list[Item] = []
    for item in spec.parse(text):
        preset = item.name.startswith("@")
        items += spec.parse(str(Pipeline.parse(str(item)))) if preset else [item]
    return spec.render(items)


def names(text: str) -> list[str]:
    """The passes that a text names, each once.

    Raises:
        SpecError: it cannot be read.
    """
    return list(dict.fromkeys(item.name for item in spec.parse(text)))


def toggled(text: str, chosen: Sequence[str]) -> str:
    """The text with exactly the chosen passes: what stays keeps its place and options.

    A new one comes last, or in front of the first pass that must come after it.
    """
    items = [item for item in spec.parse(text) if item.name in chosen]
    for name in chosen:
        if all(item.name != name for item in items):
            behind = (i for i, one in enumerate(items) if name in _after(one.name))
            items.insert(next(behind, len(items)), Item(name))
    return spec.render(items)


def _after(name: str) -> tuple[str, ...]:
    cls: type[Pass] = registry.resolve("passes", name)
    return cls.after


def values(text: str, toggle: Toggle) -> dict[str, str]:
    """What a text gives the options of a pass, as text; what it leaves out is not there."""
    found: dict[str, str] = {}
    for item in spec.parse(text):
        if item.name == toggle.name:
            given = dict(item.options)
            if item.value is not None and toggle.options:
                given[toggle.options[0].name] = item.value
            found = {name: "+".join(parts) for name, parts in given.items()}
    return found


def with_option(text: str, toggle: Toggle, option: str, value: str) -> str:
    """The text with an option of a pass set, or at its default where ``value`` is empty."""
    first = toggle.options[0]
    items = []
    for item in spec.parse(text):
        if item.name == toggle.name:
            given = dict(item.options)
            if item.value is not None:
                given[first.name] = item.value
            given.pop(option, None)
            if value.strip():
                given[option] = tuple(part.strip() for part in value.split("+") if part.strip())
            head = given.pop(first.name, None) if not first.default else None
            order = [one.name for one in toggle.options]
            options = sorted(given.items(), key=lambda pair: order.index(pair[0]))
            item = Item(item.name, head, tuple(options))
        items.append(item)
    return spec.render(items)
