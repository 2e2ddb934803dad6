"""The README's commands are run in order; its links lead somewhere; its table is the registry."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sdopt import registry
from tests.preloaded import sdopt_in

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands: list[list[str]] = []
    for kind, text in BLOCKS:
        if kind == "python":
            commands.append([sys.executable, "-c", text])
        else:
            commands += [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert len(commands) >= 12
    with sdopt_in(folder) as sdopt:
        for number, command in enumerate(commands):
            # The first as users start it: by the script that installing it made.
            if command[0] == "sdopt" and number:
                ran = sdopt(command[1:])
            else:
                ran = subprocess.run(
                    command,
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
            assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
            assert "Traceback" not in ran.stderr
    assert (folder / "images" / "0000.png").is_file()
    assert (folder / "unet-optimized.onnx").is_file()


PAGES = [
    page for where in ("*", "docs/**/*", "examples/**/*") for page in ROOT.glob(f"{where}.md")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_pass_is_in_the_table() -> None:
    for name in registry.table("passes"):
        assert re.search(rf"^\|.*`{name}\b", README, re.M), name
