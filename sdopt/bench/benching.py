"""One run: the memory of each row, then components and whole images in turns."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdopt.bench import components, images, memory
from sdopt.bench.machine import machine
from sdopt.bench.report import BenchReport
from sdopt.bench.rows import Contestant, contestants, plan_of
from sdopt.bench.settings import DEFAULT_PROMPTS, Settings
from sdopt.bench.tables import ComponentBench, ImageBench, Row
from sdopt.bench.timing import Turns
from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.report import Progress, part


def bench(
    bundle: str | Path | Bundle,
    *,
    stages: Sequence[str] = (),
    targets: str | Sequence[str] = "ort",
    components: Sequence[str] | None = None,
    shapes: str = "",
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    recorded: str | Path | None = None,
    rounds: int = 20,
    warm_up: int = 3,
    pause: float = 0.1,
    images: bool | None = None,
    image_rounds: int = 5,
    memory: bool = True,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    steps: int = 25,
    guidance: float = 7.5,
    scheduler: str | None = None,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> BenchReport:
    """Measure stages on targets side by side: per component, per image, and in memory.

    Rows, each a stage on a target, take turns: A, B, C, A, B, C. Ratios are to the first row.

    Args:
        bundle: the bundle or its directory.
        stages: by name; by default the raw one, the optimized one and the targets' builds.
        targets: specs such as ``ort:threads=2``. One with a compiler runs its own build only.
        components: which ones; all by default, and then whole images too.
        shapes: one HEIGHTxWIDTH in pixels; the model's own by default.
        batch: images at once; a denoiser computes twice that where guidance is on.
        dims: size of axes that neither decides, by name.
        recorded: a folder of ``sdopt record``, whose samples components are fed in turn.
        rounds: that count, of each component.
        warm_up: rounds before those; whole images have one.
        pause: seconds of rest before each turn, so that a row's idle threads do not slow the next.
        images: whether whole images are timed; by default where the bundle draws from a prompt
            and no components were named.
        image_rounds: that count, of whole images.
        memory: whether each row also runs in a process of its own, to see what it takes.
        prompts: of the images, in turn.
        steps: of denoising.
        guidance: scale; 1 or less turns classifier-free guidance off.
        scheduler: a short name; the bundle's by default.
        seed: of the inputs and of the first image.
        command: what was typed, for the report.
        progress: is told what is being measured.

    Raises:
        UsageError: a number, size or stage that cannot be, or images of a bundle that draws none.
        UnknownNameError: no such component, stage or target.
        MissingDependencyError: a target's packages are not installed.
        BundleError: there is no bundle, or no recording.
        BuildError: a target refuses a graph, or there is nothing here that it runs on.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    settings = Settings(
        stages=tuple(stages),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        components=tuple(components or ()),
        shapes=shapes,
        batch=batch,
        dims=dict(dims or {}),
        recorded=str(recorded) if recorded is not None else "",
        rounds=rounds,
        warm_up=warm_up,
        pause=pause,
        images=images,
        image_rounds=image_rounds,
        memory=memory,
        prompts=tuple(prompts),
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        seed=seed,
    )
    return _Run(opened, settings, progress).report(command)


class _Run:
    """What is known of one run while it goes on."""

    def __init__(self, bundle: Bundle, settings: Settings, progress: Progress | None) -> None:
        self._bundle, self._settings, self._progress = bundle, settings, progress
        self._names = settings.components or bundle.components
        for name in self._names:
            bundle.entry(name)
        self._rows = contestants(bundle, settings.stages, settings.targets, self._names)
        self._drawing, self._notes = self._drawers()
        self._notes += [
            f"{name}: the stage {stage.name} is stale: its source has changed since"
            for row in self._rows
            for name, stage in row.stages.items()
            if bundle.is_stale(stage)
        ]
        self._check_recording()
        self._check_dims()

    def report(self, command: str) -> BenchReport:
        """Measure everything."""
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        here = machine(one for row in self._rows for one in row.target.packages.values())
        jobs = [name for name in self._names if self._with(name)]
        total = len(jobs) + bool(self._drawing) + self._settings.memory
        taken = {}
        if self._settings.memory:  # first, while this process holds no model
            tell = part(self._progress, 0, total, "memory")
            for index, row in enumerate(self._rows):
                tell(row.label, index / len(self._rows))
                whole = row in self._drawing
                taken[row.label] = memory.measure(self._bundle, row, self._settings, whole=whole)
        first = int(self._settings.memory)
        found = [
            self._component(name, part(self._progress, first + index, total, name))
            for index, name in enumerate(jobs)
        ]
        drawn = self._images(part(self._progress, total - 1, total, "images"))
        self._notes += [
            f"{label}: memory was not measured: {one.why}"
            for label, one in taken.items()
            if one.why
        ]
        self._notes += _noise(found, drawn)
        return BenchReport(
            bundle=str(self._bundle.path),
            origin=self._bundle.manifest.origin,
            family=self._bundle.manifest.family,
            date=began,
            command=command,
            settings=self._settings.to_json(),
            machine=here,
            rows=tuple(
                Row(
                    row.label,
                    row.stage,
                    row.text,
                    {name: stage.digest for name, stage in row.stages.items()},
                    taken.get(row.label),
                )
                for row in self._rows
            ),
            components=tuple(found),
            images=drawn,
            notes=tuple(self._notes),
        )

    def _with(self, component: str) -> list[Contestant]:
        return [row for row in self._rows if component in row.stages]

    def _component(self, name: str, tell: Progress) -> ComponentBench:
        rows, settings = self._with(name), self._settings
        absent = [row.label for row in self._rows if name not in row.stages]
        if absent:
            self._notes.append(
                f"{name} has no stage of {', '.join(absent)}; ratios are to {rows[0].label}"
            )
        turns = Turns(settings.rounds, settings.warm_up, settings.pause)
        found = components.measure(self._bundle, name, rows, settings, turns, tell)
        if settings.recorded and not found.feeds.startswith("recorded"):
            self._notes.append(f"{name}: nothing was recorded for it, it is fed seeded inputs")
        if any(plan_of(row.stages[name]) for row in rows):
            self._notes.append(
                f"{name}: what companions compute once per prompt or timestep is kept between "
                "calls, as between the steps of an image"
            )
        return found

    def _images(self, tell: Progress) -> ImageBench | None:
        if not self._drawing:
            return None
        turns = Turns(self._settings.image_rounds, 1, self._settings.pause)
        return images.measure(self._bundle, self._drawing, self._settings, turns, tell)

    def _drawers(self) -> tuple[list[Contestant], list[str]]:
        """The rows whose images are timed, and notes on those that are not.

        Raises:
            UsageError: images were asked for, and the bundle draws none.
        """
        asked = self._settings.images
        if asked is False or (asked is None and self._settings.components):
            return [], []
        if why := images.cannot_draw(self._bundle):
            if asked:
                raise UsageError(
                    "whole images cannot be timed", where=str(self._bundle.path), why=why
                )
            return [], [f"whole images were not timed: {why}"]
        parts = images.drawing(self._bundle)
        rows = [
            row
            for row in self._rows
            if any(row.stage in self._bundle.stages(name) for name in parts)
        ]
        return rows, [
            f"{row.label}: no image is drawn with it" for row in self._rows if row not in rows
        ]

    def _check_recording(self) -> None:
        """See that something was recorded for what is measured.

        Raises:
            UsageError: nothing was.
            BundleError: there is no recording.
        """
        recording = self._settings.recording()
        if recording and not {one.component for one in recording.samples} & {*self._names}:
            raise UsageError(
                f"nothing was recorded for {', '.join(self._names)}",
                where=self._settings.recorded,
                why=f"it holds {', '.join(recording.counts()) or 'nothing'}",
                hint="leave out --recorded, or record a run of this bundle",
            )

    def _check_dims(self) -> None:
        """See that every axis that was given a size is one of something that is measured.

        Raises:
            UsageError: naming those that there are.
        """
        if not self._settings.dims:
            return
        known = {
            str(dim.value)
            for row in self._rows
            for stage in row.stages.values()
            for value in stage.load().graph.inputs
            for dim in value.shape or ()
            if not isinstance(dim, int)
        }
        if unknown := self._settings.dims.keys() - known:
            raise UsageError(
                f"no input has a dimension {', '.join(sorted(unknown))}",
                hint=f"dynamic dimensions: {', '.join(sorted(known)) or 'none'}",
            )


def _noise(found: Sequence[ComponentBench], drawn: ImageBench | None) -> list[str]:
    """A note for every row whose slowest rounds are far from its middle."""
    tables: list[tuple[str, Any]] = [(one.component, one) for one in found]
    if drawn is not None:
        tables.append(("images", drawn))
    return [
        f"noisy: {name} of {row.row} has a p95 of {row.spread.p95:.3g} {table.unit} beside a p50 "
        f"of {row.spread.p50:.3g}; trust the ratios more than the times"
        for name, table in tables
        for row in table.rows
        if row.spread.noisy
    ]
