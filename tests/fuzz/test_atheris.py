"""``python -m tests.fuzz`` runs each harness for a moment and finds nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harnesses import HARNESSES

BEYOND = 100
"""Inputs beyond the seeds: a number and no time, so that a run can be repeated."""

pytest.importorskip("atheris", reason="atheris is not installed: it is in the extra dev")


@pytest.mark.parametrize("name", HARNESSES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    seeds = len(HARNESSES[name].seeds())
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.fuzz",
            name,
            "--runs",
            str(seeds + BEYOND),
            "--found",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "0"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert not list(tmp_path.iterdir())
    count = re.search(r"number_of_executed_units: (\d+)", ran.stderr)
    assert count is not None, ran.stderr[-3000:]
    assert int(count[1]) >= seeds, "not even the seeds were run"
