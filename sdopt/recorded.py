"""Recorded inputs of components: a folder of ``.npz`` files and an index that says what they are.

The index is the commit: files carry the digest of their content in their name, so a recording
that is made again beside an older one leaves that whole until the index is renamed over it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdopt import datafile, reading
from sdopt.errors import BundleError, storage_error
from sdopt.manifest import read_object

FOLDER = "recorded"
"""The folder of a bundle that its recordings lie in."""
INDEX = "index.json"
HOW = "record some: sdopt record BUNDLE --prompts FILE --steps N"

_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError)
"""What zipfile says of archives that are damaged, of a later version, or encrypted."""
_SCHEMA = 1
_DIGITS = 16


@dataclass(frozen=True)
class Sample:
    """What one call of a component was given.

    Attributes:
        file: the ``.npz`` beside the index, an array per input.
        digest: of that file's bytes.
        component: the component's name (``unet``).
        inputs: dtype and shape of each input.
        prompt: what was drawn.
        seed: of that image.
        step: of the denoising, from 0; None for components that run once.
        timestep: the value that the scheduler handed over; likewise.
    """

    file: str
    digest: str
    component: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    prompt: str
    seed: int
    step: int | None = None
    timestep: float | None = None


@dataclass(frozen=True)
class Origin:
    """The graph that a component's samples were recorded from."""

    stage: str
    digest: str


@dataclass(frozen=True)
class Recording:
    """A folder of samples.

    Attributes:
        folder: where they lie.
        key: a digest of everything that decided what was recorded.
        settings: steps, guidance, size, scheduler, ... of the run.
        origins: component to the stage that was run.
        samples: in the order they came.
    """

    folder: Path
    key: str
    settings: Mapping[str, Any]
    origins: Mapping[str, Origin]
    samples: tuple[Sample, ...] = field(repr=False)

    def of(self, inputs: frozenset[str]) -> tuple[Sample, ...]:
        """The samples that feed exactly those inputs."""
        return tuple(one for one in self.samples if inputs == one.inputs.keys())

    def counts(self) -> dict[str, int]:
        """Component to its number of samples."""
        counts = dict.fromkeys(self.origins, 0)
        for one in self.samples:
            counts[one.component] = counts.get(one.component, 0) + 1
        return counts

    def load(self, sample: Sample) -> dict[str, np.ndarray]:
        """The arrays of one sample.

        Raises:
            BundleError: its file is missing, or is not what was recorded.
        """
        path = self.folder / sample.file
        try:
            if os.path.realpath(path) != os.path.join(os.path.realpath(self.folder), sample.file):
                raise ValueError("it is a link to another file")  # noqa: TRY301
            data = path.read_bytes()
            if digest_of(data) != sample.digest:
                raise ValueError("its bytes are not those that were recorded")  # noqa: TRY301
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return {name: _array(archive, name) for name in sample.inputs}
        except (OSError, ValueError, KeyError, *_ZIP_ERRORS) as error:
            raise BundleError(
                "a recorded sample cannot be read", where=str(path), why=str(error), hint=HOW
            ) from error


def digest_of(data: bytes) -> str:
    """The digest of a recorded file's bytes."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def index_digest(path: str | Path) -> str:
    """The digest of a recording: of its index, which holds the digest of every sample.

    Raises:
        BundleError: there is no recording.
    """
    return digest_of(_read(_index(path)))


def open_recording(path: str | Path) -> Recording:
    """The recording in a folder (or whose index that is); no sample is read.

    Raises:
        BundleError: there is none, or it was written by a newer sdopt.
    """
    index = _index(path)
    data = read_object(_read(index).decode("utf-8", "replace"), str(index))
    try:
        samples = tuple(_sample(one) for one in data["samples"])
        origins = {
            name: Origin(**reading.fields(Origin, one)) for name, one in data["origins"].items()
        }
        key, settings = str(data["key"]), dict(data["settings"])
        return Recording(index.parent, key, settings, origins, samples)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            "this is no index of recorded samples", where=str(index), why=str(error), hint=HOW
        ) from error


class Writer:
    """Writes samples as they come; nothing but the last one is held."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"make {folder}") from error
        self._folder = folder
        self._samples: list[Sample] = []
        self._known: set[tuple[str, str]] = set()

    def add(self, component: str, arrays: Mapping[str, np.ndarray], **facts: Any) -> None:
        """Write one sample, unless the component was given the very same before.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **dict(arrays))
        data = buffer.getvalue()
        digest = digest_of(data)
        if (component, digest) in self._known:
            return
        self._known.add((component, digest))
        file = f"{component}-{digest}.npz"
        datafile.write_bytes(self._folder / file, data)
        inputs = {name: (str(one.dtype), one.shape) for name, one in arrays.items()}
        self._samples.append(Sample(file, digest, component, inputs, **facts))

    def commit(
        self, key: str, settings: Mapping[str, Any], origins: Mapping[str, Origin]
    ) -> Recording:
        """Write the index, and remove the files of an earlier recording or a killed one."""
        made = Recording(self._folder, key, settings, origins, tuple(self._samples))
        index = {
            "schema": _SCHEMA,
            "key": key,
            "settings": dict(settings),
            "origins": {name: asdict(one) for name, one in origins.items()},
            "samples": [asdict(one) for one in made.samples],
        }
        datafile.write_bytes(self._folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        used = {one.file for one in made.samples}
        for path in self._folder.glob("*.npz*"):
            if path.name.lstrip(".") not in used:
                path.unlink(missing_ok=True)
        return made


def _index(path: str | Path) -> Path:
    place = reading.user_path(path)
    return place if place.name == INDEX else place / INDEX


def _read(index: Path) -> bytes:
    try:
        return index.read_bytes()
    except OSError as error:
        raise BundleError(
            "there are no recorded samples here",
            where=str(index.parent),
            why=error.strerror or str(error),
            hint=HOW,
        ) from error


def _sample(data: dict[str, Any]) -> Sample:
    found = reading.fields(Sample, data)
    inputs = {name: (kind, tuple(shape)) for name, (kind, shape) in found["inputs"].items()}
    one = Sample(**{**found, "inputs": inputs})
    if Path(one.file).name != one.file or "\0" in one.file:
        raise ValueError(f"the file {one.file!r} leaves the folder")
    return one


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an ``.npz`` as ``Writer`` makes them, which allocates no more than is there.

    ``numpy.load`` allocates what a header claims before it reads, and inflates without limit.

    Raises:
        ValueError: it was made otherwise, or is cut short.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    stream = io.BytesIO(archive.read(info))
    version = np.lib.format.read_magic(stream)
    headers = np.lib.format
    read = headers.read_array_header_1_0 if version == (1, 0) else headers.read_array_header_2_0
    shape, _, dtype = read(stream)
    left = len(stream.getbuffer()) - stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"{name} holds {left} bytes, its header says {shape} of {dtype}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
