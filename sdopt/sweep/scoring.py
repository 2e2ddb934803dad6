"""The task ``score``: images of some prompts from given seeds, and what a scorer makes of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdopt import registry
from sdopt.bundle import RAW, Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.evaluating import scoring
from sdopt.evaluating.gallery import Gallery, deciding
from sdopt.evaluating.gallery import Task as Drawn
from sdopt.evaluating.hands import Order, draw
from sdopt.evaluating.prompts import Prompt
from sdopt.evaluating.scorers import Scorer, load_function
from sdopt.runtime.session import choose_stages, digest_of
from sdopt.sweep.place import IMAGES, Place
from sdopt.sweep.records import Found, Task
from sdopt.targets.base import Target

if TYPE_CHECKING:
    from PIL.Image import Image

DISTANCE = "distance"
"""The scorer that holds an image against the raw graph's: 1 less the RMS of what differs, of 1."""


def do(task: Task, place: Place) -> Found:
    """Draw prompts with a build and score the images.

    ``work``: ``build`` the key of the build's task, empty for the raw stage as it is; ``target``,
    ``shape``, ``batch``; ``drawing``: steps, guidance, scheduler, negative; ``prompts`` as pairs
    of index and text; ``seeds``; ``scorer``: its ``kind``, ``place``, ``digest``; ``reference``:
    the keys of the tasks that drew the raw graph's images. Found: ``images``, each with
    ``prompt``, ``text``, ``seed``, ``path``, ``digest``, ``score``.

    Raises:
        UsageError: the scorer failed, or is another one here.
        SdoptError: see ``sdopt.runtime.generate.generate``.
    """
    work = task.work
    bundle = Bundle.open(place.bundle)
    target, stage = _runner(work, place)
    stages = choose_stages(bundle, target, stage, image_to_image=False)
    height, width = (int(one) for one in work["shape"].split("x"))
    options = {**work["drawing"], "width": width, "height": height}
    settings = {**options, "target": str(target)}
    prompts = [Prompt(index, text) for index, text in work["prompts"]]
    found: list[dict[str, Any]] = []
    for seed in work["seeds"]:
        folder = place.images(task.key) / str(seed)
        gallery = Gallery(folder, deciding(bundle, stages, {**settings, "seed": seed}))
        tasks = gallery.tasks(prompts, 1, seed)
        order = Order(bundle.path, {**options, "stage": stage}, digest_of(stages), gallery.images)
        if missing := gallery.missing(tasks):
            for finished in draw(order, missing, work["batch"], [str(target)]):
                gallery.add(finished)
        scores = _scores(gallery, tasks, work, place, seed)
        for one in tasks:
            line = gallery.finished(one)
            found.append(
                {
                    "prompt": one.prompt.index,
                    "text": one.prompt.text,
                    "seed": one.seed,
                    "path": str((gallery.images / one.name).relative_to(place.root)),
                    "digest": line.digest if line is not None else "",
                    "score": scores.get(one.name),
                }
            )
    return Found({"images": found}, tuple(one["path"] for one in found))


def single_threaded(target: Target) -> Target:
    """The target on one thread, where it has threads: workers draw side by side."""
    if hasattr(target, "threads") and target.cuda_device() is None:
        return dataclasses.replace(target, threads=1)  # type: ignore[call-arg]
    return target


def scorer_of(kind: str, place: str) -> Scorer | None:
    """The scorer ``clip`` at a folder or the ``function`` at FILE.py:FUNCTION; None for others.

    Raises:
        UsageError: there is none, or it cannot be loaded.
    """
    return _scorer(kind, place) if kind in ("clip", "function") else None


@functools.cache
def _scorer(kind: str, place: str) -> Scorer:
    if kind == "function":
        return load_function(place)
    from sdopt.evaluating.clip import ClipScorer

    return ClipScorer(place)


def _runner(work: Mapping[str, Any], place: Place) -> tuple[Target, str]:
    """What opens the graphs, and the stage."""
    target: Target = single_threaded(registry.make("targets", work["target"]))
    if not work["build"]:
        return target, RAW
    build = place.finished(work["build"])
    if build is None:
        raise BundleError("what is to be drawn with is not here", where=str(place.root))
    stage = str(build.data["stage"])
    return dataclasses.replace(target, stage=stage), stage


def _scores(
    gallery: Gallery, tasks: Sequence[Drawn], work: Mapping[str, Any], place: Place, seed: int
) -> Mapping[str, float]:
    asked = work["scorer"]
    if asked["kind"] == DISTANCE:
        if not work["reference"]:
            return {}  # the raw graph's own images
        folders = [place.images(key) / str(seed) / IMAGES for key in work["reference"]]
        return {one.name: _likeness(gallery.images / one.name, folders) for one in tasks}
    scorer = scorer_of(asked["kind"], asked["place"])
    if scorer is None:
        return {}
    if scorer.digest != asked["digest"]:
        raise UsageError(
            "the scorer is not the one that the sweep began with",
            where=asked["place"],
            why=f"its digest was {asked['digest']}, is {scorer.digest}",
            hint="put the same files at the same path on every machine",
        )
    return scoring.score(gallery, tasks, scorer, lambda what, share: None)


def _likeness(path: Path, folders: Sequence[Path]) -> float:
    """1 less the root mean square of the difference to the reference, both from 0 to 1."""
    other = next((one / path.name for one in folders if (one / path.name).is_file()), None)
    if other is None:
        raise BundleError("the raw graph's image is not here", where=str(folders[0] / path.name))
    gap = _pixels(path) - _pixels(other)
    return 1.0 - float(np.sqrt(np.mean(gap * gap)))


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image as Pillow

    with Pillow.open(path) as opened:
        image: Image = opened.convert("RGB")
    return np.asarray(image, np.float64) / 255
