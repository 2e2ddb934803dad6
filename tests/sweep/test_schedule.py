"""Which task may start when: needs, devices, failures, lost workers."""

from __future__ import annotations

from sdopt.errors import BuildError, WorkerError
from sdopt.sweep.engines.base import ATTEMPTS, Schedule
from sdopt.sweep.records import Failure, Kind, Outcome, Task


def task(key: str, kind: Kind = "score", *needs: str, device: str = "cpu") -> Task:
    return Task(kind, key, needs, device, label=key)


def keys(some: list[Task]) -> list[str]:
    return [one.key for one in some]


def failed(key: str) -> Outcome:
    return Outcome(key, failure=Failure.of(BuildError("no", why="because")))


def test_a_task_starts_after_what_it_needs() -> None:
    one, two = task("one"), task("two", "score", "one", "known")
    schedule = Schedule([two, one], {"known": Outcome("known")})
    assert keys(schedule.ready()) == ["one"]
    schedule.start(one)
    assert not schedule.ready()
    assert not schedule.done
    assert [outcome.key for _, outcome in schedule.finish(one, Outcome("one"))] == ["one"]
    assert keys(schedule.ready()) == ["two"]
    schedule.start(two)
    schedule.finish(two, Outcome("two"))
    assert schedule.done


def test_a_failure_goes_to_all_that_needs_it_and_to_nothing_else() -> None:
    tasks = [
        task("a", "stage"),
        task("b", "build", "a"),
        task("c", "score", "b"),
        task("d", "score", "b", "c"),
        task("e"),
    ]
    schedule = Schedule(tasks, {})
    schedule.start(tasks[0])
    told = schedule.finish(tasks[0], failed("a"))
    assert sorted(outcome.key for _, outcome in told) == ["a", "b", "c", "d"]
    assert {str(outcome.failure) for _, outcome in told} == {"no: because"}
    assert [outcome.attempts for _, outcome in told] == [1, 0, 0, 0]
    assert keys(schedule.ready()) == ["e"]


def test_what_failed_before_fails_at_once() -> None:
    tasks = [task("b", "build", "a"), task("c", "score", "b"), task("e")]
    schedule = Schedule(tasks, {"a": failed("a")})
    assert sorted(outcome.key for _, outcome in schedule.unfit()) == ["b", "c"]
    assert keys(schedule.ready()) == ["e"]


def test_one_at_a_time_has_a_device_to_time_and_one_writes_the_bundle() -> None:
    tasks = [
        task("t1", "time"),
        task("t2", "time"),
        task("t3", "time", device="cuda:0"),
        task("s1"),
        task("g1", "stage"),
        task("g2", "build"),
    ]
    schedule = Schedule(tasks, {})
    assert keys(schedule.ready()) == ["s1", "g1", "t1", "t3"]
    schedule.start(tasks[0])
    assert keys(schedule.ready()) == ["s1", "g1", "t3"]
    schedule.start(tasks[3])
    ((_, outcome),) = schedule.finish(tasks[0], Outcome("t1"))
    assert outcome.beside == ("s1",)


def test_on_one_machine_timing_is_quiet_and_comes_last() -> None:
    tasks = [
        task("t1", "time"),
        task("s1"),
        task("t3", "time", device="cuda:0"),
        task("s3", device="cuda:0"),
    ]
    schedule = Schedule(tasks, {}, quiet=True)
    assert keys(schedule.ready()) == ["s1", "s3"]
    schedule.start(tasks[1])
    schedule.start(tasks[3])
    assert not schedule.ready()
    schedule.finish(tasks[3], Outcome("s3"))
    assert keys(schedule.ready()) == ["t3"]  # the other device is still drawn on
    schedule.start(tasks[2])
    schedule.finish(tasks[1], Outcome("s1"))
    assert keys(schedule.ready()) == ["t1"]


def test_a_lost_worker_is_no_outcome_until_it_is_lost_again_and_again() -> None:
    one, two = task("one", "build"), task("two", "score", "one")
    schedule, error = Schedule([one, two], {}), WorkerError("it ended", why="SIGKILL")
    for _ in range(ATTEMPTS - 1):
        schedule.start(one)
        assert schedule.lost(one, error) == []
        assert keys(schedule.ready()) == ["one"]
    schedule.start(one)
    told = schedule.lost(one, error)
    assert [outcome.key for _, outcome in told] == ["one", "two"]
    assert told[0][1].attempts == ATTEMPTS
    assert told[0][1].failure == Failure("WorkerError", "it ended", why="SIGKILL")


def test_a_second_attempt_that_ends_well_is_an_outcome_like_any() -> None:
    one = task("one")
    schedule = Schedule([one], {})
    schedule.start(one)
    schedule.lost(one, WorkerError("it ended"))
    schedule.start(one)
    ((_, outcome),) = schedule.finish(one, Outcome("one"))
    assert (outcome.ok, outcome.attempts) == (True, 2)
    assert Outcome.from_json(outcome.to_json()) == outcome
