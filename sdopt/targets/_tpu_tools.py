"""Finding Sophgo's tpu_mlir in a Python environment of its own, and running its tools there.

Written against tpu_mlir 1.30.2, whose wheel needs Python 3.10 and packages of 2023. sdopt imports
none of it: every tool is a command with a log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt.errors import BuildError, MissingDependencyError, storage_error

VARIABLE = "SDOPT_TPU_PYTHON"
"""Names the environment's Python where the option ``python`` does not."""

LOG = "log.txt"
"""In the working folder: everything that the tools said."""

_SHOWN = 12
"""Lines of a failed tool's log that an error quotes."""

# The wheel bundles glibc 2.35 and puts it first in LD_LIBRARY_PATH, where the system's own
# libraries then find it too old ("version `GLIBC_2.36' not found"). Preloading what the system
# has, as its loader finds it, keeps the bundled ones out.
_PROBE = """
import ctypes, json, os
from importlib.metadata import version
os.environ.pop("LD_LIBRARY_PATH", None)
names = ["libc.so.6", "libm.so.6", "libpthread.so.0", "libgcc_s.so.1", "libstdc++.so.6"]
for name in names:
    try:
        ctypes.CDLL(name)
    except OSError:
        pass
mapped = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
found = {os.path.basename(path): path for path in mapped}
print(json.dumps([version("tpu_mlir"), [found[n] for n in names if n in found]]))
"""

ADVICE = (
    "# If a tool says that it finds no `GLIBC_2.36': tpu_mlir 1.30.2 brings an older glibc of its",
    "# own. Set LD_PRELOAD to the system's libc.so.6:libm.so.6:libpthread.so.0:libgcc_s.so.1:",
    "# libstdc++.so.6, each with its path, joined by colons.",
)
"""For whoever runs the tools by hand; ``Tools`` does it itself."""

# As the wheel's own commands, but in the place of a process that waits and hides how its child
# ended. Importing tpu_mlir sets the loader's path, which holds only from the next exec on.
_ENTRY = """
import os, sys, tpu_mlir
root, tool = os.environ["TPUC_ROOT"], sys.argv[1]
binary, script = f"{root}/bin/{tool}", f"{root}/python/tools/{tool}.py"
command = [binary] if os.path.isfile(binary) else [sys.executable, script]
os.execv(command[0], [*command, *sys.argv[2:]])
"""

_TROUBLE = re.compile(r"error|fail|abort|assert|exception|not support|fatal|killed", re.I)
_CHATTER = re.compile(r"\[transformers\]|0 fail|libusercpu")


@dataclass(frozen=True)
class Tools:
    """One installation of tpu_mlir.

    Attributes:
        python: the interpreter of its environment.
        version: of tpu_mlir.
        preload: the system's libraries that its own must not replace.
    """

    python: Path
    version: str
    preload: tuple[str, ...]

    def run(
        self, tool: str, arguments: Sequence[str], folder: Path, tell: Callable[[str], None]
    ) -> str:
        """Run one tool in ``folder``, which it litters, and return what it said.

        Args:
            tool: its command, such as ``model_transform``.
            arguments: of the command.
            folder: the working folder; the log is appended to ``log.txt`` in it.
            tell: is told every line.

        Raises:
            BuildError: it failed or was killed; quotes the lines that say why.
        """
        command = [str(self.python), "-c", _ENTRY, tool, *arguments]
        start = time.monotonic()
        with _running(command, folder, self._environment(folder)) as process:
            lines = []
            with open(folder / LOG, "a", encoding="utf-8") as log:
                log.write(f"$ {tool} {' '.join(arguments)}\n")
                for line in process.stdout or ():
                    log.write(line)
                    lines.append(line.rstrip())
                    if line.strip():
                        tell(line.strip())
            code = process.wait()
        if code:
            raise _failed(tool, code, lines, time.monotonic() - start)
        return "\n".join(lines)

    def _environment(self, folder: Path) -> dict[str, str]:
        """What the tools run under: nothing of this process's Python, temporary files inside."""
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
        path = f"{self.python.parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
        return kept | {
            "PATH": path,
            "LD_PRELOAD": ":".join(self.preload),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(temporary),
        }


def find(python: str) -> Tools:
    """The installation that ``python``, else ``SDOPT_TPU_PYTHON``, names.

    Raises:
        MissingDependencyError: none is named, or tpu_mlir is not in it; says how to install it.
    """
    named = python or os.environ.get(VARIABLE, "")
    if not named:
        raise _missing("the target tpu needs Sophgo's compiler, tpu_mlir, and knows of none")
    path = Path(named).expanduser().absolute()
    if path.is_dir():
        path = path / "bin" / "python"
    if not os.access(path, os.X_OK) or not path.is_file():
        raise _missing("the Python of Sophgo's compiler is not there", str(path))
    return _probe(path)


@functools.lru_cache(maxsize=8)
def _probe(python: Path) -> Tools:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    ran = subprocess.run(
        [str(python), "-c", _PROBE], capture_output=True, text=True, check=False, env=kept
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"]
        raise _missing("there is no tpu_mlir in this Python", str(python), said[-1])
    version, preload = json.loads(ran.stdout)
    return Tools(python, version, tuple(preload))


def _missing(message: str, where: str | None = None, why: str | None = None) -> Exception:
    return MissingDependencyError(
        message,
        where=where,
        why=why or "it runs in a Python 3.10 environment of its own",
        hint=f"make tpu-env, then name its Python: --tpu-python .venv-tpu/bin/python, or "
        f"{VARIABLE}=...; or only lower here: --emit-only",
    )


@contextlib.contextmanager
def _running(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A process whose whole family is gone when the block ends, however it ends."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise storage_error(error, f"run {command[0]}") from error
    with process:
        try:
            yield process
        finally:
            # The tools start others (tpuc-opt), which would outlive them and go on writing.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _failed(tool: str, code: int, lines: Sequence[str], seconds: float) -> BuildError:
    """A failed tool as an error: by which signal, and the lines of its log that say why."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    said = [line for line in lines if line.strip() and not _CHATTER.search(line)]
    telling = [line.strip() for line in said if _TROUBLE.search(line)] or said
    return BuildError(
        f"Sophgo's {tool} {how} after {seconds:.0f} s",
        why="\n".join(telling[-_SHOWN:]) or "it said nothing",
        hint="--emit-only writes the lowered graph and the commands, to run them by hand",
    )
