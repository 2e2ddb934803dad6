"""The record of a sweep, and the keys that decide what is known."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sdopt.errors import StorageError, UsageError
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.planning import Plan, Planner, shared
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.settings import Scoring, Settings
from sdopt.sweep.store import FILE, Store
from tests.runtime import toy

TASK = Task("score", "k1", label="one")
FOUND = Outcome(
    "k1",
    {
        "images": [
            {"prompt": 0, "seed": 3, "text": "x", "path": "a.png", "digest": "d", "score": 1.0}
        ]
    },
    here={"cpu": "c"},
    beside=("two",),
    attempts=2,
    finished="now",
)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / FILE, writes=True)
    made.begin({"a": 1}, {"bundle": "b"}, "today")
    yield made
    made.close()


def test_what_is_recorded_is_read_back_by_another(store: Store, tmp_path: Path) -> None:
    plan = Plan("p", "b", "t", "k1", "")
    store.add(Candidate("clean", "ort", "64x64", 2, {"x": "y"}), plan)
    store.add(Candidate("clean", "ort", "64x64", 2), plan)  # as it is
    store.record(TASK, FOUND)
    store.settle("p", "stopped", "why")
    other = Store(tmp_path / FILE)
    assert other.outcomes() == {"k1": FOUND}
    (row,) = other.candidates()
    assert (row.candidate.choices, row.plan, row.state, row.reason) == (
        *({"x": "y"}, plan, "stopped", "why"),
    )
    assert other.facts() == ({"a": 1}, {"bundle": "b"}, "today")
    with pytest.raises(StorageError):
        other.settle("p", "done")  # who reads does not write
    other.close()
    samples = sqlite3.connect(tmp_path / FILE).execute("SELECT * FROM sample").fetchall()
    assert samples == [("k1", 0, 3, "x", "a.png", "d", 1.0)]


def test_a_second_outcome_of_a_task_is_refused_whole(store: Store) -> None:
    store.record(TASK, FOUND)
    with pytest.raises(StorageError, match="record of the sweep"):
        store.record(TASK, dataclasses.replace(FOUND, finished="later"))
    assert store.outcomes()["k1"].finished == "now"
    store.forget(["k1"])
    store.record(TASK, dataclasses.replace(FOUND, finished="later"))
    assert store.outcomes()["k1"].finished == "later"


def test_files_that_are_no_record(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sweep"):
        Store(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError):
        Store(tmp_path / FILE).facts()
    (tmp_path / FILE).unlink()
    newer = Store(tmp_path / FILE, writes=True)
    with pytest.raises(UsageError, match="cannot be read"):
        newer.facts()
    newer.begin({}, {}, "today")
    newer._db.execute("UPDATE sweep SET schema = 99")
    with pytest.raises(UsageError, match="cannot be read"):
        newer.facts()
    newer.close()


def test_stages_are_made_where_recipes_part() -> None:
    a, b, c = ("x", "y", "1"), ("x", "y", "2"), ("x", "y", "2", "z")
    assert shared([a, b, c], []) == {("x", "y"), a, b, c}
    assert shared([a], []) == {a}
    assert shared([a], [("x",)]) == {("x",), a}
    assert shared([()], []) == {()}


SETTINGS = Settings(("a cat", "a dog"), scoring=Scoring("function", "f.py:f", "f", "d1"), probe=1)
ONE = Candidate("clean", "ort", "64x64", 1)


def keys(bundle: Path, settings: Settings, *candidates: Candidate) -> tuple[Plan, ...]:
    from sdopt.bundle import Bundle

    return tuple(Planner(Bundle.open(bundle), settings).plan(candidates or (ONE,)))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"prompts": ("a cat", "a cow")}, {"build", "time", "probe"}),
        ({"seeds": (1,)}, {"build", "time"}),
        ({"scoring": Scoring("function", "f.py:f", "f", "d2")}, {"build", "time"}),
        ({"steps": 3}, {"build"}),
        ({"guidance": 1.0}, {"build"}),
        ({"rounds": 7}, {"build", "probe", "rest"}),
        ({"probe": 0}, {"build", "time"}),
    ],
)  # fmt: skip
def test_a_setting_decides_what_it_decides(
    tmp_path: Path, changes: dict[str, Any], same: set[str]
) -> None:
    bundle = toy.bundle(tmp_path / "b").path
    (before,) = keys(bundle, SETTINGS)
    (after,) = keys(bundle, dataclasses.replace(SETTINGS, **changes))
    names = ("build", "time", "probe", "rest")
    assert {name for name in names if getattr(before, name) == getattr(after, name)} == same
    assert before.key != after.key


def test_where_the_scorer_lies_decides_nothing(tmp_path: Path) -> None:
    bundle = toy.bundle(tmp_path / "b").path
    moved = Scoring("function", "elsewhere.py:f", "f", "d1")
    assert keys(bundle, SETTINGS) == keys(bundle, dataclasses.replace(SETTINGS, scoring=moved))


def test_sizes_and_batches_share_a_build_only_where_nothing_is_compiled(tmp_path: Path) -> None:
    bundle = toy.bundle(tmp_path / "b").path
    for target, builds in (("ort", 1), ("onnx", 1), ("trt_rtx:sm=86", 4)):
        some = [
            Candidate("clean", target, shape, batch)
            for shape in ("64x64", "32x32")
            for batch in (1, 2)
        ]
        plans = keys(bundle, SETTINGS, *some)
        assert len({plan.build for plan in plans}) == builds
        assert len({plan.time for plan in plans}) == len({plan.probe for plan in plans}) == 4


def test_another_graph_or_configuration_is_another_sweep(tmp_path: Path) -> None:
    (one,) = keys(toy.bundle(tmp_path / "a").path, SETTINGS)
    (same,) = keys(toy.bundle(tmp_path / "b").path, SETTINGS)
    assert one == same  # wherever the bundle lies
    path = tmp_path / "b" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    (other,) = keys(tmp_path / "b", SETTINGS)
    names = ("key", "build", "time", "probe", "rest")
    assert not [name for name in names if getattr(one, name) == getattr(other, name)]
