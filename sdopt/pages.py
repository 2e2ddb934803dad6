"""The page of a pass: its docstring and its class's data, for a terminal and as Markdown.

A docstring is a summary, then sections that begin with ``Heading:`` at the left margin (``Before /
After``, ``Applies when``, ``Numerics``, ``Options``, and others that a pass needs), with blocks
indented by four for drawings and commands. What else a page holds is read off the class, and off
the targets and presets that use it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdopt import registry
from sdopt.errors import UsageError
from sdopt.passes.base import ANY, Interface, Pass, Role
from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline
from sdopt.tolerance import Intent

_HEADING = re.compile(r"([A-Z][A-Za-z]*(?: [/A-Za-z]+){0,3}):(?: +(.*))?")
_OPTION = re.compile(r" {4}(\w+): *(.*)")
_BLOCK = re.compile(r"(?:^ {4}.*\n?(?:\n(?= {4}))*)+", re.M)
_WIDTH = 98


@dataclass(frozen=True)
class Section:
    """One part of a page; ``lines`` are prose, and blocks indented by four."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One field of a pass; ``default`` is empty where a value must be given."""

    name: str
    takes: str
    default: str
    text: str


@dataclass(frozen=True)
class Page:
    """All that is known of a pass: what its author wrote, and what its class says."""

    name: str
    summary: str
    numerics: str
    sections: tuple[Section, ...]
    options: tuple[Option, ...]
    facts: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]

    def text(self) -> str:
        """The page for a terminal."""
        parts = [self.name, self.summary]
        parts += ["\n".join(_headed(one)) for one in self.sections]
        parts.append("\n".join(["Options:", *map(_as_text, self.options)]))
        if not self.options:
            parts[-1] = "Options: none."
        width = max(len(label) for label, _ in self.facts) + 1
        parts.append("\n".join(f"{label + ':':<{width}} {value}" for label, value in self.facts))
        parts.append("\n".join(["Example:", *(f"    {line}" for line in self.examples)]))
        return "\n\n".join(map(_ticked, parts))

    def markdown(self) -> str:
        """The page as a section of a Markdown file."""
        parts = [f"## {self.name}", _ticked(self.summary)]
        for one in self.sections:
            first, *rest = _headed(one)
            parts.append(_fenced([first.replace(f"{one.title}:", f"**{one.title}**:", 1), *rest]))
        rows = [
            f"| `{one.name}` | {one.takes} | {one.default or 'required'} | {_cell(one.text)} |"
            for one in self.options
        ]
        head = ["| option | takes | default | what it does |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]) if rows else "**Options**: none.")
        parts.append("\n".join(f"- {label}: {_ticked(value)}" for label, value in self.facts))
        parts.append("\n".join(["```text", *self.examples, "```"]))
        return "\n\n".join(parts)


def page(cls: type[Pass], targets: Iterable[str] | None = None) -> Page:
    """The page of a pass; ``targets`` are asked whether they want it, all known by default."""
    sections = {one.title: one for one in _sections(inspect.getdoc(cls) or "")}
    (summary, *intro) = sections.pop("").lines or ("",)
    described = sections.pop("Options", Section("", ())).lines
    examples = sections.pop("Example", Section("", ())).lines
    if intro:
        sections = {"": Section("", _trimmed(intro)), **sections}
    known = registry.table("targets") if targets is None else targets
    return Page(
        name=cls.name(),
        summary=summary,
        numerics=cls.numerics.value,
        sections=tuple(sections.values()),
        options=tuple(_options(cls, described)),
        facts=tuple(_facts(cls, known)),
        examples=tuple(line.strip() for line in examples) or (_example(cls),),
    )


def document() -> str:
    """The pages of every built-in pass, as the Markdown file that lies in docs/."""
    pages = [page(registry.resolve("passes", name), registry.TARGETS) for name in registry.PASSES]
    rows = [
        f"| [`{one.name}`](#{one.name}) | {one.numerics} | {_cell(one.summary)} |" for one in pages
    ]
    presets = [f"- `@{name}` is `{passes}`" for name, passes in PRESETS.items()]
    parts = [
        "# Passes",
        "Written by `make docs` from the passes themselves; `sdopt passes NAME` prints one page.\n"
        "What each word of numerics allows is in [design.md](design.md).",
        "\n".join(["| pass | numerics | what it does |", "| --- | --- | --- |", *rows]),
        "Presets:",
        "\n".join(presets),
        *(one.markdown() for one in pages),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(docstring: str) -> Iterator[Section]:
    """The parts of a docstring; the first one, before any heading, has no title."""
    title, lines = "", list[str]()
    before = ""
    for line in docstring.splitlines():
        heading = _HEADING.fullmatch(line) if not before.strip() else None
        if heading:
            yield Section(title, _trimmed(lines))
            title, lines = heading[1], [heading[2]] if heading[2] else []
        else:
            lines.append(line)
        before = line
    yield Section(title, _trimmed(lines))


def _trimmed(lines: Sequence[str]) -> tuple[str, ...]:
    """Without blank lines at either end."""
    return tuple("\n".join(lines).strip("\n").splitlines())


def _ticked(text: str) -> str:
    """Code marked as in Markdown; docstrings mark it as reStructuredText does."""
    return text.replace("``", "`")


def _cell(text: str) -> str:
    """``text`` in a table, where a bar would end the cell."""
    return _ticked(text).replace("|", r"\|")


def _headed(one: Section) -> Iterator[str]:
    """A section's lines with its heading before them, on the same line where that is prose."""
    first, *rest = one.lines or ("",)
    if one.title and first.startswith(" "):
        yield f"{one.title}:"
        yield first
    else:
        yield f"{one.title}: {first}" if one.title else first
    yield from rest


def _fenced(lines: Iterable[str]) -> str:
    """Prose as it is, and each indented block as a fenced one."""
    text = _ticked("\n".join(lines))
    fenced = _BLOCK.sub(
        lambda found: f"\n```text\n{textwrap.dedent(found[0]).rstrip()}\n```\n\n", text
    )
    return re.sub(r"\n{3,}", "\n\n", fenced).strip()


def _as_text(one: Option) -> str:
    given = f"default {one.default}" if one.default else "required"
    line = f"{one.name} ({one.takes}; {given}): {one.text}"
    return textwrap.fill(line, _WIDTH, initial_indent="    ", subsequent_indent="        ")


def _options(cls: type[Pass], described: Iterable[str]) -> Iterator[Option]:
    """Every field of the class, with what the docstring says of it."""
    texts: dict[str, str] = {}
    name = ""
    for line in described:
        if option := _OPTION.fullmatch(line):
            name, texts[option[1]] = option[1], option[2]
        elif name:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        default = "" if _required(one) else _shown(one.default)
        yield Option(one.name, _takes(hints[one.name]), default, texts.get(one.name, ""))


def _required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _shown(value: object) -> str:
    """A default as one would write it in a spec."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _takes(hint: Any) -> str:
    """What may stand behind an option's equals sign, in words."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _takes(next(one for one in inside if one is not type(None)))
    if origin is typing.Literal:
        return " or ".join(map(str, inside))
    if origin is tuple:
        return "words joined by +"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))


def _facts(cls: type[Pass], targets: Iterable[str]) -> Iterator[tuple[str, str]]:
    if cls.intent is Intent.OTHER:
        yield "Changes", "what the model computes, on purpose"
    yield "For", "every component" if cls.roles == ANY else ", ".join(_roles(cls))
    yield "Comes after", ", ".join(cls.after) or "nothing in particular"
    keeps = cls.interface is Interface.KEEPS
    yield "Interface", "inputs and outputs stay" if keeps else "inputs and outputs may change"
    yield "Applied twice", "refused" if cls.once else "changes nothing the second time"
    yield "Wanted by", ", ".join(_wanted_by(cls.name(), targets)) or "no target by itself"
    presets = [f"@{name}" for name in PRESETS if cls.name() in _names(f"@{name}")]
    yield "In presets", ", ".join(presets) or "none"


def _roles(cls: type[Pass]) -> Iterator[str]:
    for role in Role:
        if role in cls.roles:
            yield "a single ONNX file" if role is Role.MODEL else role.value


def _names(passes: str) -> list[str]:
    return [one.name() for one in Pipeline.parse(passes).passes]


def _wanted_by(name: str, targets: Iterable[str]) -> Iterator[str]:
    """The targets that lower with the pass: a word, or the variants of it that do."""
    for word in targets:
        variants = list(_variants(registry.resolve("targets", word)))
        wanting = [one for one in variants if name in _names(one.wants)]
        yield from [word] if len(wanting) == len(variants) else map(str, wanting)


def _variants(cls: Any) -> Iterator[Any]:
    """A target with its defaults, and with each other word that one of its options takes."""
    yield (default := cls())
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        if typing.get_origin(hints[one.name]) is not typing.Literal:
            continue
        for value in typing.get_args(hints[one.name]):
            if value == getattr(default, one.name):
                continue
            try:
                yield dataclasses.replace(default, **{one.name: value})
            except (UsageError, ValueError):
                continue  # a word that is reserved, or belongs to another option's word


def _example(cls: type[Pass]) -> str:
    """A command that applies the pass; a value that must be given is its option's name."""
    first = next(iter(dataclasses.fields(cls)), None)
    value = f"={first.name.upper()}" if first is not None and _required(first) else ""
    return f"sdopt optimize BUNDLE --passes {cls.name()}{value}"
