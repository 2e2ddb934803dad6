"""Run the commands of docs/troubleshooting.md and compare their outputs with what it shows.

    python -m tests.troubleshooting            says where the page differs
    python -m tests.troubleshooting --write    writes the outputs into the page

A block of the page is ``console``: commands behind ``$`` and what each prints, stdout and stderr
as they come, and ``[exit code N]`` where that is not 0. One line ``[...]`` in an output
stands for lines that are not shown; ``--write`` keeps as many before and after it. Blocks that say
``console tpu`` need Sophgo's compiler and are passed over where it is missing.

What may differ, and no more: times, digests, the last digits of a number. Numbers with a point are
the same within a tenth; below 1e-4 they are rounding noise, of which only the magnitude counts.
How many values overflowed may differ by a twentieth. Whole numbers and words may not differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from sdopt.cli import main as sdopt

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
TPU_PYTHON = Path(os.environ.get("SDOPT_TPU_PYTHON") or ROOT / ".venv-tpu/bin/python")

MORE = "[...]"
NOISE = 1e-4
"""Below it a relative error is that of the order of sums."""

_BLOCK = re.compile(r"^```console( tpu)?\n(.*?)^```$", re.M | re.S)
_TIMES = re.compile(r"\b\d+(?:\.\d+)? s\b")
_DIGESTS = re.compile(r"\b[0-9a-f]{16}\b")
_NUMBERS = re.compile(r"(?<![\w.])(\d+\.\d+(?:e[+-]\d+)?|\de[+-]\d+|\d+(?= infinities))(?![\w.])")


@dataclass(frozen=True)
class Command:
    """A command of the page: the line behind ``$`` and the lines that are shown below it."""

    line: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Commands that stand together, and whether they need the compiler for TPUs."""

    section: str
    tpu: bool
    commands: tuple[Command, ...]


def blocks(text: str) -> list[Block]:
    """The page's blocks, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        headings = re.findall(r"^## (.*)$", text[: match.start()], re.M)
        commands: list[Command] = []
        for line in match[2].splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:], ()))
            else:
                last = commands.pop()
                commands.append(Command(last.line, (*last.shown, line)))
        found.append(Block(headings[-1], match[1] is not None, tuple(commands)))
    return found


def run(line: str) -> list[str]:
    """What a command prints in the current folder; ``sdopt`` runs in this process."""
    words = shlex.split(line)
    if words[0] == "sdopt":
        said = io.StringIO()
        code = 0
        with (
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                sdopt()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        text = said.getvalue()
    else:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        text, code = done.stdout + done.stderr, done.returncode
    return [*text.splitlines(), *([f"[exit code {code}]"] if code else [])]


def cut(shown: Sequence[str], real: Sequence[str]) -> list[str]:
    """The real lines, with as many left out as are on the page."""
    if MORE not in shown:
        return list(real)
    head = list(shown).index(MORE)
    tail = len(shown) - head - 1
    if len(real) <= head + tail:
        return list(real)
    return [*real[:head], MORE, *real[len(real) - tail :]]


def alike(shown: str, real: str) -> bool:
    """Whether a line of the page is what a command printed, but for what may differ."""
    ours, theirs = (_DIGESTS.sub("digest", _TIMES.sub("time", one)) for one in (shown, real))
    if _NUMBERS.sub("#", ours) != _NUMBERS.sub("#", theirs):
        return False
    pairs = zip(_NUMBERS.finditer(ours), _NUMBERS.finditer(theirs), strict=True)
    return all(_near(one[0], other[0]) for one, other in pairs)


def _near(shown: str, real: str) -> bool:
    a, b = float(shown), float(real)
    if shown.isdecimal():
        return abs(a - b) <= 0.05 * max(a, b)
    if 0 < a < NOISE and 0 < b < NOISE:
        return abs(math.log10(a / b)) <= 1
    return abs(a - b) <= 0.1 * max(a, b)


def differences(shown: Sequence[str], real: Sequence[str]) -> list[str]:
    """The lines where a command's output is not that of the page."""
    pairs = itertools.zip_longest(shown, cut(shown, real))
    return [
        f"  page: {one if one is not None else '(nothing)'}\n"
        f"  real: {other if other is not None else '(nothing)'}"
        for one, other in pairs
        if one is None or other is None or (one != other and not alike(one, other))
    ]


def outputs(text: str, folder: Path) -> Iterator[tuple[Block, list[list[str]]]]:
    """Each block that can be run here, with what its commands printed in the folder."""
    has_tpu = TPU_PYTHON.is_file()
    with contextlib.chdir(folder), mock.patch.dict(os.environ, SDOPT_TPU_PYTHON=str(TPU_PYTHON)):
        for block in blocks(text):
            if has_tpu or not block.tpu:
                yield block, [run(command.line) for command in block.commands]


def rewritten(text: str, found: Mapping[Block, list[list[str]]]) -> str:
    """The page with the real outputs in the place of what differs."""
    known = iter(blocks(text))

    def fresh(match: re.Match[str]) -> str:
        block = next(known)
        if block not in found:
            return match[0]
        lines = []
        for command, real in zip(block.commands, found[block], strict=True):
            lines.append(f"$ {command.line}")
            same = not differences(command.shown, real)
            lines += command.shown if same else cut(command.shown, real)
        return "\n".join([f"```console{match[1] or ''}", *lines, "```"])

    return _BLOCK.sub(fresh, text)


def main() -> int:
    """Make the models, run the page, and say or write what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="write the outputs into the page")
    given = parser.parse_args()
    # The width that help and errors are wrapped at must not be that of the terminal.
    os.environ.update(COLUMNS="100", TERM="dumb", NO_COLOR="1")
    from tests import symptoms

    text = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        symptoms.make(folder)
        found = dict(outputs(text, folder))
    bad = 0
    for block, reals in found.items():
        for command, real in zip(block.commands, reals, strict=True):
            if lines := differences(command.shown, real):
                bad += 1
                print(f"{block.section}\n$ {command.line}", *lines, sep="\n")  # noqa: T201
    if given.write:
        PAGE.write_text(rewritten(text, found), "utf-8")
        return 0
    print(f"{bad} command(s) differ from the page")  # noqa: T201
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
