"""Scores of images, each kept as soon as it is known; another scorer's lie beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.errors import BundleError
from sdopt.evaluating.figures import Scores
from sdopt.evaluating.gallery import Gallery, Task
from sdopt.evaluating.ledger import Ledger
from sdopt.evaluating.scorers import Scorer
from sdopt.report import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "scores"
BATCH = 16
"""Images scored at once, and written down at once."""


def score(
    gallery: Gallery, tasks: Sequence[Task], scorer: Scorer, progress: Progress
) -> dict[str, float]:
    """Score the images that this scorer has not scored yet; gives all scores, by the image's name.

    Raises:
        UsageError: the scorer failed.
        BundleError: an image is gone.
        StorageError: the disk is full or the folder cannot be written.
    """
    folder = gallery.folder / FOLDER
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / f"{scorer.digest}.jsonl")
    if not ledger.lines:
        ledger.append([{"scorer": scorer.name, "digest": scorer.digest}])
    known = {(one["image"], one["digest"]): one["score"] for one in ledger.lines[1:]}
    digests = {task.name: _digest(gallery, task) for task in tasks}
    left = [task for task in tasks if (task.name, digests[task.name]) not in known]
    for first in range(0, len(left), BATCH):
        some = left[first : first + BATCH]
        images = [_open(gallery.images / task.name) for task in some]
        found = scorer.score(images, [task.prompt.text for task in some])
        lines = [
            {"image": task.name, "digest": digests[task.name], "score": value}
            for task, value in zip(some, found, strict=True)
        ]
        ledger.append(lines)
        known |= {(line["image"], line["digest"]): line["score"] for line in lines}
        done = first + len(some)
        progress(f"scored {done} of {len(left)}", done / len(left))
    return {name: float(known[name, digest]) for name, digest in digests.items()}


def by_prompt(tasks: Sequence[Task], scores: Mapping[str, float]) -> Scores:
    """The scores of some tasks, by the prompt's index."""
    found: dict[int, list[float]] = {}
    for task in tasks:
        found.setdefault(task.prompt.index, []).append(scores[task.name])
    return found


def _digest(gallery: Gallery, task: Task) -> str:
    finished = gallery.finished(task)
    if finished is None:
        raise BundleError(
            f"{task.name} is not finished", where=str(gallery.folder), hint="run it again"
        )
    return finished.digest


def _open(path: Path) -> Image:
    from PIL import Image as Pillow

    with Pillow.open(path) as image:
        return image.convert("RGB")
