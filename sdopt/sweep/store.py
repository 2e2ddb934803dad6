"""The record of a sweep: one SQLite file, of which one process is the only writer."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.errors import SdoptError, StorageError, UsageError, storage_error
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.planning import Plan
from sdopt.sweep.records import Failure, Outcome, Task
from sdopt.sweep.result import State

FILE = "sweep.sqlite"
WORK = "work"
"""The folder beside it with stages, builds and images."""

PASSING = ("StorageError", "WorkerError", "MissingDependencyError")
"""Failures that say nothing of the recipe: tried again when the sweep goes on."""

_SCHEMA = 1

_TABLES = """
CREATE TABLE sweep (
    id INTEGER PRIMARY KEY CHECK (id = 1), schema INTEGER, began TEXT, identity TEXT, facts TEXT
);
CREATE TABLE candidate (
    key TEXT PRIMARY KEY, position INTEGER, recipe TEXT, target TEXT, shape TEXT, batch INTEGER,
    choices TEXT, build TEXT, time TEXT, probe TEXT, rest TEXT, state TEXT, reason TEXT
);
CREATE TABLE outcome (
    key TEXT PRIMARY KEY, kind TEXT, label TEXT, work TEXT, data TEXT, files TEXT, failure TEXT,
    failure_kind TEXT, seconds REAL, here TEXT, beside TEXT, attempts INTEGER, finished TEXT
);
CREATE TABLE sample (
    task TEXT, prompt INTEGER, seed INTEGER, text TEXT, path TEXT, digest TEXT, score REAL,
    PRIMARY KEY (task, seed, prompt)
);
"""


@dataclass(frozen=True)
class Row:
    """A candidate as it is recorded."""

    candidate: Candidate
    plan: Plan
    state: State
    reason: str


class Store:
    """A sweep's file. What a method wrote is on the disk when it returns.

    Args:
        path: the file; made if ``writes``.
        writes: whether this process is the one that writes.

    Raises:
        UsageError: there is no sweep, or it is of a newer sdopt.
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path, *, writes: bool = False) -> None:
        if not writes and not path.is_file():
            raise UsageError(
                "there is no sweep here", where=str(path.parent), hint="sdopt sweep BUNDLE -o ..."
            )
        with _told(path):
            if writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(path, isolation_level=None)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            else:
                self._db = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)
            if writes and not self._db.execute("SELECT name FROM sqlite_master").fetchall():
                self._db.executescript(f"BEGIN;{_TABLES}COMMIT;")
        self._path = path

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def begin(self, identity: Mapping[str, Any], facts: Mapping[str, Any], began: str) -> None:
        """Say what the sweep is of; one that goes on must be of the same.

        Args:
            identity: what all its points have in common and that decides them.
            facts: what is worth knowing besides; of the last run.
            began: the time.

        Raises:
            UsageError: the folder holds another sweep; names what differs.
        """
        with self._writing():
            row = self._db.execute("SELECT schema, identity FROM sweep").fetchone()
            if row is None:
                values = (_SCHEMA, began, json.dumps(identity), json.dumps(facts))
                self._db.execute("INSERT INTO sweep VALUES (1, ?, ?, ?, ?)", values)
                return
            if changes := list(_changes(json.loads(row[1]), identity)):
                raise UsageError(
                    "this folder holds another sweep",
                    where=str(self._path.parent),
                    why="; ".join(changes),
                    hint="sweep into another folder (-o), or ask for what was swept here",
                )
            self._db.execute("UPDATE sweep SET facts = ?", (json.dumps(facts),))

    def facts(self) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Identity, facts, and when it was begun.

        Raises:
            UsageError: it is of a newer sdopt, or was killed before it began.
        """
        with _told(self._path):
            row = self._db.execute("SELECT schema, identity, facts, began FROM sweep").fetchone()
        if row is None or row[0] > _SCHEMA:
            raise UsageError(
                "this sweep cannot be read",
                where=str(self._path),
                why="it had not begun" if row is None else f"its schema is {row[0]}",
                hint="run it again" if row is None else "use the sdopt that wrote it",
            )
        return json.loads(row[1]), json.loads(row[2]), row[3]

    def add(self, candidate: Candidate, plan: Plan) -> None:
        """Write down that a candidate is to be tried; one that is there stays as it is."""
        one, choices = candidate, json.dumps(dict(candidate.choices))
        tasks = (plan.build, plan.time, plan.probe, plan.rest)
        point = (one.recipe, one.target, one.shape, one.batch, choices)
        with self._writing():
            count = self._db.execute("SELECT COUNT(*) FROM candidate").fetchone()[0]
            self._db.execute(
                "INSERT INTO candidate VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO NOTHING",
                (plan.key, count, *point, *tasks, "pending", ""),
            )

    def settle(self, key: str, state: State, reason: str = "") -> None:
        """Write down what became of a candidate."""
        with self._writing():
            self._db.execute(
                "UPDATE candidate SET state = ?, reason = ? WHERE key = ?", (state, reason, key)
            )

    def record(self, task: Task, outcome: Outcome) -> None:
        """Write down what came of a task, with its images; a second time is an error.

        Raises:
            StorageError: it was recorded before, or the file cannot be written.
        """
        plain = outcome.to_json()
        failure = outcome.failure
        with self._writing():
            self._db.execute(
                "INSERT INTO outcome VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    outcome.key,
                    task.kind,
                    task.label,
                    json.dumps(dict(task.work)),
                    json.dumps(plain["data"]),
                    json.dumps(plain["files"]),
                    json.dumps(plain["failure"]),
                    failure.kind if failure is not None else "",
                    outcome.seconds,
                    json.dumps(plain["here"]),
                    json.dumps(plain["beside"]),
                    outcome.attempts,
                    outcome.finished,
                ),
            )
            images = outcome.data.get("images", ()) if task.kind == "score" else ()
            columns = ("prompt", "seed", "text", "path", "digest", "score")
            self._db.executemany(
                "INSERT INTO sample VALUES (?,?,?,?,?,?,?)",
                [(outcome.key, *(one[name] for name in columns)) for one in images],
            )

    def forget(self, keys: Sequence[str]) -> None:
        """Remove outcomes that are to be come to again."""
        with self._writing():
            for table, column in (("outcome", "key"), ("sample", "task")):
                marks = [(key,) for key in keys]
                self._db.executemany(f"DELETE FROM {table} WHERE {column} = ?", marks)

    def outcomes(self) -> dict[str, Outcome]:
        """What came of every task so far, by key."""
        columns = "key, data, files, failure, seconds, here, beside, attempts, finished"
        with _told(self._path):
            rows = self._db.execute(f"SELECT {columns} FROM outcome").fetchall()
        found = {}
        for key, data, files, failure, seconds, here, beside, attempts, finished in rows:
            failed = json.loads(failure)
            found[key] = Outcome(
                key,
                json.loads(data),
                tuple(json.loads(files)),
                Failure(**failed) if failed else None,
                seconds,
                json.loads(here),
                tuple(json.loads(beside)),
                attempts,
                finished,
            )
        return found

    def candidates(self) -> list[Row]:
        """The candidates in the order they were tried."""
        columns = "recipe,target,shape,batch,choices,key,build,time,probe,rest,state,reason"
        with _told(self._path):
            rows = self._db.execute(
                f"SELECT {columns} FROM candidate ORDER BY position"
            ).fetchall()
        return [
            Row(
                Candidate(recipe, target, shape, batch, json.loads(choices)),
                Plan(*rest[:5]),
                *rest[5:],
            )
            for recipe, target, shape, batch, choices, *rest in rows
        ]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with _told(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite or the disk says, as an error of ours."""
    try:
        yield
    except SdoptError:
        raise
    except OSError as error:
        raise storage_error(error, f"write {path}") from error
    except sqlite3.Error as error:
        raise StorageError(
            "the record of the sweep cannot be used",
            where=str(path),
            why=str(error),
            hint="free some space; if the file is damaged, sweep into another folder",
        ) from error


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _changes(then: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *then]):
            yield from _changes(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name} was {_short(then)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
