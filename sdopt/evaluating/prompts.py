"""Prompts to evaluate with: PartiPrompts' table of tab-separated values, or a prompt a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import spec
from sdopt.errors import UnknownNameError, UsageError

UNSPECIFIED = "Not_specified"
"""The category of a prompt without one; the word that image_info.json has for it elsewhere too."""

_PROMPT, _CATEGORY = "Prompt", "Category"
_HEADER = f"{_PROMPT}, {_CATEGORY}, Challenge, Note"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        index: its place in the whole file from 0, whatever was left out; decides its seeds.
        text: what to draw.
        category: what it is grouped by.
    """

    index: int
    text: str
    category: str = UNSPECIFIED


def read_prompts(
    source: str | Path | Sequence[str],
    *,
    categories: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[Prompt, ...]:
    """The prompts of a ``.tsv`` file as PartiPrompts has them, of a text file, or of a list.

    Args:
        source: the file, or the texts themselves.
        categories: only of these; all by default.
        limit: the first so many of what is left.

    Raises:
        UsageError: the file cannot be read, or a line of it is wrong; names the line.
        UnknownNameError: a category that no prompt has.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit must be 1 or more, not {limit}")
    if isinstance(source, (str, Path)):
        path = Path(source)
        text = _read(path)
        found = list(_table(text, path) if path.suffix.lower() == ".tsv" else _lines(text))
        where = str(path)
    else:
        found, where = [Prompt(i, one) for i, one in enumerate(source)], "the list"
    if not found:
        raise UsageError("there is no prompt in it", where=where)
    known = dict.fromkeys(one.category for one in found)
    for name in categories:
        if name not in known:
            raise UnknownNameError(
                f"no prompt is of the category {name!r}",
                where=where,
                hint=spec.suggest(name, known),
            )
    chosen = [one for one in found if not categories or one.category in categories]
    return tuple(chosen[:limit])


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error}"
        raise UsageError("the prompts cannot be read", where=str(path), why=why) from error


def _lines(text: str) -> Iterator[Prompt]:
    texts = (line.strip() for line in text.splitlines())
    for index, one in enumerate(filter(None, texts)):
        yield Prompt(index, one)


def _table(text: str, path: Path) -> Iterator[Prompt]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    columns: dict[str, int] | None = None
    index, line = 0, 0
    try:
        for row in reader:
            first, line = line + 1, reader.line_num
            if line > first:
                raise _wrong(path, first, "a quote is opened and not closed on the same line")
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns = _columns(row, path)
                continue
            if len(row) > len(columns):
                why = f"it has {len(row)} fields, the header has {len(columns)}"
                raise _wrong(path, line, why)
            prompt, category = (_cell(row, columns[name]) for name in (_PROMPT, _CATEGORY))
            for name, cell in ((_PROMPT, prompt), (_CATEGORY, category)):
                if not cell:
                    raise _wrong(path, line, f"its {name} is empty")
            yield Prompt(index, prompt, category)
            index += 1
    except csv.Error as error:
        raise _wrong(path, line + 1, str(error)) from error


def _columns(header: Sequence[str], path: Path) -> dict[str, int]:
    columns = {name.strip(): index for index, name in enumerate(header)}
    for name in (_PROMPT, _CATEGORY):
        if name not in columns:
            raise UsageError(
                f"this table has no column {name}",
                where=f"{path}, line 1",
                why=f"its columns are {', '.join(map(repr, columns))}",
                hint=f"the header of PartiPrompts is {_HEADER}, a tab between two; "
                "a file of prompts without one is a .txt",
            )
    if len(columns) < len(header):
        raise _wrong(path, 1, "two columns have one name")
    return columns


def _cell(row: Sequence[str], index: int) -> str:
    return row[index].strip() if index < len(row) else ""


def _wrong(path: Path, line: int, why: str) -> UsageError:
    return UsageError(
        "this line is no prompt",
        where=f"{path}, line {line}",
        why=why,
        hint=f"{_HEADER}, a tab between two; quote a field that holds quotes, and double these",
    )
