"""The verbs as functions: no printing, no argument parsing; each returns a report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import registry
from sdopt.bundle import OPTIMIZED, RAW, Bundle
from sdopt.errors import UsageError
from sdopt.exporting import export
from sdopt.inspection import inspect
from sdopt.packing import pack
from sdopt.pipeline import Pipeline
from sdopt.report import Progress, Report
from sdopt.staging import Job, optimize_file

if TYPE_CHECKING:
    from sdopt.compare import Comparison
    from sdopt.recorded import Recording
    from sdopt.runtime.generate import Generated

__all__ = [
    "build",
    "compare",
    "export",
    "inspect",
    "optimize",
    "optimize_file",
    "pack",
    "record",
    "run",
]


def optimize(
    bundle: str | Path,
    passes: str,
    *,
    components: Sequence[str] | None = None,
    source: str = RAW,
    stage: str = OPTIMIZED,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run passes over a bundle's components and commit the result as a stage.

    Args:
        bundle: the bundle's directory.
        passes: a spec such as ``fuse_qkv,tome=5``, or the path of a recipe file.
        components: which ones; all by default. A pass skips components it is not for.
        source: the stage to start from.
        stage: the stage to write; weights that did not change are shared with ``source``.
        seed: of passes that draw.
        force: run although the stage is there with the same digest of everything that decides it.
        dry_run: rewrite in memory and report, write nothing.
        progress: is told what is being done.

    Raises:
        SdoptError: see the subclasses; what existed before is whole in every case.
    """
    opened, pipeline = Bundle.open(bundle), Pipeline.parse(passes)
    if not re.fullmatch(r"\w[\w.-]*", stage):
        raise UsageError(
            f"{stage!r} is no name for a stage",
            hint="use letters, digits, dots, dashes and underscores",
        )
    if stage in (source, RAW):
        raise UsageError(
            f"the stage {stage!r} cannot be written by optimize",
            why="a stage is made from another one; the raw one is what export wrote",
            hint=f"choose another name: --stage {OPTIMIZED}",
        )
    job = Job(opened, pipeline, source, stage, seed, force, dry_run, progress)
    return job.run("optimize", components)


def build(
    bundle: str | Path,
    target: str,
    *,
    components: Sequence[str] | None = None,
    source: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Lower a bundle's components for a target, commit the artifact, and prove that it opens.

    ``source`` defaults to the optimized stage where there is one, else the raw one.
    """
    opened, chosen = Bundle.open(bundle), registry.make("targets", target)
    chosen.check_available()
    pipeline = Pipeline.parse(chosen.wants)
    job = Job(
        opened, pipeline, source, chosen.stage_name(), 0, force, dry_run, progress, target=chosen
    )
    return job.run("build", components)


def run(bundle: str | Path, prompts: Sequence[str], **options: Any) -> Iterator[Generated]:
    """Make images from prompts; see ``sdopt.runtime.generate.generate`` for the options."""
    from sdopt.runtime.generate import generate

    images: Iterator[Generated] = generate(bundle, prompts, **options)
    return images


def record(bundle: str | Path, prompts: Sequence[str], **options: Any) -> Recording:
    """Keep what components are given while they draw; see ``sdopt.runtime.recording.record``."""
    from sdopt.runtime import recording

    return recording.record(bundle, prompts, **options)


def compare(a: str, b: str, **options: Any) -> Comparison:
    """Compare what two things compute; see ``sdopt.compare.compare`` for the options."""
    from sdopt import compare as comparing

    return comparing.compare(a, b, **options)
