"""What two workers are worth, and that a device is timed by one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle import Bundle
from sdopt.sweep import tasks
from sdopt.sweep.asking import Asked
from sdopt.sweep.engines.processes import Processes
from sdopt.sweep.place import Place
from sdopt.sweep.planning import Planner
from sdopt.sweep.sweeping import _copy
from tests.sweep import miniature

BURN = "import time\nn = 0\nfor i in range(12_000_000): n += i"

SCORER = "def light(images, prompts): return [one.getpixel((0, 0))[0] / 255 for one in images]"

LOCK = """
import sys, time
from sdopt.sweep.place import device_lock
with device_lock(sys.argv[1]) as waited:
    began = time.monotonic()
    time.sleep(0.4)
    print(began, time.monotonic(), waited)
"""


def burn(count: int) -> float:
    """Seconds that so many processes take for the same work each."""
    start = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    assert not any(one.wait() for one in running)
    return time.perf_counter() - start


def two_cores_are_free() -> bool:
    """Whether two processes are as quick as one now."""
    alone = burn(1)
    return burn(2) < 1.1 * alone


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_take_at_most_065_of_the_time_of_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = Bundle.open(miniature.bundle(tmp_path_factory))
    with Scoring(bundle, tmp_path / "work") as scoring:
        for _ in range(3):
            if not two_cores_are_free():
                continue
            seconds = scoring.seconds(1), scoring.seconds(2)
            if seconds[1] <= 0.65 * seconds[0]:
                return
            if two_cores_are_free():
                pytest.fail(f"{seconds} seconds with one worker and with two")
    pytest.skip("two cores are not free here")


class Scoring:
    """A sweep's scoring, again and again: six tasks of equal size, each image drawn anew."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        (file := folder.with_suffix(".py")).write_text(SCORER)
        options: dict[str, Any] = {**miniature.POINTS, "passes": [""], "shapes": "64x64"}
        options |= {"batch": [1], "measure": ["score"], "steps": 5, "scorer": f"{file}:light"}
        wanted = Asked(**options)
        planner, place = Planner(bundle, wanted.settings()), Place(folder)
        _copy(bundle, planner.components, place)
        (plan,) = planner.plan(wanted.space(bundle).candidates())
        self._known = {plan.build: tasks.execute(planner.tasks[plan.build], place)}
        prompts = [[index, f"the digit {index}"] for index in range(5)]
        self._work = {**planner.tasks[plan.probe].work, "prompts": prompts}
        self._engine, self._made = Processes(place, 2), 0
        # Starting Python and its libraries is no scoring: one task for each worker.
        self._run(2)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: Any) -> None:
        self._engine.__exit__(*error)

    def seconds(self, workers: int) -> float:
        """Of so many of the two workers."""
        self._engine._workers = workers
        start = time.perf_counter()
        self._run(6)
        return time.perf_counter() - start

    def _run(self, count: int) -> None:
        self._made += count
        keys = [f"{index:016x}" for index in range(self._made - count, self._made)]
        scores = [tasks.Task("score", key, (*self._known,), work=self._work) for key in keys]
        done: list[str] = []
        self._engine.run(scores, self._known, lambda task, outcome: done.append(outcome.key))
        assert sorted(done) == keys


@pytest.mark.parametrize(("first", "second", "apart"), [("cpu", "cpu", 0), ("cpu", "cuda:0", 1)])
def test_a_device_is_held_by_one_process_of_the_machine(
    tmp_path: Path, first: str, second: str, apart: bool
) -> None:
    # Locks are the machine's: not those of whoever else sweeps on it now.
    mine = os.environ | {"TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", LOCK]
    running = [
        subprocess.Popen([*words, device], stdout=subprocess.PIPE, text=True, env=mine)
        for device in (first, second)
    ]
    spans = sorted([float(x) for x in one.communicate()[0].split()] for one in running)
    (_, ended, _), (began, _, waited) = spans
    if apart:
        assert waited < 0.2
    else:
        assert began >= ended
