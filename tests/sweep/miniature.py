"""The sweep of the miniature model that every engine must come to the same points of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdopt import api
from sdopt.sweep import report
from sdopt.sweep.result import Result
from sdopt.sweep.store import FILE

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"

POINTS: dict[str, Any] = {
    "passes": ["@fast,tome=0..2,|cast_fp16:keep=io"],
    "shapes": "32x32,64x64",
    "batch": [1, 2],
    "prompts": ["a handwritten three", "a handwritten seven"],
    "scorer": f"{DIGITS / 'scorer.py'}:sure",
    "measure": ["time", "score"],
    "probe": 0,
    "steps": 1,
    "guidance": 1.0,
    "rounds": 1,
    "pause": 0.0,
}
"""The options of 24 points: six recipes, two sizes, two batches."""

KILLED_AFTER = 40
"""Outcomes of 60 that are on the disk when the driver is killed: some points are timed then."""


def bundle(factory: pytest.TempPathFactory) -> Path:
    """examples/digits exported; once for all tests and processes of them, to look at only."""
    made = _shared(factory, "sweep-digits")
    with _once(made) as first:
        if first:
            api.export(DIGITS, made, dtype="fp32")
    return made


def swept(factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """The 24 points by 2 processes whose driver was killed -9 on the way; once for all tests.

    Gives the result, and what the folder held when the driver was dead: the rows of outcomes by
    key, and when each file of ``work/outcomes`` was written, in ns.
    """
    source, folder = bundle(factory), _shared(factory, "sweep-points")
    with _once(folder) as first:
        if first:
            killed(source, folder)
            held = {"rows": rows(folder), "files": written(folder)}
            folder.with_suffix(".held").write_text(json.dumps(held))
            api.sweep(source, folder, workers=2, **POINTS)
    return report.load(folder), json.loads(folder.with_suffix(".held").read_text())


def killed(source: Path, folder: Path) -> None:
    """Sweep with 2 workers and kill the driver -9 in the middle; its workers end by themselves."""
    file = folder.with_suffix(".toml")
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in POINTS.items()))
    words = ["sweep", str(source), str(file), "--workers", "2", "-o", str(folder)]
    driver = subprocess.Popen([sys.executable, "-m", "sdopt", *words], cwd=ROOT)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 200
    while len(rows(folder)) < KILLED_AFTER:
        assert driver.poll() is None, "the sweep ended before it was killed"
        assert time.monotonic() < deadline
        workers = psutil.Process(driver.pid).children() or workers
        time.sleep(0.02)
    assert len(workers) == 2
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert len(gone) == 2


def rows(folder: Path) -> dict[str, list[Any]]:
    """What is recorded of every task, by its key."""
    if not (folder / FILE).is_file():
        return {}
    db = sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)
    try:
        found = db.execute("SELECT key, kind, data, attempts, finished FROM outcome").fetchall()
    except sqlite3.OperationalError:  # the driver is about to make the table
        return {}
    finally:
        db.close()
    return {key: [key, *others] for key, *others in found}


def written(folder: Path) -> dict[str, int]:
    """When the outcome of each task was written to the disk, in ns."""
    outcomes = (folder / "work" / "outcomes").glob("*.json")
    return {path.stem: path.stat().st_mtime_ns for path in outcomes}


def points(result: Result) -> dict[tuple[str, str, str, int], Any]:
    """What must be the same wherever a sweep ran, by what makes a point that point."""
    found = {
        (one.recipe, one.target, one.shape, one.batch): {
            "state": one.state,
            "score": (one.score, one.score_error),
            "images": [
                (x.prompt, x.seed, x.score, digest(result.work / x.path)) for x in one.samples
            ],
            "digests": dict(one.digests),
        }
        for one in result.points
    }
    assert len(found) == len(result.points), "a point is there twice"
    return found


def digest(image: Path) -> str:
    """Of an image's bytes."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


def _shared(factory: pytest.TempPathFactory, name: str) -> Path:
    root = factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name


@contextmanager
def _once(made: Path) -> Iterator[bool]:
    """Whether this is the first to come here; the others wait until it is done."""
    done = made.with_suffix(".done")
    with open(made.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.is_file()
        done.touch()
