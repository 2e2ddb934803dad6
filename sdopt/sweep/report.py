"""Reads a sweep's folder and tells of it as a table, as data, or as a Parquet file."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdopt.errors import MissingDependencyError
from sdopt.evaluating.figures import mean
from sdopt.sweep.frontier import Values, on_frontier, values_of
from sdopt.sweep.records import Outcome
from sdopt.sweep.result import Point, Result, Sample
from sdopt.sweep.settings import Settings
from sdopt.sweep.store import FILE, WORK, Row, Store
from sdopt.units import size

_LIMIT = 8
"""Notes that are given at most of each kind."""


def load(folder: str | Path) -> Result:
    """What a sweep has found so far, also while it runs.

    Raises:
        UsageError: there is no sweep in the folder.
        StorageError: its file cannot be read.
    """
    root = Path(folder)
    store = Store(root / FILE)
    try:
        identity, facts, began = store.facts()
        rows, outcomes = store.candidates(), store.outcomes()
    finally:
        store.close()
    settings = Settings.from_json(identity["settings"])
    points = [_point(row, outcomes, settings, facts) for row in rows]
    result = Result(
        folder=root,
        work=root / WORK,
        bundle=facts["bundle"],
        origin=facts["origin"],
        settings=_told(settings),
        axes=settings.axes,
        scorer=settings.scoring.name,
        engine=facts["engine"],
        command=facts["command"],
        date=began,
        points=(),
        notes=tuple(_notes(points)),
    )
    return dataclasses.replace(result, points=tuple(_marked(points, settings.axes)))


def table(result: Result) -> list[list[str]]:
    """Rows for people, heads first; points of the frontier have a ``*``."""
    heads = ["", "recipe", "target", "size", "batch", "ms", "memory", "score", "state"]
    rows = []
    for one in result.points:
        score = "" if one.score is None else f"{one.score:.4f}"
        score += "" if one.score_error is None else f" ± {one.score_error:.4f}"
        rows.append(
            [
                "*" if one.frontier else "",
                one.name,
                one.target,
                one.shape,
                str(one.batch),
                "" if one.ms is None else f"{one.ms:.1f}",
                "" if one.memory_bytes is None else size(one.memory_bytes),
                score,
                f"{one.state}: {one.reason}" if one.reason else one.state,
            ]
        )
    return [heads, *rows]


def export(result: Result, path: str | Path) -> None:
    """Write the points as Parquet, a row each, with machine, versions and every round.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "a Parquet file needs pyarrow",
            why=str(error),
            hint="pip install pyarrow; the SQLite file holds the same",
        ) from error
    rows = []
    for one in result.points:
        plain = dataclasses.asdict(one)
        versions = one.here.get("versions", {})
        plain |= {"machine": one.here.get("cpu"), "cards": list(one.here.get("cards", ()))}
        plain |= {"versions": [f"{name} {number}" for name, number in versions.items()]}
        plain |= {name: [f"{k}={v}" for k, v in plain[name].items()] for name in _TABLES}
        rows.append({name: value for name, value in plain.items() if name != "here"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), Path(path))


_TABLES = ("choices", "digests")


def values(row: Row, outcomes: Mapping[str, Outcome], axes: Sequence[str]) -> Values | None:
    """What is known of a candidate on every axis, by the images that were drawn so far."""
    found: dict[str, float] = {}
    if (timed := outcomes.get(row.plan.time)) is not None and timed.ok:
        found = {k: timed.data[k] for k in ("ms", "memory_bytes") if timed.data[k] is not None}
    if scores := _scores(row, outcomes):
        found["score"] = statistics.fmean(map(statistics.fmean, scores.values()))
    return found if all(axis in found for axis in axes) else None


def _point(
    row: Row, outcomes: Mapping[str, Outcome], settings: Settings, facts: Mapping[str, Any]
) -> Point:
    one, plan = row.candidate, row.plan
    timed, built = outcomes.get(plan.time), outcomes.get(plan.build)
    scores = _scores(row, outcomes)
    score = mean([statistics.fmean(some) for some in scores.values()]) if scores else None
    found = Point(
        key=plan.key,
        recipe=one.recipe,
        target=one.target,
        shape=one.shape,
        batch=one.batch,
        choices=one.choices,
        state=row.state,
        reason=row.reason,
        score=score.mean if score is not None else None,
        score_error=score.error if score is not None else None,
        prompts=len(scores),
        samples=tuple(
            Sample(x["prompt"], x["text"], x["seed"], x["path"], x["score"])
            for x in _images(row, outcomes)
        ),
        here=next((o.here for k in (plan.time, plan.probe) if (o := outcomes.get(k))), {}),
        digests=built.data["graphs"] if built is not None and built.ok else {},
        command=_command(row, settings, facts),
    )
    if timed is None or not timed.ok:
        return found
    return dataclasses.replace(
        found,
        ms=timed.data["ms"] if "ms" in settings.axes else None,
        rounds=tuple(timed.data["rounds"]),
        denoiser_ms=timed.data["denoiser_ms"],
        memory_bytes=timed.data["memory_bytes"],
        beside=timed.beside,
    )


def _marked(points: Sequence[Point], axes: Sequence[str]) -> Iterator[Point]:
    """The points with those on the frontier of their size marked; all prompts count for it."""
    done = [one for one in points if one.state == "done"]
    best: set[str] = set()
    for shape in {one.shape for one in done}:
        known = {one.key: values_of(one, axes) for one in done if one.shape == shape}
        best |= on_frontier({k: v for k, v in known.items() if v is not None}, axes)
    for one in points:
        yield dataclasses.replace(one, frontier=one.key in best)


def _images(row: Row, outcomes: Mapping[str, Outcome]) -> Iterator[Mapping[str, Any]]:
    for key in (row.plan.probe, row.plan.rest):
        if (found := outcomes.get(key)) is not None and found.ok:
            yield from found.data["images"]


def _scores(row: Row, outcomes: Mapping[str, Outcome]) -> dict[int, list[float]]:
    """The scores of the images by prompt."""
    found: dict[int, list[float]] = {}
    for one in _images(row, outcomes):
        if one["score"] is not None:
            found.setdefault(one["prompt"], []).append(one["score"])
    return found


def _command(row: Row, settings: Settings, facts: Mapping[str, Any]) -> str:
    """One line that measures a point again, and nothing else."""
    one, typed = row.candidate, facts["typed"]
    usual = {field.name: field.default for field in dataclasses.fields(Settings)}
    words = ["sdopt", "sweep", facts["bundle"], "--passes", one.recipe, "--target", one.target]
    words += ["--shapes", one.shape, "--batch", str(one.batch)]
    words += [word for words_of_one in typed for word in words_of_one]
    for name in ("steps", "guidance", "scheduler", "rounds", "pause"):
        if (value := getattr(settings, name)) != usual[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--negative", settings.negative] * bool(settings.negative)
    words += ["--measure", ",".join(settings.measure)] * (settings.measure != usual["measure"])
    words += ["--probe", "0", "-o", f"point-{row.plan.key}"]
    return shlex.join(words)


def _told(settings: Settings) -> dict[str, Any]:
    """The settings, short enough for a line."""
    plain = settings.to_json()
    plain = {name: value for name, value in plain.items() if name not in ("scoring", "measure")}
    return {
        **plain,
        "prompts": len(settings.prompts),
        "seeds": ",".join(map(str, settings.seeds)),
    }


def _notes(points: Sequence[Point]) -> Iterator[str]:
    """What a reader should know before believing a difference."""
    timed = [one for one in points if one.ms is not None]
    machines = {(one.here["cpu"], tuple(one.here["cards"])) for one in timed}
    if len(machines) > 1:
        told = "; ".join(", ".join((cpu, *cards)) for cpu, cards in sorted(machines))
        yield f"points were timed on {len(machines)} kinds of machine, do not compare them: {told}"
    beside = [one for one in timed if one.beside]
    for one in beside[:_LIMIT]:
        yield f"{one.name}, {one.shape}, batch {one.batch}: timed beside {'; '.join(one.beside)}"
    if len(beside) > _LIMIT:
        yield f"and {len(beside) - _LIMIT} more were timed beside other work"
