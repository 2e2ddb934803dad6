"""The task ``stage``: some more passes on the raw stage or on what an earlier task made."""

from __future__ import annotations

import functools
from pathlib import Path

from sdopt import modelfile
from sdopt.bundle import RAW, Bundle
from sdopt.errors import BundleError
from sdopt.pipeline import Pipeline
from sdopt.staging import Job
from sdopt.sweep.place import Place
from sdopt.sweep.records import Found, Task


def do(task: Task, place: Place) -> Found:
    """Make a stage of every component.

    ``work``: ``recipe`` whole and canonical, ``first`` how many of its passes ``source`` has had,
    ``source``, ``stage``, ``components``, ``seed``, and ``reads``, digests of the files that
    options name. Found: ``stage``, and ``digests`` by component.

    Raises:
        BundleError: a file that an option names is another one here.
        SdoptError: a pass refuses.
    """
    work = task.work
    passes = Pipeline.parse(work["recipe"]).passes
    if list(work["reads"]) != (there := Pipeline(passes).reads()):
        raise BundleError(
            "a file that the recipe names is not the one that the sweep began with",
            where=work["recipe"],
            why=f"its digest was {', '.join(work['reads'])}, is {', '.join(there)}",
            hint="put the same file at the same path on every machine",
        )
    pipeline = Pipeline(passes[work["first"] :])
    with place.writing() as waited:
        bundle = Bundle.open(place.bundle)
        job = Job(
            bundle, pipeline, work["source"], work["stage"], work["seed"], False, False, None
        )
        report = job.run("optimize", work["components"])
    digests = {one.component: one.digest for one in report.components}
    files = files_of(bundle, work["stage"], work["components"], place.root)
    return Found({"stage": work["stage"], "digests": digests}, files, waited)


def files_of(
    bundle: Bundle, stage: str, components: list[str] | tuple[str, ...], root: Path
) -> tuple[str, ...]:
    """The files of a stage that the raw one has not, relative to ``root``, graphs last."""
    found: list[Path] = []
    for name in components:
        path = bundle.file(name, stage)
        own = modelfile.files_of(path) - _raw(bundle.file(name, RAW))
        weights_first = sorted(own, key=lambda one: (one.endswith(".onnx"), one))
        found += [path.with_name(one) for one in weights_first]
        found.append(path)
    return tuple(str(one.relative_to(root)) for one in found)


@functools.cache
def _raw(path: Path) -> frozenset[str]:
    """The files of a raw stage, which nobody writes to in a work bundle."""
    return frozenset(modelfile.files_of(path))
