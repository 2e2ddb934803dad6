"""Draws many prompts by several stages, scores the images, and says what they come to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import datafile, locking, registry
from sdopt.bundle import Bundle, Stage
from sdopt.errors import UsageError
from sdopt.evaluating import scoring
from sdopt.evaluating.figures import Scores, difference, figures
from sdopt.evaluating.gallery import STRIDE, Gallery, Task, deciding
from sdopt.evaluating.hands import Order, draw
from sdopt.evaluating.prompts import read_prompts
from sdopt.evaluating.results import RESULT, Evaluation, StageResult
from sdopt.evaluating.scorers import Scorer, load_function
from sdopt.report import Progress, part
from sdopt.runtime.generate import DEFAULT_GUIDANCE, DEFAULT_STEPS
from sdopt.runtime.request import check_numbers
from sdopt.runtime.runners import runner_of
from sdopt.runtime.session import Opener, choose_stages, digest_of, opener


@dataclass
class _Job:
    """One stage at work."""

    label: str
    stages: Mapping[str, Stage]
    gallery: Gallery
    tasks: Sequence[Task]
    missing: Sequence[Task] = ()


def evaluate(
    bundle: str | Path | Bundle,
    prompts: str | Path | Sequence[str],
    output: str | Path,
    *,
    stages: Sequence[str] = (),
    clip: str | Path | None = None,
    scorer: str | Scorer | None = None,
    images_per_prompt: int = 1,
    categories: Sequence[str] = (),
    limit: int | None = None,
    negative: str = "",
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    seed: int = 0,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int = 1,
    target: str = "ort",
    device: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw prompts by each stage, from the same seeds, and score the images.

    Image ``j`` of prompt ``i`` of the file is drawn from ``seed + i + 1000000 * j``, so it is the
    same one whatever else is drawn, by whichever worker, and the first of each is what
    ``sdopt run --prompts FILE`` draws. What is finished stays finished: after a kill the same call
    draws only what is missing, and so does one for more prompts or images. Scores are kept per
    scorer.

    Args:
        bundle: the bundle or its directory.
        prompts: a ``.tsv`` as PartiPrompts has it, a text file with one a line, or texts.
        output: the folder.
        stages: to draw with; the newest that fits by default.
        clip: a folder of CLIP (transformers or OpenCLIP): scores by the cosine of image and text.
        scorer: instead of it ``FILE.py:FUNCTION``, ``MODULE:FUNCTION``, or an object.
        images_per_prompt: how many of each.
        categories: only prompts of these.
        limit: only the first so many of them.
        negative: what not to draw.
        steps: of denoising.
        guidance: scale; 1 or less turns classifier-free guidance off.
        seed: see above.
        scheduler: a short name; the bundle's by default.
        width: pixels, a multiple of 8; the model's own by default.
        height: likewise.
        batch: images computed together.
        target: what runs it.
        device: ``0,1``: a process on each, which share the work.
        workers: so many processes without a device of their own.
        progress: is told how far it is.

    Raises:
        UsageError: a value that cannot be, or a folder whose images something else decided.
        WorkerError: a process ended; what it had finished stays.
        BundleError, UnknownNameError, MissingDependencyError, BuildError, StorageError: see
            ``sdopt.runtime.generate.generate``.
    """
    chosen = read_prompts(prompts, categories=categories, limit=limit)
    check_numbers([one.text for one in chosen], steps, seed, images_per_prompt, batch)
    if chosen[-1].index >= STRIDE:
        raise UsageError(f"a file has at most {STRIDE} prompts")
    targets = _targets(target, device, workers)
    judge = _scorer(clip, scorer)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    options = {
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "width": width,
        "height": height,
    }
    settings = {**options, "seed": seed, "target": str(registry.make("targets", target))}
    folder = Path(output)
    with locking.alone_in(folder, "evaluates"):
        jobs = []
        for name, found in _chosen(opened, opener(target), stages).items():
            gallery = Gallery(folder / name, deciding(opened, found, settings))
            tasks = gallery.tasks(chosen, images_per_prompt, seed)
            jobs.append(_Job(name, found, gallery, tasks, gallery.missing(tasks)))
        results: list[StageResult] = []
        first: Scores = {}
        for index, job in enumerate(jobs):
            tell = part(progress, index, len(jobs), job.label)
            given = {**options, "stage": job.label if stages else None}
            order = Order(opened.path, given, digest_of(job.stages), job.gallery.images)
            _draw(job, order, batch, targets, tell)
            results.append(_result(job, judge, first, tell))
            if judge is not None and not first:
                first = scoring.by_prompt(job.tasks, results[0].scores)
        made = Evaluation(
            folder,
            opened.path,
            chosen,
            images_per_prompt,
            settings,
            judge.name if judge else "",
            judge.digest if judge else "",
            tuple(results),
        )
        text = json.dumps(made.to_json(), ensure_ascii=False, indent=1) + "\n"
        datafile.write_bytes(folder / RESULT, text.encode())
    return made


def _targets(target: str, device: str | None, workers: int) -> list[str]:
    """The target of each process; one alone is run in this process."""
    if workers < 1:
        raise UsageError(f"workers must be 1 or more, not {workers}")
    made = registry.make("targets", target)
    if device is None:
        return [str(made)] * workers
    if workers > 1:
        raise UsageError("--device and --workers exclude each other", hint="a worker per device")
    choose = getattr(made, "on_device", None)
    if choose is None:
        raise UsageError(
            f"the target {made} has no devices to choose from", hint="leave out --device"
        )
    return [str(choose(name.strip())) for name in device.split(",")]


def _scorer(clip: str | Path | None, scorer: str | Scorer | None) -> Scorer | None:
    if clip is not None and scorer is not None:
        raise UsageError("one scorer at a time", hint="run it again for the other: images stay")
    if clip is not None:
        from sdopt.evaluating.clip import ClipScorer

        return ClipScorer(clip)
    return load_function(scorer) if isinstance(scorer, str) else scorer


def _chosen(bundle: Bundle, target: Opener, stages: Sequence[str]) -> dict[str, dict[str, Stage]]:
    """The stages of every component, by the name that the images' folder has."""
    if not stages:
        found = choose_stages(bundle, target, None, image_to_image=False)
        return {found[runner_of(bundle).denoiser].name: found}
    return {name: choose_stages(bundle, target, name, image_to_image=False) for name in stages}


def _draw(job: _Job, order: Order, batch: int, targets: Sequence[str], progress: Progress) -> None:
    """Draw what is missing; image_info.json tells of what is there, however this ends."""
    done = len(job.tasks) - len(job.missing)
    try:
        if job.missing:
            for finished in draw(order, job.missing, batch, targets):
                job.gallery.add(finished)
                done += len(finished)
                progress(f"drew {done} of {len(job.tasks)}", done / len(job.tasks))
    finally:
        job.gallery.write_info(job.tasks)


def _result(job: _Job, scorer: Scorer | None, first: Scores, progress: Progress) -> StageResult:
    scores = {} if scorer is None else scoring.score(job.gallery, job.tasks, scorer, progress)
    kinds: dict[str, list[Task]] = {}
    for task in job.tasks if scores else ():
        kinds.setdefault(task.prompt.category, []).append(task)
    of_all = scoring.by_prompt(job.tasks, scores) if scores else {}
    lines = [job.gallery.finished(task) for task in job.tasks]
    times = [one.seconds for one in lines if one is not None and one.seconds is not None]
    return StageResult(
        stage=job.label,
        stages={name: one.name for name, one in job.stages.items()},
        bundle=digest_of(job.stages),
        images=len(job.tasks),
        seconds=statistics.fmean(times) if times else None,
        scores=scores,
        score=figures(of_all) if scores else None,
        categories={
            name: figures(scoring.by_prompt(tasks, scores)) for name, tasks in kinds.items()
        },
        difference=difference(of_all, first) if scores and first else None,
    )
