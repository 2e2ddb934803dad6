"""``sdopt`` as processes of their own that need not import the large libraries each time.

torch, diffusers and their like take up to four seconds of every start. One process imports them,
and nothing of sdopt; each command runs in a fork of it, with its own outputs and modules.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Without onnxruntime, which starts a thread.
LIBRARIES = (
    "diffusers.loaders.single_file_utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "onnx",
    "onnx_ir",
    "rich",
    "torch",
    "transformers",
    "typer",
)

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs ``sdopt`` with the words behind it; gives what it printed and its exit code."""


@contextmanager
def sdopt_in(folder: Path) -> Iterator[Run]:
    """What runs commands in a folder, one at a time."""
    command = [sys.executable, "-P", __file__]
    # Threads do not live on in a fork, and OpenBLAS starts its own when it is imported.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asked, answered = server.stdin, server.stdout
        said = [folder.with_name(f"{folder.name}.{name}") for name in ("stdout", "stderr")]

        def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
            asked.write(json.dumps([list(words), *map(str, said)]) + "\n")
            asked.flush()
            code = int(answered.readline())
            texts = [one.read_text("utf-8") for one in said]
            return subprocess.CompletedProcess(["sdopt", *words], code, *texts)

        yield run


def main() -> None:
    """Answer each line of stdin, a command, with the exit code of its process."""
    for name in LIBRARIES:
        importlib.import_module(name)
    # What the libraries made stays: no collection in a child walks over it.
    gc.freeze()
    assert not [name for name in sys.modules if name.split(".")[0] == "sdopt"]
    while line := sys.stdin.readline():
        words, stdout, stderr = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(words, stdout, stderr)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


def _become(words: Sequence[str], stdout: str, stderr: str) -> None:
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["sdopt", *words]
    runpy.run_module("sdopt", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
