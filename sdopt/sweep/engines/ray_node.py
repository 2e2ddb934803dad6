"""What runs on the nodes of a Ray cluster: they take files, do tasks, and send files back.

Nothing in this module imports Ray at its top: a driver without it can say so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.sweep import blobs, provenance
from sdopt.sweep.blobs import Blob, Cache
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.tasks import execute

AHEAD = 3
"""Pieces that are under way to a node at once."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Facts:
    """What a node is.

    Attributes:
        node: Ray's id of it.
        machine: tells machines apart that are the same kind; nodes of one machine share it.
        kind: processor, cores and cards: times of two kinds cannot be compared.
        versions: of what decides results.
    """

    node: str
    machine: str
    kind: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Started:
    """A node has begun a task: the first that it says of it; ``at`` is its clock, in seconds."""

    node: str
    at: float


@dataclass(frozen=True)
class Worked:
    """The task is done, and its files and its outcome follow."""

    at: float


@dataclass(frozen=True)
class Sent:
    """A file of the outcome follows, in pieces (``bytes``)."""

    blob: Blob


@dataclass(frozen=True)
class Order:
    """What all tasks of a sweep have in common.

    Attributes:
        sweep: its id, the name of its folder on every node.
        root: the driver's place.
        look: whether to look for the driver's files under their own paths first.
        do: what does a task in a place.
    """

    sweep: str
    root: Path
    look: bool = True
    do: Callable[[Task, Place], Outcome] = execute


def facts() -> Facts:
    """This node."""
    here = provenance.here()
    machine = _BOOT.read_text("utf-8").strip() if _BOOT.is_file() else _node()
    kind = ", ".join([str(here["cpu"]), f"{here['cores']} cores", *here["cards"]])
    return Facts(_node(), machine, kind, provenance.versions())


class Depot:
    """Reads the driver's files, on the driver's machine, for nodes that do not see them.

    Attributes:
        root: the driver's place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fetched: list[tuple[str, str]] = []

    def read(self, blob: Blob, offset: int, node: str) -> bytes:
        """One piece of a file, from an offset in bytes on."""
        if not offset:
            self._fetched.append((node, blob.digest))
        with open(self.root / blob.path, "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), blobs.PIECE, offset)

    def fetched(self) -> list[tuple[str, str]]:
        """Which node has begun to fetch which blob, in order."""
        return list(self._fetched)


def perform(
    task: Task, order: Order, needed: Sequence[Blob], depot: Any
) -> Iterator[Started | Worked | Sent | bytes | Outcome]:
    """Do a task on this node; yields what the driver is to know, the outcome last.

    Args:
        task: what to do.
        order: of the sweep.
        needed: the files that it works on.
        depot: a handle of the actor.
    """
    folder = folder_of(order.sweep)
    place, cache = Place(folder / "place"), Cache(folder / "blobs")

    def read(blob: Blob) -> Iterator[bytes]:
        seen = order.root / blob.path
        if order.look and _is(seen, blob):
            return blobs.pieces(seen)
        return _from_depot(depot, blob)

    cache.place(needed, place, read)
    yield Started(_node(), time.time())
    outcome = order.do(task, place)
    yield Worked(time.time())
    for path in outcome.files:
        file = place.root / path
        blob = Blob(path, blobs.digest_of(file), file.stat().st_size)
        cache.add(blob, file)
        yield Sent(blob)
        yield from blobs.pieces(file)
    yield outcome


def tidy(sweep: str) -> None:
    """Remove what the sweep has left on this node."""
    shutil.rmtree(folder_of(sweep), ignore_errors=True)


def folder_of(sweep: str) -> Path:
    """The folder of a sweep on this node; two nodes of one machine have two."""
    base = Path(tempfile.gettempdir()) / f"sdopt-sweep-{os.getuid()}"
    return base / f"{sweep}-{_node()[:12]}"


def _node() -> str:
    import ray

    found: str = ray.get_runtime_context().get_node_id()
    return found


def _is(file: Path, blob: Blob) -> bool:
    """Whether a file is the blob."""
    try:
        return file.stat().st_size == blob.size and blobs.digest_of(file) == blob.digest
    except OSError:
        return False


def _from_depot(depot: Any, blob: Blob) -> Iterator[bytes]:
    import ray

    coming: deque[Any] = deque()
    for offset in range(0, blob.size, blobs.PIECE):
        if len(coming) == AHEAD:
            yield ray.get(coming.popleft())
        coming.append(depot.read.remote(blob, offset, _node()))
    while coming:
        yield ray.get(coming.popleft())
