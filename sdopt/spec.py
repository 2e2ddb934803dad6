"""The spec grammar: ``fuse_qkv,tome=5:ratio=0.5,cast_fp16:keep=io+vae,@fast`` to items and back.

Comma between items, colon between options, plus between the parts of a list; ``=`` after an
item's name sets its first option. A part that holds one of ``, : + =`` or a quote is quoted.
No braces or brackets, since shells expand those.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdopt.errors import SpecError

T = TypeVar("T")
Parts = tuple[str, ...]

_TOKEN = re.compile(r"""(?P<quoted>"[^"]*"|'[^']*')|(?P<mark>[,:+=])|(?P<word>[^,:+="']+)""")
_PLAIN = re.compile(r"""[^,:+="'\s]+""")


@dataclass(frozen=True)
class Item:
    """One named step with its options; ``value`` is what stood after ``name=``."""

    name: str
    value: Parts | None = None
    options: tuple[tuple[str, Parts], ...] = ()
    span: tuple[int, int] = field(default=(0, 0), compare=False)
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        head = self.name if self.value is None else f"{self.name}={_join(self.value)}"
        return ":".join([head, *(f"{key}={_join(parts)}" for key, parts in self.options)])

    def error(self, message: str, *, hint: str | None = None) -> SpecError:
        """An error that points at this item in the text it was parsed from."""
        return pointed(message, self.text or str(self), self.span, hint=hint)


def pointed(
    message: str, text: str, span: tuple[int, int], *, hint: str | None = None
) -> SpecError:
    """A ``SpecError`` whose ``where`` is the text with carets under ``span``."""
    start, end = span
    return SpecError(message, where=f"{text}\n{' ' * start}{'^' * max(1, end - start)}", hint=hint)


def parse(text: str) -> tuple[Item, ...]:
    """Read a spec.

    Raises:
        SpecError: with the text and a caret under what cannot be read.
    """
    items: list[Item] = []
    for start, end in _split(text, 0, len(text), ","):
        if not text[start:end].strip():
            if text.strip():
                raise pointed("an empty item in the spec", text, (start, end), hint="drop a comma")
            continue
        items.append(_item(text, start, end))
    return tuple(items)


def render(items: Iterable[Item]) -> str:
    """The text that parses back to ``items``."""
    return ",".join(map(str, items))


def _split(text: str, start: int, end: int, mark: str) -> list[tuple[int, int]]:
    """Spans of ``text[start:end]`` between ``mark``s that stand outside quotes."""
    spans, begin, position = [], start, start
    while position < end:
        token = _TOKEN.match(text, position, end)
        if token is None:
            raise pointed("a quote that is not closed", text, (position, end))
        if token.lastgroup == "mark" and token.group() == mark:
            spans.append((begin, position))
            begin = token.end()
        position = token.end()
    spans.append((begin, end))
    return spans


def _item(text: str, start: int, end: int) -> Item:
    head, *rest = _split(text, start, end, ":")
    name, value = _pair(text, head)
    options: dict[str, Parts] = {}
    for span in rest:
        key, parts = _pair(text, span)
        if parts is None:
            raise pointed("an option without a value", text, span, hint=f"write {key}=VALUE")
        if key in options:
            raise pointed(f"the option {key} is given twice", text, span)
        options[key] = parts
    return Item(name, value, tuple(options.items()), (start, end), text)


def _pair(text: str, span: tuple[int, int]) -> tuple[str, Parts | None]:
    name_span, *values = _split(text, *span, "=")
    name = text[slice(*name_span)].strip()
    if not re.fullmatch(r"@?[A-Za-z_][\w.-]*", name):
        raise pointed(f"{name!r} is not a name", text, name_span if name else span)
    if not values:
        return name, None
    if len(values) > 1:
        raise pointed("two equals signs", text, span, hint='quote the value: name="a=b"')
    return name, tuple(_unquote(text, part) for part in _split(text, *values[0], "+"))


def _unquote(text: str, span: tuple[int, int]) -> str:
    part = text[slice(*span)].strip()
    if len(part) >= 2 and part[0] == part[-1] and part[0] in "\"'":
        return part[1:-1]
    if not part or not _PLAIN.fullmatch(part):
        raise pointed("a value is missing here" if not part else "quote this value", text, span)
    return part


def _join(parts: Parts) -> str:
    return "+".join(part if _PLAIN.fullmatch(part) else _quote(part) for part in parts)


def _quote(part: str) -> str:
    if '"' not in part:
        return f'"{part}"'
    if "'" not in part:
        return f"'{part}'"
    raise SpecError(
        "a value cannot hold both kinds of quote", where=part, hint="use a recipe file or the API"
    )


def read_recipe(path: Path) -> str:
    """The spec in a recipe file: its lines joined, without what stands behind ``#``.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero byte in the path
        raise SpecError(
            "the recipe cannot be read",
            where=str(path)[:200],
            why=str(error)[:200],
            hint="a recipe is a text file that ends in .recipe or .txt",
        ) from error
    parts = (line.split("#", 1)[0].strip().rstrip(",") for line in lines)
    return ",".join(part for part in parts if part)


def snake_case(name: str) -> str:
    """``FuseQkv`` to ``fuse_qkv``; a digit starts no new word (``CastFp16`` to ``cast_fp16``)."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def suggest(name: str, known: Iterable[str]) -> str | None:
    """``did you mean ...?`` for the nearest known names, or the list of all if few."""
    choices = sorted(known)
    if close := difflib.get_close_matches(name, choices, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(choices)}" if choices else None


def bind(cls: type[T], item: Item) -> T:
    """Make the frozen dataclass ``cls`` from an item: the first field takes ``name=value``.

    Fields may be ``int``, ``float``, ``bool``, ``str``, ``tuple[str, ...]``, a ``Literal`` of
    strings, or one of those ``| None``.

    Raises:
        SpecError: an unknown option, a missing value, or one of the wrong kind.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    fields = {f.name: f for f in _options(cls)}
    hints = typing.get_type_hints(cls)
    given = dict(item.options)
    if item.value is not None:
        first = next(iter(fields), None)
        if first is None:
            raise item.error(f"{item.name} takes no value")
        if first in given:
            raise item.error(f"the option {first} is given twice")
        given[first] = item.value
    arguments: dict[str, Any] = {}
    for key, parts in given.items():
        if key not in fields:
            raise item.error(f"{item.name} has no option {key!r}", hint=suggest(key, fields))
        try:
            arguments[key] = _convert(hints[key], parts)
        except ValueError as error:
            raise item.error(f"{item.name}: {key} must be {error}") from None
    missing = [
        name
        for name, f in fields.items()
        if name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise item.error(
            f"{item.name} needs a value", hint=f"write {item.name}={missing[0].upper()}"
        )
    try:
        return cls(**arguments)
    except ValueError as error:
        raise item.error(f"{item.name}: {error}") from None


def unbind(value: Any, name: str) -> Item:
    """The item that ``bind`` makes ``value`` from; only a required first field stands after ``=``.

    Options at their default are left out.
    """
    head: Parts | None = None
    options: list[tuple[str, Parts]] = []
    for index, f in enumerate(_options(value)):
        current = getattr(value, f.name)
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if current is None or (not required and current == f.default):
            continue
        parts = _parts(current)
        if index == 0 and required:
            head = parts
        else:
            options.append((f.name, parts))
    return Item(name, head, tuple(options))


def _options(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields that a spec sets; those by keyword only, which all of a kind have, come last."""
    return sorted((f for f in dataclasses.fields(cls) if f.init), key=lambda f: f.kw_only is True)


def _parts(value: Any) -> Parts:
    if isinstance(value, tuple):
        return tuple(map(str, value))
    return (str(value).lower() if isinstance(value, bool) else str(value),)


_NUMBERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def _convert(hint: Any, parts: Parts) -> Any:
    """``parts`` as the type ``hint``; raises ValueError with what it must be."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert(next(a for a in typing.get_args(hint) if a is not type(None)), parts)
    if origin is tuple:
        return parts
    if len(parts) != 1:
        raise ValueError(f"one value, not {len(parts)}")
    text = parts[0]
    if origin is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError(f"one of {', '.join(typing.get_args(hint))}, not {text!r}")
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"true or false, not {text!r}")
        return text == "true"
    if hint in _NUMBERS:
        convert, what = _NUMBERS[hint]
        try:
            return convert(text)
        except ValueError:
            raise ValueError(f"{what}, not {text!r}") from None
    return text
