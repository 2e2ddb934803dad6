from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdopt.errors import MissingDependencyError, UsageError
from sdopt.sweep import provenance
from sdopt.sweep.blobs import PIECE, Digests
from sdopt.sweep.engines.ray import RayEngine
from sdopt.sweep.engines.ray_driver import connect
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task
from tests.runtime import toy
from tests.sweep.cluster import NODE, connected, do, kill, two_nodes

BIG = "bundle/big.onnx_data"
"""A file of several pieces, more than an object store should hold at once."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as found, connected(found):
        yield found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path / "driver")
    made.bundle.mkdir(parents=True)
    (made.root / BIG).write_bytes(bytes(range(256)) * (3 * PIECE // 256) + b"the end")
    (tmp_path / "starts").mkdir()
    return made


def engine(place: Place, **options: Any) -> RayEngine:
    return RayEngine(place, [BIG], do=do, **{"look": False, **options})


def task(place: Place, kind: Any, key: str, *needs: str, device: str = "cpu", **work: Any) -> Task:
    folder = str(place.root.parent / "starts")
    return Task(kind, key, needs, device, {"folder": folder, **work}, key)


def run(one: RayEngine, tasks: Sequence[Task], **known: Outcome) -> dict[str, Outcome]:
    told: list[tuple[str, Outcome]] = []
    one.run(tasks, known, lambda task, outcome: told.append((task.key, outcome)))
    assert Counter(key for key, _ in told) == Counter(task.key for task in tasks), "each once"
    return dict(told)


def _begun(place: Place, node: str) -> bool:
    """Whether a node has begun a task."""
    paths = place.root.parent.glob("starts/[!.]*")
    return any(path.read_text() == node for path in paths)


def starts(place: Place) -> Counter[str]:
    return Counter(path.name.rpartition("-")[0] for path in place.root.parent.glob("starts/[!.]*"))


def test_files_go_to_each_node_once_and_what_they_make_comes_back(
    cluster: Any, place: Place
) -> None:
    chain = [
        task(place, "stage", "first", read=[BIG]),
        task(place, "build", "second", "first", read=[BIG, "made/first.txt"]),
    ]
    ends = [
        task(place, "score", f"end{i}", "second", read=["made/second.txt"], seconds=0.3)
        for i in range(6)
    ]
    with engine(place) as one:
        found = run(one, [*ends, *chain])
        fetched = one.fetched()
    big = (place.root / BIG).read_bytes()
    first = b"first: " + big
    assert (place.root / "made/first.txt").read_bytes() == first
    for end in ends:
        whole = f"{end.key}: second: ".encode() + big + first
        assert (place.root / "made" / f"{end.key}.txt").read_bytes() == whole
    assert starts(place) == Counter(found.keys()), "no task was begun twice"
    nodes = {found[end.key].data["node"] for end in ends}
    assert len(nodes) == 2, "both nodes had work"
    assert max(Counter(fetched).values()) == 1, "no blob went to a node twice"
    digest = Digests(place.root).blob(BIG).digest
    assert {node for node, blob in fetched if blob == digest} == nodes
    assert not list(place.root.glob("incoming/*")), "nothing is left on its way"


def test_files_are_taken_from_a_shared_file_system(cluster: Any, place: Place) -> None:
    with engine(place, look=True) as one:
        run(one, [task(place, "stage", "only", read=[BIG])])
        assert one.fetched() == []
    assert (place.root / "made/only.txt").stat().st_size > 3 * PIECE


def test_what_a_lost_node_was_at_is_done_by_another(cluster: Any, place: Place) -> None:
    lost = next(iter(cluster.worker_nodes))
    tasks = [task(place, "score", f"k{i}", read=[BIG], seconds=0.5) for i in range(8)]

    def lose() -> None:
        while not _begun(place, lost.node_id):
            time.sleep(0.02)
        kill(cluster, lost)

    killer = threading.Thread(target=lose)
    with engine(place) as one:
        assert one.label == "Ray, 2 nodes"
        killer.start()
        found = run(one, tasks)
        killer.join()
    cluster.add_node(**NODE, num_gpus=1)
    again = {key for key, count in starts(place).items() if count > 1}
    assert len(again) == 1, "the node had room for one task"
    assert {key for key, outcome in found.items() if outcome.attempts == 2} == again
    assert all(outcome.ok for outcome in found.values())
    assert all((place.root / "made" / f"{key}.txt").is_file() for key in found)


def test_a_failure_is_an_outcome_also_of_what_needs_it(cluster: Any, place: Place) -> None:
    tasks = [
        task(place, "build", "bad", fail="this cannot be lowered"),
        task(place, "score", "after", "bad"),
        task(place, "score", "other", "made"),
    ]
    (place.root / "made").mkdir()
    (place.root / "made/made.txt").write_bytes(b"of an earlier run")
    with engine(place) as one:
        found = run(one, tasks, made=Outcome("made", files=("made/made.txt",)))
    assert [str(found[key].failure) for key in ("bad", "after")] == ["this cannot be lowered"] * 2
    assert found["other"].ok
    assert set(starts(place)) == {"bad", "other"}


def test_times_have_their_machine_to_themselves(cluster: Any, place: Place) -> None:
    times = [task(place, "time", f"t{i}", seconds=0.2) for i in range(3)]
    with engine(place) as one:
        found = run(one, [*times, task(place, "score", "s", seconds=0.4)])
    spans = sorted((found[one.key].data["begin"], found[one.key].data["end"]) for one in times)
    # Both nodes are this machine: their CPU is one device.
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    other = found["s"].data["begin"], found["s"].data["end"]
    for one in times:
        begin, end = found[one.key].data["begin"], found[one.key].data["end"]
        meets = begin < other[1] and other[0] < end
        assert ("s" in found[one.key].beside) == meets, "what ran beside a timing is written down"


def test_a_task_for_a_card_gets_one(cluster: Any, place: Place) -> None:
    with engine(place) as one:
        cards = [task(place, "score", f"c{i}", device="cuda:0", seconds=0.1) for i in range(2)]
        found = run(one, [*cards, task(place, "time", "t", device="cuda:0")])
        assert {outcome.data["card"] for outcome in found.values()} == {"0"}
        assert len({outcome.data["node"] for outcome in found.values()}) == 1
        with pytest.raises(UsageError, match="asks for the card cuda:1"):
            run(one, [task(place, "score", "second", device="cuda:1")])
        one._cluster.nodes = tuple(dataclasses.replace(n, gpus=0) for n in one._cluster.nodes)
        with pytest.raises(UsageError, match="no node of the cluster has a GPU for c0"):
            one.run(cards, {}, lambda task, outcome: None)


def test_a_sweep_that_is_broken_off_leaves_nothing_at_work(cluster: Any, place: Place) -> None:
    tasks = [task(place, "score", f"k{i}", seconds=60.0 * (i > 0)) for i in range(4)]

    def stop(done: Task, outcome: Outcome) -> None:
        while len(starts(place)) < 2:
            time.sleep(0.02)
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), engine(place) as one:
        one.run(tasks, {}, stop)
    with engine(place) as one:
        assert run(one, [task(place, "score", f"after{i}", seconds=0.5) for i in range(2)])
    assert time.monotonic() - began < 40, "both nodes are free again"
    assert not list(place.root.glob("incoming/*"))


def test_a_node_with_other_versions_is_refused(
    cluster: Any, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {**provenance.versions(), "onnxruntime": "0.0.1"}
    monkeypatch.setattr("sdopt.sweep.engines.ray_cluster.provenance.versions", lambda: ours)
    with pytest.raises(UsageError, match="other versions") as error:
        engine(place)
    assert "here 0.0.1" in str(error.value.why)
    assert error.value.where == "127.0.0.1"
    with engine(place, other_versions=True) as one:
        assert run(one, [task(place, "stage", "only")])["only"].ok


def test_what_cannot_be_driven_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="from a machine of the cluster"):
        connect(_Ray(), "ray://head:10001")
    with pytest.raises(UsageError, match="no Ray cluster can be reached") as error:
        connect(_Ray(), "auto")
    assert error.value.why == "Could not find any running Ray instance."
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"sdopt\[ray\]"):
        engine(place)


@pytest.mark.slow
def test_the_command_prints_its_result_alone_though_a_node_is_lost(
    cluster: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "def score(images, prompts):\n"
        "    pathlib.Path(__file__).with_name('begun').touch()\n"
        "    time.sleep(2)\n"
        "    return [0.5 for one in images]\n"
    )
    bundle = toy.bundle(tmp_path / "b").path
    words = ["sweep", str(bundle), "--passes", "clean,|cast_fp16:keep=io", "--shapes", "64x64"]
    words += ["--prompt", "a cat", "--scorer", f"{tmp_path / 'mine.py'}:score", "--steps", "1"]
    words += ["--measure", "score", "--ray", cluster.address, "-o", str(tmp_path / "s"), "--json"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "sdopt", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "begun").exists() and driver.poll() is None:
        time.sleep(0.05)
    kill(cluster, next(iter(cluster.worker_nodes)))
    out, err = driver.communicate(timeout=120)
    cluster.add_node(**NODE, num_gpus=1)  # for the tests that come after
    cluster.wait_for_nodes()
    assert driver.returncode == 0, err
    found = json.loads(out)
    assert [(one["state"], one["score"]) for one in found["points"]] == [("done", 0.5)] * 2
    assert found["engine"] == "Ray, 2 nodes"
    assert "Traceback" not in err
    assert "(raylet)" in err, "Ray tells of the node, but not on stdout"


class _Ray:
    """Ray on a machine where none runs."""

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one.")
