"""What someone else wrote, at the border: JSON tables, types of their fields, users' paths."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import UsageError


def table(data: bytes | str) -> dict[str, Any]:
    """JSON that holds a table.

    Raises:
        ValueError: it is none, or none that can be read (no UTF-8, nested too deep, endless
            numbers); says why.
    """
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object but {_said(found)}")  # noqa: TRY004 -- one kind
    return found


def fields(cls: type, data: Any) -> dict[str, Any]:
    """Of a JSON table the fields that the dataclass ``cls`` has, each of the field's type.

    Others are left out: a patch release may add fields without a new schema. Lists stand for
    tuples, as JSON has none.

    Raises:
        TypeError: it is no table, or a field holds something else.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{_said(data)} stands where a table is due")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    found = {key: value for key, value in data.items() if key in names}
    for name, value in found.items():
        if not _is(value, hints[name]):
            raise TypeError(f"{name} is {_said(value)}")
    return found


def user_path(text: str | Path) -> Path:
    """A path as a user wrote it, its ``~`` expanded; whether anything is there is not asked.

    Raises:
        UsageError: no file can be called so.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~nobody, a zero byte
        raise UsageError(
            "this is no path of a file",
            where=_shortened(str(text)),
            why=getattr(error, "strerror", None) or str(error),
            hint="check the path, and quote it where it holds a comma or a colon",
        ) from error
    return path


def _is(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type: plain ones, ``X | None``, tuples, tables."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        return len(each) == len(value) and all(map(_is, value, each))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_is(one, inner[1]) for one in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # What is no plain type of JSON is made of the value later, and checks it there.
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True


def _said(value: Any) -> str:
    return _shortened(repr(value))


def _shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
