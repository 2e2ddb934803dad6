"""Runs a sweep: asks for candidates, has tasks run, writes down outcomes, gives some up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt import datafile, locking
from sdopt.bundle import RAW, Bundle
from sdopt.errors import UsageError
from sdopt.packing import pack
from sdopt.report import Progress
from sdopt.sweep import provenance, report
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.engines.base import Engine
from sdopt.sweep.frontier import Values, beats
from sdopt.sweep.place import RAW_FILES, Place
from sdopt.sweep.planning import Planner
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.result import Result
from sdopt.sweep.sampling import Sampling
from sdopt.sweep.settings import Settings
from sdopt.sweep.space import Space
from sdopt.sweep.store import FILE, PASSING, WORK, Row, Store

EngineMaker = Callable[[Place], Engine]
"""Makes an engine for the driver's place; the sweep opens it."""


@dataclass(frozen=True)
class Typed:
    """What was typed, so that the results can say how to come to them again.

    Attributes:
        command: the whole line.
        words: options of prompts, seeds and scorer with their values.
    """

    command: str = ""
    words: tuple[tuple[str, ...], ...] = ()


def run(
    bundle: str | Path,
    folder: str | Path,
    space: Space,
    settings: Settings,
    *,
    sampling: Sampling | None = None,
    engine: EngineMaker,
    typed: Typed | None = None,
    progress: Progress | None = None,
) -> Result:
    """Sweep a bundle; what is in the folder of an earlier run is not measured again.

    Args:
        bundle: its raw stages are what recipes are applied to.
        folder: of the results.
        space: what may be tried; checked whole before anything runs.
        settings: what all points have in common.
        sampling: which points are tried; all by default.
        engine: makes what runs the tasks, given the driver's place.
        typed: what was typed.
        progress: is told how far it is.

    Raises:
        UsageError: another sweep is in the folder, or another process sweeps into it.
        SdoptError: something in the space cannot be; what a single recipe meets is recorded.
    """
    opened, root = Bundle.open(bundle), Path(folder)
    _refuse_inside(opened, root)
    sampler = (sampling or Sampling()).make(space, settings.axes)
    planner = Planner(opened, settings)
    with locking.alone_in(root, "sweeps"):
        store = Store(root / FILE, writes=True)
        try:
            place = Place(root / WORK)
            identity = {"bundle": planner.base, "settings": settings.deciding()}
            facts = _facts(opened, typed or Typed())
            store.begin(identity, facts, provenance.now())
            _copy(opened, planner.components, place)
            with engine(place) as running:
                store.begin(identity, {**facts, "engine": running.label}, provenance.now())
                sweep = _Sweep(store, place, planner, settings, running, progress)
                while candidates := sampler.ask():
                    found = sweep.round(candidates)
                    for one in candidates:
                        sampler.tell(one, found.get(one))
        finally:
            store.close()
    return report.load(root)


class _Sweep:
    """A sweep while it runs."""

    def __init__(
        self,
        store: Store,
        place: Place,
        planner: Planner,
        settings: Settings,
        engine: Engine,
        progress: Progress | None,
    ) -> None:
        self._store, self._place, self._planner = store, place, planner
        self._settings, self._engine = settings, engine
        self._tell = progress or (lambda what, share: None)
        self._rows: dict[str, Row] = {}
        known = store.outcomes()
        again = [key for key, one in known.items() if not self._holds(one)]
        store.forget(again)
        self._known = {key: one for key, one in known.items() if key not in again}

    def round(self, candidates: Sequence[Candidate]) -> dict[Candidate, Values]:
        """Try some candidates; what each that was not given up came to."""
        plans = self._planner.plan(candidates)
        for one, plan in zip(candidates, plans, strict=True):
            self._store.add(one, plan)
        recorded = {row.plan.key: row for row in self._store.candidates()}
        rows = [recorded[plan.key] for plan in plans]
        self._rows |= {row.plan.key: row for row in rows}
        # A candidate that was given up by an earlier run stays so: its images are not wanted.
        self._run([key for row in rows for key in (row.plan.time, row.plan.probe) if key])
        open_rows = [row for row in rows if row.state != "stopped" and not self._failed(row)]
        stopped = self._give_up(open_rows) if self._settings.probes else {}
        for key, reason in stopped.items():
            self._store.settle(key, "stopped", reason)
        going = [row for row in open_rows if row.plan.key not in stopped]
        self._run([row.plan.rest for row in going if row.plan.rest])
        found: dict[Candidate, Values] = {}
        for row in rows:
            if failed := self._failed(row):
                self._store.settle(row.plan.key, "failed", str(failed.failure))
            elif row in going:
                self._store.settle(row.plan.key, "done")
                value = report.values(row, self._known, self._settings.axes)
                if value is not None:
                    found[row.candidate] = value
        return found

    def _run(self, keys: Sequence[str]) -> None:
        """Have tasks done, and before them what they need."""
        tasks = self._with_needs(keys)
        total = len(tasks)
        done = 0

        def on_done(task: Task, outcome: Outcome) -> None:
            nonlocal done
            done += 1
            self._store.record(task, outcome)
            self._known[task.key] = outcome
            self._tell(f"{done} of {total}: {task.kind} {task.label}", done / total)

        if tasks:
            self._engine.run(tasks, self._known, on_done)

    def _with_needs(self, keys: Sequence[str]) -> list[Task]:
        """Tasks that are not done, each behind those that it needs."""
        found: dict[str, Task] = {}

        def visit(key: str) -> None:
            if key in found or key in self._known:
                return
            task = self._planner.tasks[key]
            for need in task.needs:
                visit(need)
            found[key] = task

        for key in keys:
            visit(key)
        return list(found.values())

    def _failed(self, row: Row) -> Outcome | None:
        """The first thing that failed of a candidate."""
        keys = (row.plan.build, row.plan.time, row.plan.probe, row.plan.rest)
        return next((o for key in keys if (o := self._known.get(key)) and not o.ok), None)

    def _give_up(self, rows: Sequence[Row]) -> dict[str, str]:
        """Those that another of their size beats on every axis after the first prompts: why."""
        axes = self._settings.axes
        known = {
            key: (row, found)
            for key, row in self._rows.items()
            if (found := self._after_probe(row)) is not None
        }
        stopped = {}
        for row in rows:
            if row.plan.key not in known:
                continue
            _, mine = known[row.plan.key]
            for other, its in known.values():
                if other.candidate.shape == row.candidate.shape and beats(its, mine, axes):
                    stopped[row.plan.key] = (
                        f"after {self._settings.probe} prompts worse on every axis than "
                        f"{other.candidate.recipe or 'raw'} on {other.candidate.target}, "
                        f"batch {other.candidate.batch}"
                    )
                    break
        return stopped

    def _after_probe(self, row: Row) -> Values | None:
        """A candidate's values by the first prompts alone, which all have drawn."""
        keys = (row.plan.time, row.plan.probe)
        some: Mapping[str, Outcome] = {k: self._known[k] for k in keys if k in self._known}
        return report.values(row, some, self._settings.axes)

    def _holds(self, outcome: Outcome) -> bool:
        """Whether an outcome stands: its files are there, and it did not fail by chance."""
        if outcome.failure is not None:
            return outcome.failure.kind not in PASSING
        return all((self._place.root / one).is_file() for one in outcome.files)


def _facts(bundle: Bundle, typed: Typed) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "origin": bundle.manifest.origin,
        "engine": "",
        "command": typed.command,
        "typed": [list(one) for one in typed.words],
        "here": dict(provenance.here()),
    }


def _copy(bundle: Bundle, components: Sequence[str], place: Place) -> None:
    """Put the raw stages where the sweep works, if they are not there: whole, or not at all."""
    if place.bundle.is_dir():
        return
    scratch = place.root / ".bundle"
    if scratch.exists():
        shutil.rmtree(scratch)  # of a run that was killed
    pack(bundle.path, scratch, components=components, stage=RAW)
    files = sorted(one.relative_to(scratch) for one in scratch.rglob("*") if one.is_file())
    text = json.dumps([str(place.bundle.relative_to(place.root) / one) for one in files])
    datafile.write_bytes(place.root / RAW_FILES, text.encode())
    scratch.rename(place.bundle)


def _refuse_inside(bundle: Bundle, root: Path) -> None:
    """Refuse to work in the bundle itself, which is copied whole.

    Raises:
        UsageError: the folder is in it.
    """
    if root.resolve().is_relative_to(bundle.path.resolve()):
        raise UsageError(
            "a sweep works beside its bundle, not in it",
            where=str(root),
            why=f"that is inside of {bundle.path}",
            hint="choose another folder: -o ../sweep",
        )
