"""Specs that a user of the page types: what they name is below the root, and runs no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sdopt import registry, spec
from sdopt.errors import PathError, UsageError
from sdopt.pipeline import Pipeline
from sdopt.ui import names
from sdopt.ui.workspace import Workspace

_FILES = ("cache", "data", "file")
"""Options of passes and targets that name a file or a folder."""
RUN = {"graphsurgeon": "function", "tpu": "python"}
"""What runs a user's own code, and the option that names it."""


def passes(workspace: Workspace, text: str) -> str:
    """A spec of passes with each file in it as a path relative to the root.

    Raises:
        PathError: it names a file outside the root, or one that is not there.
        UsageError: a pass that runs a user's own code.
        SpecError, UnknownNameError: it is no spec.
    """
    if text.strip().endswith((".recipe", ".txt")):
        raise UsageError(
            "a recipe file is not read here", hint="write what stands in it, between commas"
        )
    items = []
    for item in spec.parse(text):
        if not item.name.startswith("@"):
            one = spec.bind(registry.resolve("passes", item.name), item)
            item = _checked(workspace, one, item)
        items.append(item)
    made = spec.render(items)
    Pipeline.parse(made)  # presets, and the order
    return made


def target(workspace: Workspace, text: str) -> str:
    """A target's spec, likewise."""
    one = registry.make("targets", text)
    return str(_checked(workspace, one, spec.parse(text)[0]))


def adapter(workspace: Workspace, name: str, scale: float = 1.0) -> str:
    """``FILE:scale`` for ``lora``, of a file below the root.

    Raises:
        PathError: see ``Workspace.resolve``.
    """
    return f"{workspace.relative(workspace.resolve(name))}:{scale:g}"


def _checked(workspace: Workspace, one: Any, item: spec.Item) -> spec.Item:
    """The item that makes the same as ``item``, of which ``one`` was made, with plain paths."""
    runs = RUN.get(item.name)
    if runs is not None and getattr(one, runs):
        raise UsageError(
            f"{item.name} with {runs} runs code, and the page does not",
            hint="do it with the command line, in the same folder",
        )
    changes = {}
    for field, value in _texts(one):
        if field in _FILES:
            changes[field] = workspace.relative(workspace.resolve(value))
        elif names.is_path(value):
            raise PathError(
                f"{field} of {item.name} takes no path here",
                where=names.shown(value),
                hint="do it with the command line, in the same folder",
            )
    return spec.unbind(dataclasses.replace(one, **changes), item.name) if changes else item


def _texts(one: Any) -> Iterator[tuple[str, str]]:
    """Every text among a pass's or target's options, with the option's name."""
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        yield from ((field.name, part) for part in parts if isinstance(part, str) and part)
