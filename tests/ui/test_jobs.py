"""The queue: order, one at a time, cancelling, servers that go down, hostile names."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.bundle import JOBS
from sdopt.errors import SdoptError, UnknownNameError, UsageError
from sdopt.ui import dispatcher, shelf
from sdopt.ui.inside import inside
from sdopt.ui.jobfolder import EVENTS, LOG_BYTES, JobFolder
from sdopt.ui.jobs import Call, JobQueue, State
from sdopt.ui.records import Asked, Line
from tests.ui.acting import act, install, over, until, working

ASKED = Asked("a title", (Call("optimize", {"passes": "clean"}),), 1.0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "acts", monkeypatch)
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def queue(root: Path) -> Iterator[JobQueue]:
    with working(root) as found:
        yield found


def folder_of(root: Path, name: str, bundle: str = "b") -> Path:
    return root / bundle / JOBS / name


def test_jobs_run_in_order_and_one_at_a_time(root: Path) -> None:
    queue = JobQueue(root)
    titles = ["first", "second", "third"]
    names = [queue.submit(f"b{title}", title, [act(f"note:{title}")]) for title in titles]
    assert names == sorted(names)
    assert [one.title for one in queue.jobs()] == titles[::-1]
    assert queue.busy()
    assert {one.state for one in queue.jobs()} == {State.QUEUED}
    with working(root) as started:
        done = over(started, *names)
    assert [one.state for one in done] == [State.DONE] * 3
    assert [one.share for one in done] == [1.0] * 3
    assert [one.results for one in done] == [({"file": "files/fetched"},)] * 3
    lines = [line.split() for line in (root / "notes.txt").read_text().splitlines()]
    edges = [(edge, title) for edge, title, _ in lines]
    assert edges == [(edge, title) for title in titles for edge in ("begin", "end")]
    assert len({number for *_, number in lines}) == 3  # each a process of its own
    for before, after in itertools.pairwise(done):
        assert before.queued < before.started < before.ended <= after.started


def test_a_queue_that_only_looks_sees_the_same(root: Path, queue: JobQueue) -> None:
    name = queue.submit("b", "title", [act("speak:x")])
    (job,) = over(queue, name)
    other = JobQueue(root)
    assert other.job(name) == job
    assert other.jobs() == queue.jobs()
    assert not other.busy()
    assert job.log.endswith("the end\n")


def test_what_moves_is_counted_and_what_rests_costs_nothing(
    root: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = queue.changes()
    name = queue.submit("b", "title", [act("sleep")])
    asked = queue.changes()
    assert asked > before
    until(lambda: queue.job(name).what == "asleep")
    until(lambda: queue.changes() >= asked + 2)  # it started, and it told something
    told = queue.changes()
    queue.cancel(name)
    over(queue, name)
    until(lambda: queue.changes() >= told + 2)
    time.sleep(2 * dispatcher.POLL)  # until the last process is gone

    looks: list[None] = []
    monkeypatch.setattr(shelf.Shelf, "jobs", lambda self: looks.append(None) or [])
    monkeypatch.setattr(JobFolder, "alive", lambda self: looks.append(None))
    time.sleep(2 * dispatcher.POLL)
    assert not looks


def test_cancelling_lets_the_job_clean_up(root: Path, queue: JobQueue) -> None:
    name = queue.submit("b", "title", [act("sleep"), act("note:after")])
    waiting = queue.submit("b", "title", [act("note:waiting")])
    until(lambda: queue.job(name).what == "asleep")
    running = queue.job(name)
    assert (running.state, running.step, running.share) == (State.RUNNING, 0, 0.25)
    assert queue.job(waiting).state is State.QUEUED
    queue.cancel(waiting)
    assert queue.job(waiting).state is State.CANCELLED  # at once
    start = time.monotonic()
    queue.cancel(name)
    (job,) = over(queue, name)
    assert time.monotonic() - start < dispatcher.GRACE
    assert job.state is State.CANCELLED
    assert job.error is None
    assert (root / "tidied.txt").exists()
    assert not (root / "notes.txt").exists()
    queue.cancel(name)  # once more does nothing
    assert queue.job(name) == job


def test_what_does_not_listen_is_killed(
    root: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "GRACE", 0.3)
    name = queue.submit("b", "title", [act("stubborn")])
    until(lambda: queue.job(name).what == "stubborn")
    queue.cancel(name)
    (job,) = over(queue, name)
    assert job.state is State.CANCELLED


def test_what_a_job_started_ends_with_it(root: Path, queue: JobQueue) -> None:
    name = queue.submit("b", "title", [act("child")])
    until(lambda: queue.job(name).what == "a child")
    child = int((root / "child.txt").read_text())
    queue.cancel(name)
    over(queue, name)

    def gone() -> bool:
        stat = Path(f"/proc/{child}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone)


_SERVER = """
import sys, time
from pathlib import Path
from sdopt.ui.jobs import JobQueue
queue = JobQueue(Path(sys.argv[1]))
queue.start()
print("serving", flush=True)
time.sleep(60)
"""


def serve(root: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]])
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "serving\n"
    return server


def test_a_server_that_is_killed_loses_nothing(root: Path) -> None:
    looking = JobQueue(root)
    first = looking.submit("b", "first", [act("sleep")])
    second, third = (looking.submit("b", t, [act(f"note:{t}")]) for t in ("second", "third"))
    with serve(root) as server:
        until(lambda: looking.job(first).what == "asleep")
        with pytest.raises(UsageError, match="another sdopt ui"):
            JobQueue(root).start()
        server.kill()
    assert looking.job(first).state is State.RUNNING  # it outlives the server
    lock = folder_of(root, first) / "lock"
    process = int(lock.read_text())
    with working(root) as queue:
        time.sleep(3 * dispatcher.POLL)
        assert int(lock.read_text()) == process  # it is the same one
        assert [one.state for one in queue.jobs()] == [State.QUEUED, State.QUEUED, State.RUNNING]
        queue.cancel(first)
        done = over(queue, first, second, third)
        assert [one.state for one in done] == [State.CANCELLED, State.DONE, State.DONE]
        assert done[0].ended < done[1].started
        assert done[1].ended < done[2].started


def test_a_machine_that_goes_down_starts_the_job_again(root: Path) -> None:
    looking = JobQueue(root)
    name = looking.submit("b", "title", [act("die:1")])
    with working(root) as queue:
        (job,) = over(queue, name)
    assert job.state is State.DONE
    assert (root / "deaths.txt").read_text() == "xx"
    assert [one.what for one in job.events].count("interrupted, started again") == 1
    assert job.share == 1.0


def test_a_job_whose_process_dies_twice_has_failed(root: Path, queue: JobQueue) -> None:
    name = queue.submit("b", "title", [act("die:9")])
    (job,) = over(queue, name)
    assert (root / "deaths.txt").read_text() == "xx"
    assert job.state is State.FAILED
    assert job.error.what == "the job's process ended 2 times without saying why"
    assert job.error.why == "the last time by signal 9"
    assert "the log" in job.error.hint


def test_a_server_that_is_closed_leaves_the_job_alone(root: Path) -> None:
    queue = JobQueue(root)
    queue.start()
    name = queue.submit("b", "title", [act("note:x")])
    until(lambda: queue.job(name).state is State.RUNNING)
    queue.close()
    until(lambda: queue.job(name).state is State.DONE)  # nobody follows it, and it ends
    with working(root) as again:
        assert again.job(name).state is State.DONE
    assert (root / "notes.txt").read_text().count("begin") == 1


def test_a_folder_that_cannot_be_written_stops_only_its_job(root: Path) -> None:
    looking = JobQueue(root)
    bad, good = (looking.submit("b", "title", [act("note:x")]) for _ in range(2))
    (folder_of(root, bad) / "starts.json").mkdir()
    with working(root) as queue:
        failed, done = over(queue, bad, good)
        assert failed.state is State.FAILED
        assert "starts.json" in f"{failed.error.what} {failed.error.why} {failed.error.where}"
        assert done.state is State.DONE
        assert queue.jobs()[1].state is State.FAILED


def test_forgetting(root: Path, queue: JobQueue) -> None:
    name = queue.submit("b", "title", [act("sleep")])
    until(lambda: queue.job(name).what == "asleep")
    with pytest.raises(UsageError, match="not over"):
        queue.forget(name)
    queue.cancel(name)
    over(queue, name)
    until(lambda: queue.jobs()[0].state.final)
    queue.forget(name)
    assert queue.jobs() == []
    assert list((root / "b" / JOBS).iterdir()) == []
    with pytest.raises(UnknownNameError, match="no job"):
        queue.job(name)


def test_the_newest_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "KEPT", 3)
    queue = JobQueue(root)
    names = []
    for _ in range(6):
        names.append(queue.submit("b", "title", [act("note:x")]))
        queue.cancel(names[-1])
    other = queue.submit("other", "title", [act("note:x")])
    waiting = queue.submit("b", "title", [act("note:x")])
    assert [one.id for one in queue.jobs()] == [waiting, other, *names[:-4:-1]]


def test_the_names_sort_although_the_clock_goes_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = JobQueue(root).submit("b", "title", [act("note:x")])
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    queue = JobQueue(root)
    names = [queue.submit("b", "title", [act("note:x")]) for _ in range(3)]
    assert [first, *names] == sorted({first, *names})
    second = JobQueue(root).submit("c", "title", [act("note:x")])
    assert second > names[-1]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../b",
        "/etc",
        "a/../b",
        "~root",
        "a\nb",
        "a\0b",
        "x" * 300,
    ],
)
def test_hostile_names_of_bundles(root: Path, name: str) -> None:
    with pytest.raises(UsageError):
        JobQueue(root).submit(name, "title", [act("note:x")])
    assert [one.name for one in root.parent.iterdir() if one.name != "acts"] == ["root"]
    assert list(root.iterdir()) == []


def test_links_are_no_bundles(root: Path) -> None:
    outside = root.parent / "outside"
    name = JobQueue(root.parent).submit("outside", "title", [act("note:x")])
    (root / "link").symlink_to(outside)
    (root / "plain").mkdir()
    (root / "plain" / JOBS).symlink_to(outside / JOBS)
    queue = JobQueue(root)
    assert queue.jobs() == []
    with pytest.raises(UnknownNameError):
        queue.cancel(name)
    with pytest.raises(UsageError):
        queue.submit("link", "title", [act("note:x")])
    with pytest.raises(UsageError):
        inside(root, "link/model.onnx")


@pytest.mark.parametrize(
    "name",
    ["", "..", "../../etc", "20260101-000000-00000g", "20260101-000000-000000", "2026\n", "\0"],
)
def test_hostile_names_of_jobs(root: Path, name: str) -> None:
    queue = JobQueue(root)
    queue.submit("b", "title", [act("note:x")])
    for method in (queue.job, queue.cancel, queue.forget):
        with pytest.raises(UnknownNameError):
            method(name)
    assert len(queue.jobs()) == 1


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([], "no calls"),
        ([Call("optimise", {})], "did you mean optimize"),
        ([Call("run", {"prompts": {1, 2}})], "set is not JSON serializable"),
        ([Call("run", {"guidance": float("nan")})], "cannot be kept"),
    ],
)
def test_what_cannot_be_asked_for(root: Path, calls: list[Call], words: str) -> None:
    queue = JobQueue(root)
    with pytest.raises(SdoptError) as caught:
        queue.submit("b", "title", calls)
    assert words in str(caught.value)
    assert queue.jobs() == []


def test_torn_files(root: Path) -> None:
    queue = JobQueue(root)
    name = queue.submit("b", "title", [Call("optimize", {"passes": "clean"})])
    folder = JobFolder(folder_of(root, name))
    folder.start()
    folder.tell(0, "whole", 0.25)
    with open(folder.path / "events.jsonl", "ab") as file:
        file.write(Line(time.time(), 0, "torn", 0.5).dumps()[:-10])
    assert [one.what for one in queue.job(name).events] == ["whole"]
    folder.tell(0, "after it", 0.75)
    (folder.path / "result-0.json").write_text('{"verb": "opti')
    (folder.path / "log.txt").write_bytes(b"\xff\xfe text\n")
    job = queue.job(name)
    assert [one.what for one in job.events] == ["whole", "after it"]
    assert list(job.results[0]) == ["unreadable"]
    assert job.log == "\ufffd\ufffd text\n"

    (folder.path / "done").write_text('{"state": "run')
    assert queue.job(name).state is State.FAILED
    assert queue.jobs()[0].error.what == "this job cannot be read"
    queue.forget(name)
    assert queue.jobs() == []


def test_jobs_that_cannot_be_read_are_shown_and_not_run(root: Path) -> None:
    texts = ["", "[]", "{}", "\xff", '{"title": 1, "calls": [], "queued": 1}', '{"calls": [1]}']
    texts.append(json.dumps({"title": "t", "calls": [{"verb": 5}], "queued": 1}))
    names = [f"20260101-000000-00000{index}" for index in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        folder_of(root, name).mkdir(parents=True)
        (folder_of(root, name) / "job.json").write_text(text)
    with working(root) as queue:
        good = queue.submit("b", "title", [act("note:x")])
        assert over(queue, good)[0].state is State.DONE
        for bad in map(queue.job, names):
            assert bad.state is State.FAILED
            assert bad.error.what == "this job cannot be read"
            queue.forget(bad.id)
        assert [one.id for one in queue.jobs()] == [good]


def test_what_a_kill_left_half_made_is_removed(root: Path) -> None:
    half, hidden = "20260101-000000-000000", ".20260101-000000-000001"
    for name in (half, hidden):
        (folder_of(root, name) / "images").mkdir(parents=True)
    (folder_of(root, hidden) / "job.json").write_bytes(ASKED.dumps())
    (root / "b" / JOBS / "notes").mkdir()
    assert JobQueue(root).jobs() == []
    with working(root):
        assert [one.name for one in (root / "b" / JOBS).iterdir()] == ["notes"]


def test_long_logs_and_many_events_end_in_a_view(root: Path) -> None:
    queue = JobQueue(root)
    name = queue.submit("b", "title", [Call("optimize", {"passes": "clean"})])
    folder = JobFolder(folder_of(root, name))
    folder.start()
    for index in range(3 * EVENTS):
        folder.tell(0, f"event {index} {'x' * 400}", index / (3 * EVENTS))
    folder.log.write_text("y" * 10 * LOG_BYTES + "the end")
    job = queue.job(name)
    assert job.events[-1].what.startswith(f"event {3 * EVENTS - 1} ")
    assert len(job.events) == EVENTS
    assert len(job.log) == LOG_BYTES
    assert job.log.endswith("the end")


def test_a_dead_number_is_never_signalled(root: Path) -> None:
    """A lock that nobody holds says that the number in it is somebody else's by now."""
    looking = JobQueue(root)
    names = [looking.submit("b", "title", [act("note:x")]) for _ in range(2)]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        for name in names:
            folder = JobFolder(folder_of(root, name))
            folder.start()
            folder.lock.write_text(f"{bystander.pid}\n")
            assert looking.job(name).state is State.QUEUED
        looking.cancel(names[0])
        assert looking.job(names[0]).state is State.CANCELLED
        with working(root) as queue:
            assert over(queue, names[1])[0].state is State.DONE
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert bystander.returncode == 0
