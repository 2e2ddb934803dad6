"""Running ATC: its log is streamed, its errors are kept, its model is found under any name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sdopt.errors import BuildError
from sdopt.report import Progress

_ERROR = re.compile(r"\[ERROR\]|\bE[0-9A-Z]{5}\b|ATC run failed|error:", re.I)
_KEPT = 5


def compile_model(program: str, words: Sequence[str], made: Path, progress: Progress) -> list[str]:
    """Run ATC in the folder of ``made``, and give its model that name.

    ATC adds ``.om``, or ``_linux_x86_64.om`` and the like where it packs host libraries.

    Args:
        program: its path.
        words: behind the program; quotes of a shell are taken off.
        made: what ``--output`` names, with ``.om`` behind it.
        progress: is told every line of the log.

    Returns:
        The lines of the log that warn.

    Raises:
        BuildError: it failed or ended without a model, with its error lines.
    """
    plain = [program, *(word.replace('"', "") for word in words)]
    lines: list[str] = []
    try:
        with subprocess.Popen(
            plain,
            cwd=made.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # atc is a script around a program: both must end with us
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip():
                        lines.append(line.strip())
                        progress(f"atc: {lines[-1]}", 0.5)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except OSError as error:
        raise BuildError("atc cannot be started", where=program, why=str(error)) from error
    found = sorted(made.parent.glob(f"{made.stem}*.om"))
    if process.returncode or len(found) != 1:
        errors = [line for line in lines if _ERROR.search(line)] or lines[-_KEPT:]
        raise BuildError(
            _what(process.returncode, len(found)),
            where=" ".join([program, *words]),
            why="\n".join(errors[:_KEPT]) or "it printed nothing",
            hint="--emit-only keeps the lowered graph and the command to run it by hand",
        )
    os.replace(found[0], made)
    return [line for line in lines if "[WARN" in line.upper()][:_KEPT]


def _what(code: int, count: int) -> str:
    if code < 0:
        return f"atc was ended by signal {-code}"
    if code:
        return f"atc failed with exit code {code}"
    return "atc ended without a model" if not count else f"atc made {count} models, not one"
