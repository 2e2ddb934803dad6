"""The real server for tests, with a small page and queue: ``python -m tests.ui.served ROOT JSON``.

The page has an upload that is taken into the root; the real page has tests of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass
class Served:
    """A server in a process of its own."""

    address: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def status(self, field: str) -> int:
        """A number of ``/proc/PID/status``, in kB where it is of memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    def forget_peak(self) -> None:
        """Let ``VmHWM`` begin again at what is resident now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """What the process has computed so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(root: Path, **settings: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ui.served", str(root), json.dumps(settings)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Served]:
    """A server that can be asked; it is stopped afterwards."""
    process = launch(root, **{"port": 0, **settings})
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1]
        yield Served(address, process)
    finally:
        process.kill()
        process.communicate()


def _page() -> types.ModuleType:
    import gradio as gr

    from sdopt.errors import SdoptError
    from sdopt.ui.app import App

    def build(app: App) -> gr.Blocks:
        def take(upload: str | None) -> str:
            if upload is None:
                return "nothing"
            try:
                kept = app.workspace.take(Path(upload), Path(upload).name)
            except SdoptError as error:
                return f"refused: {error.message}"
            return app.workspace.relative(kept)

        with gr.Blocks(title="test") as blocks:
            file = gr.File(label="model")
            text = gr.Textbox(label="taken")
            gr.Button("Take").click(take, file, text, api_name="take")
        return blocks

    module = types.ModuleType("sdopt.ui.page")
    module.build = build  # type: ignore[attr-defined]
    module.THEME = module.CSS = module.I18N = None  # type: ignore[attr-defined]
    return module


def _jobs() -> types.ModuleType:
    class JobQueue:
        def __init__(self, root: Path) -> None:
            self.root = root

        def start(self) -> None:
            (self.root / "started").touch()

        def close(self) -> None:
            (self.root / "closed").touch()

    module = types.ModuleType("sdopt.ui.jobs")
    module.JobQueue = JobQueue  # type: ignore[attr-defined]
    return module


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    from sdopt.errors import SdoptError

    sys.modules["sdopt.ui.page"] = _page()
    sys.modules["sdopt.ui.jobs"] = _jobs()
    from sdopt.ui import Settings, serve

    settings = Settings(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    try:
        serve(settings, _say)
    except SdoptError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
    _say("stopped")


if __name__ == "__main__":
    main()
