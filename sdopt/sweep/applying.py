"""Makes of the bundle itself what a point of a sweep was measured with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sdopt import building, registry
from sdopt.bundle import RAW, Bundle
from sdopt.pipeline import Pipeline
from sdopt.report import Progress, Report, part
from sdopt.shapes import parse_batch
from sdopt.staging import Job
from sdopt.sweep.result import Point


def apply(
    bundle: str | Path, point: Point, name: str, progress: Progress | None = None
) -> list[Report]:
    """Optimize the raw stage by the point's recipe, and build the result for its target.

    Args:
        bundle: that was swept.
        point: of the sweep.
        name: of the build; the stage that it is made from is called ``NAME-stage``.
        progress: is told what is being done.

    Returns:
        The reports of both; of the raw graph's build alone.

    Raises:
        SdoptError: see ``sdopt.api.optimize`` and ``build``; what was there before is whole.
    """
    opened = Bundle.open(bundle)
    target = dataclasses.replace(registry.make("targets", point.target), stage=name)
    target.stage_name()  # refuses what can be no name before anything is made
    reports, source = [], RAW
    if point.recipe:
        source = f"{name}-stage"
        pipeline, tell = Pipeline.parse(point.recipe), part(progress, 0, 2, "optimize")
        job = Job(opened, pipeline, RAW, source, 0, force=False, dry_run=False, progress=tell)
        reports.append(job.run("optimize", None))
    plan = building.Plan(point.shape, parse_batch(str(point.batch)))
    tell = part(progress, 1, 2, "build")
    reports.append(building.build(opened, target, plan, source=source, progress=tell))
    return reports
