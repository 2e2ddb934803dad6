"""The folder of one stage's images: what decides them, which are finished, what they show."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdopt import datafile
from sdopt.bundle import Bundle, Stage
from sdopt.errors import UsageError, storage_error
from sdopt.evaluating.ledger import Ledger
from sdopt.evaluating.prompts import Prompt
from sdopt.manifest import read_object

IMAGES, INFO, RUN, DONE = "images", "image_info.json", "run.json", "images.jsonl"
KEY = "evaluation"
"""The text of a PNG that says what decided it: how a file that no line tells of is known."""
STRIDE = 1_000_000
"""Between the seeds of two images of one prompt; a file has fewer prompts."""

_SCHEMA = 1
_DIGITS = 16


@dataclass(frozen=True)
class Task:
    """One image to be drawn.

    Attributes:
        prompt: what of.
        number: which of that prompt's images, from 0.
        seed: what it is drawn from; does not depend on how many others there are.
        key: a digest of everything that decides the image.
    """

    prompt: Prompt
    number: int
    seed: int
    key: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.prompt.index}_{self.number}.png"


@dataclass(frozen=True)
class Finished:
    """A line of the record of finished images.

    Attributes:
        image: the file's name.
        prompt: what it shows.
        key: of the task.
        digest: of the file's bytes.
        seconds: it took, its share of a batch; None where a kill came between file and line.
    """

    image: str
    prompt: str
    key: str
    digest: str
    seconds: float | None


def digest_of(data: bytes) -> str:
    """The digest of an image file's bytes."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def deciding(bundle: Bundle, stages: Mapping[str, Stage], settings: Mapping[str, Any]) -> Any:
    """Everything that decides what a prompt and a seed become, as plain data."""
    files = [bundle.path / "model_index.json"]
    files += [
        path for part in ("scheduler", "tokenizer*") for path in bundle.path.glob(f"{part}/*")
    ]
    files += [bundle.folder(name) / "config.json" for name in stages]
    state = hashlib.sha256()
    for path in sorted(filter(Path.is_file, files)):
        state.update(f"{path.relative_to(bundle.path)}\0".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    graphs = {name: f"{one.name} {one.digest}" for name, one in sorted(stages.items())}
    return {
        "settings": dict(settings),
        "stages": graphs,
        "configuration": state.hexdigest()[:_DIGITS],
    }


class Gallery:
    """A folder of images that one stage drew with one set of settings.

    Args:
        folder: made where it is missing.
        decides: what ``deciding`` gave; the folder takes images of nothing else.

    Raises:
        UsageError: there are images in it that something else decided.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, decides: Mapping[str, Any]) -> None:
        self.folder, self.images = folder, folder / IMAGES
        self._decides = decides
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            for left in self.images.glob(".*.png.tmp*"):
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        except OSError as error:
            raise storage_error(error, f"make {self.images}") from error
        run = folder / RUN
        # Where nothing was drawn, whatever was asked for before binds nobody.
        if run.is_file() and any(self.images.glob("*.png")):
            self._check(read_object(run.read_text("utf-8"), str(run)))
        else:
            data = {"schema": _SCHEMA, **decides}
            datafile.write_bytes(run, (json.dumps(data, indent=1) + "\n").encode())
        self._ledger = Ledger(folder / DONE)
        self._finished = {line["image"]: Finished(**line) for line in self._ledger.lines}

    def tasks(self, prompts: Iterable[Prompt], count: int, seed: int) -> list[Task]:
        """All images that are wanted, ``count`` per prompt, the first one of each before all."""
        settings = json.dumps(self._decides, sort_keys=True)

        def task(prompt: Prompt, number: int) -> Task:
            own = seed + prompt.index + number * STRIDE
            text = json.dumps([settings, prompt.text, own])
            return Task(prompt, number, own, digest_of(text.encode()))

        chosen = list(prompts)
        return [task(prompt, number) for number in range(count) for prompt in chosen]

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Those whose image is not there, or is not what was drawn.

        A file that a kill left without a line is taken for finished if it says so itself.

        Raises:
            UsageError: an image of another prompt has the name.
        """
        found: list[Finished] = []
        missing: list[Task] = []
        for task in tasks:
            line, data = self._finished.get(task.name), self._bytes(task)
            if line is not None and line.key != task.key:
                raise UsageError(
                    f"prompt {task.prompt.index} is not what {task.name} shows",
                    where=str(self.folder),
                    why=f"that is {line.prompt!r}, not {task.prompt.text!r}",
                    hint="the prompts have changed: evaluate into another folder (-o)",
                )
            if data is None or (line is not None and line.digest != digest_of(data)):
                missing.append(task)
            elif line is None and self._key_in(task) == task.key:
                digest = digest_of(data)
                found.append(Finished(task.name, task.prompt.text, task.key, digest, None))
            elif line is None:
                missing.append(task)
        self.add(found)
        return missing

    def add(self, finished: Sequence[Finished]) -> None:
        """Write down that images are finished; their files are there."""
        if finished:
            self._ledger.append(asdict(one) for one in finished)
            self._finished.update((one.image, one) for one in finished)

    def finished(self, task: Task) -> Finished | None:
        """What is known of a finished image."""
        return self._finished.get(task.name)

    def write_info(self, tasks: Sequence[Task]) -> None:
        """Write image_info.json: per prompt its images, paths from that file, and its category."""
        rows: dict[int, dict[str, Any]] = {}
        for task in sorted(tasks, key=lambda one: (one.prompt.index, one.number)):
            if task.name in self._finished:
                prompt = task.prompt
                empty = {"images": [], "prompt": prompt.text, "category": prompt.category}
                row = rows.setdefault(prompt.index, empty)
                row["images"].append(f"{IMAGES}/{task.name}")
        text = json.dumps(list(rows.values()), ensure_ascii=False, indent=1) + "\n"
        datafile.write_bytes(self.folder / INFO, text.encode())

    def _bytes(self, task: Task) -> bytes | None:
        path = self.images / task.name
        return path.read_bytes() if path.is_file() else None

    def _key_in(self, task: Task) -> str | None:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.images / task.name) as image:
                image.load()
                return str(image.info.get(KEY))
        except (UnidentifiedImageError, OSError, SyntaxError):
            return None  # no image: somebody put it there, and it is drawn

    def _check(self, known: Mapping[str, Any]) -> None:
        changes = list(_changes(known, self._decides))
        if changes:
            raise UsageError(
                "the images in this folder were drawn otherwise",
                where=os.fspath(self.folder),
                why="; ".join(changes),
                hint="evaluate into another folder (-o), or ask for what was drawn here",
            )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*now, *then]):
        one, other = then.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other)
        elif one != other and name != "schema":
            yield f"{name} was {one}, is {other}"
