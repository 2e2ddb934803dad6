"""The verb ``report``: measure, fill the page, write the file."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sdopt import provenance
from sdopt.bundle import Bundle
from sdopt.drawing.page import Page, require
from sdopt.errors import UsageError
from sdopt.machine import machine
from sdopt.report import Progress, part
from sdopt.reporting import benched, evaluated
from sdopt.reporting.costs import costs
from sdopt.reporting.gather import gather
from sdopt.reporting.numbers import numbers
from sdopt.reporting.overview import overview
from sdopt.reporting.passes import passes
from sdopt.reporting.samples import Drawing, samples

_PACKAGES = ("onnx", "onnx-ir", "numpy", "onnxruntime", "torch", "diffusers", "transformers")
"""What decides the numbers and images of the page."""


@dataclass(frozen=True)
class Options:
    """What the page shows.

    Attributes:
        components: which ones; all by default.
        stages: those shown in full, compared and drawn with; all by default.
        compare: whether outputs are measured.
        images: whether images are drawn.
        drawing: which.
        benchmark: the JSON of an ``sdopt bench``, whose tables and charts are shown.
        evaluation: the folder of an ``sdopt eval``, whose scores and images are shown.
    """

    components: Sequence[str] | None = None
    stages: Sequence[str] | None = None
    compare: bool = True
    images: bool = True
    drawing: Drawing = field(default_factory=Drawing)
    benchmark: Path | None = None
    evaluation: Path | None = None


@dataclass(frozen=True)
class Written:
    """A page that was written; ``notes`` say what could not be computed here."""

    file: Path
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def report(
    bundle: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Written:
    """Write one self-contained HTML page about a bundle; see ``sdopt.api.report``.

    Raises:
        BundleError: no bundle there.
        UnknownNameError: a component or stage that is not there.
        UsageError: the output's folder, the benchmark or the evaluation is not there, or numbers
            that cannot be.
        MissingDependencyError: jinja2 or vl-convert-python is not installed.
        StorageError: the page cannot be written.
    """
    start, wanted, path = time.perf_counter(), options or Options(), Path(output)
    opened = Bundle.open(bundle)
    require()
    _check(path, wanted)
    times = benched.read(wanted.benchmark) if wanted.benchmark is not None else None
    scores = evaluated.read(wanted.evaluation) if wanted.evaluation is not None else None
    tell = part(progress, 0, 1)
    all_ = gather(opened, wanted.components, wanted.stages)
    page = Page(f"sdopt report: {opened.path.resolve().name}", *_lead())
    overview(page, all_)
    passes(page, all_)
    costs(page, all_)
    notes: list[str] = []
    if wanted.compare:
        notes += numbers(page, all_, wanted.drawing.seed, part(tell, 0, 2))
    if wanted.images:
        notes += samples(page, all_, wanted.drawing, part(tell, 1, 2))
    if times is not None:
        benched.benchmark(page, opened, times)
    if scores is not None:
        evaluated.evaluation(page, opened, scores)
    page.write(path)
    return Written(path, path.stat().st_size, time.perf_counter() - start, tuple(notes))


def _check(path: Path, wanted: Options) -> None:
    """Refuse before anything is measured what would fail after it."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(
            "the page cannot be written there",
            where=str(path),
            why="it is a folder" if path.is_dir() else "its folder does not exist",
            hint="name a file: -o report.html",
        )
    if wanted.images and wanted.drawing.steps < 1:
        raise UsageError("images take at least one step", hint="--steps 8, or --no-images")


def _lead() -> list[str]:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = provenance.installed(*_PACKAGES)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"Written on {now}, on {machine()}; Python {platform.python_version()}, {told}.",
        "Numbers and images were measured then and there. What making the stages cost comes from "
        "the reports beside them, which say when and where. Nothing in this page asks a server.",
    ]
