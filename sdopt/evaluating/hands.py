"""What draws: one pipeline in this process, or one per worker process and device."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sdopt.errors import BundleError, SdoptError, WorkerError
from sdopt.evaluating.gallery import KEY, Finished, Task, digest_of
from sdopt.report import Progress

_ENDED = 10.0
"""Seconds that a worker whose connection broke has to end by itself."""


@dataclass(frozen=True)
class Order:
    """What every hand of one stage is told.

    Attributes:
        bundle: its path.
        options: of ``sdopt.runtime.generate.prepare``, the target among them.
        digest: of the stages that decided the images' keys.
        folder: of the images.
    """

    bundle: Path
    options: Mapping[str, Any]
    digest: str
    folder: Path


class Hand:
    """One open pipeline that draws tasks into files."""

    def __init__(self, order: Order) -> None:
        from sdopt.runtime.generate import prepare

        self._order = order
        self._drawer = prepare(order.bundle, **order.options)
        if self._drawer.digest() != order.digest:
            raise BundleError(
                "the bundle was changed while images are drawn",
                where=str(order.bundle),
                hint="evaluate again, into another folder (-o)",
            )

    def draw(self, tasks: Sequence[Task], tell: Progress) -> list[Finished]:
        """Draw the tasks as one batch; each file appears whole, and says what decided it."""
        from sdopt.runtime.drawer import save_png

        began = time.perf_counter()
        made = self._drawer.draw(
            [task.prompt.text for task in tasks], [task.seed for task in tasks], tell
        )
        seconds = (time.perf_counter() - began) / len(tasks)
        finished = []
        for task, one in zip(tasks, made, strict=True):
            data = save_png(one, self._order.folder / task.name, {KEY: task.key})
            text = task.prompt.text
            finished.append(Finished(task.name, text, task.key, digest_of(data), seconds))
        return finished


def draw(
    order: Order, tasks: Sequence[Task], batch: int, targets: Sequence[str]
) -> Iterator[list[Finished]]:
    """Draw tasks in batches; yields each batch when its files are there.

    Args:
        order: what all have in common.
        tasks: in the order that they are begun.
        batch: images computed together.
        targets: one is run in this process, several in a process each, which take the next batch
            when they are done with one.

    Raises:
        WorkerError: a worker ended; the others are stopped.
        SdoptError: what the runtime raised, in whichever process.
    """
    batches = [tasks[first : first + batch] for first in range(0, len(tasks), batch)]
    if len(targets) == 1:
        hand = Hand(_with_target(order, targets[0]))
        for one in batches:
            yield hand.draw(one, lambda what, share: None)
        return
    workers = [
        Worker(index, _with_target(order, target))
        for index, target in enumerate(targets[: len(batches)])
    ]
    try:
        yield from _shared_out(workers, batches)
    finally:
        for worker in workers:
            worker.stop()


def _shared_out(
    workers: Sequence[Worker], batches: Sequence[Sequence[Task]]
) -> Iterator[list[Finished]]:
    left = list(reversed(batches))
    busy = {worker.connection: worker for worker in workers}
    for worker in workers:
        worker.give(left.pop())
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            finished = worker.take()
            if left:
                worker.give(left.pop())
            else:
                del busy[worker.connection]
            yield finished


class Worker:
    """A process that draws; it ends by itself when this one does."""

    def __init__(self, index: int, order: Order) -> None:
        self._label = f"worker {index} ({order.options['target']})"
        self._order = order
        ours, theirs = socket.socketpair()
        with theirs:
            words = [sys.executable, "-m", "sdopt.evaluating.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(
                words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.connection = Connection(ours.detach())
        self._send(order)

    def give(self, tasks: Sequence[Task]) -> None:
        """Have a batch drawn."""
        self._send(list(tasks))

    def take(self) -> list[Finished]:
        """The batch that was given; waits for it.

        Raises:
            WorkerError: the process ended.
            SdoptError: it met an error.
        """
        try:
            answer = pickle.loads(self.connection.recv_bytes())  # our own child wrote it
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, SdoptError):
            raise answer
        return list(answer)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, what: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # take() tells how it ended
            self.connection.send_bytes(pickle.dumps(what))

    def _ended(self) -> WorkerError:
        try:
            code = self._process.wait(_ENDED)
        except subprocess.TimeoutExpired:
            code = 0
        ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return WorkerError(
            f"{self._label} ended while it was drawing",
            where=f"process {self._process.pid}, for {self._order.folder}",
            why=f"{ended}; what it printed stands above",
            hint="run it again: finished images stay, and the others are drawn",
        )


def serve(connection: Connection) -> None:
    """What a worker process does: draw what it is told until the connection ends."""
    hand: Hand | None = None
    while True:
        told = pickle.loads(connection.recv_bytes())  # the process that started this one wrote it
        try:
            if isinstance(told, Order):
                hand = Hand(told)
                continue
            assert hand is not None
            answer: object = hand.draw(told, lambda what, share: None)
        except SdoptError as error:
            answer = error
        connection.send_bytes(pickle.dumps(answer))
        if isinstance(answer, SdoptError):
            return


def _with_target(order: Order, target: str) -> Order:
    return Order(order.bundle, {**order.options, "target": target}, order.digest, order.folder)


def watch(parent: int) -> None:
    """End this process as soon as its parent is gone, in the middle of a batch too."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
