"""Both halves of classifier-free guidance at once: one session each, on two devices.

diffusers doubles the batch for guidance, the unconditional half first. Split along axis 0 the
halves are independent, so two sessions may compute them at the same time; the runtimes leave
Python's lock while they compute, and two threads are enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sdopt.errors import UsageError
from sdopt.runtime.session import Opener
from sdopt.session import Port, Session, checked_feeds

HALVES = 2


class Halves:
    """Two sessions of one graph as one that takes the doubled batch.

    An input whose first axis is the batch is split in two, everything else goes to both. A call
    of a batch without halves (guidance is off) goes to the first session whole.

    Args:
        sessions: what computes the first and the second half; one session twice computes them in
            turn.
        where: the stage, for errors.
    """

    def __init__(self, sessions: Sequence[Session], where: str) -> None:
        first, second = sessions
        self._sessions, self._where = (first, second), where
        self._pool = ThreadPoolExecutor(HALVES, thread_name_prefix="sdopt-half")
        self._batch = _batch_of(first.inputs, where)
        self._split = [n for n, p in first.inputs.items() if p.dims[:1] == (self._batch,)]
        self.inputs: Mapping[str, Port] = _of_any_batch(first.inputs, self._batch)
        self.outputs: Mapping[str, Port] = _of_any_batch(first.outputs, self._batch)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute both halves and put them together again.

        Raises:
            UsageError: feeds that are not the graph's inputs, or a batch that is neither the
                graph's fixed one nor twice that.
            BuildError: the runtime failed in one of them.
        """
        arrays = checked_feeds(self.inputs, feeds, self._where)
        size = len(arrays[self._split[0]])
        if isinstance(self._batch, str):
            has_halves = size % HALVES == 0
        elif size in (self._batch, HALVES * self._batch):
            has_halves = size != self._batch
        else:
            raise UsageError(
                f"this stage computes a batch of {self._batch} or twice that, not {size}",
                where=self._where,
                hint="run the stage that cfg_parallel was applied to: --stage NAME",
            )
        if not has_halves:
            return self._sessions[0].run(arrays)
        parts = [
            {
                name: np.split(one, HALVES)[index] if name in self._split else one
                for name, one in arrays.items()
            }
            for index in range(HALVES)
        ]
        first, second = self._computed(parts)
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    def _computed(self, parts: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        one, other = self._sessions
        if one is other:
            return [one.run(part) for part in parts]
        jobs = [self._pool.submit(s.run, p) for s, p in zip(self._sessions, parts, strict=True)]
        return [job.result() for job in jobs]


def targets_for(target: Opener, devices: str) -> list[Opener]:
    """The target once per device of ``0,1`` or ``cpu,cpu``; one device is the target there.

    Raises:
        UsageError: more than two devices, or a target that has no devices to choose from.
    """
    names = [name.strip() for name in devices.split(",")]
    if not all(names) or len(names) > HALVES:
        raise UsageError(
            f"--device cannot be {devices!r}",
            why="guidance has two halves: one device, or two of them",
            hint="--device 0,1, or --device cpu,cpu",
        )
    choose = getattr(target, "on_device", None)
    if choose is None:
        raise UsageError(
            f"the target {target} has no devices to choose from", hint="leave out --device"
        )
    return [choose(name) for name in names]


def on_halves(sessions: Sequence[Session], *, halved: bool, where: str) -> Session:
    """A denoiser on one or two devices, as one session of the doubled batch.

    ``halved`` says that the stage went through ``cfg_parallel``.

    Raises:
        UsageError: two devices and a graph whose fixed batch is the doubled one.
    """
    if len(sessions) == 1 and not halved:
        return sessions[0]
    if not halved and isinstance(size := _batch_of(sessions[0].inputs, where), int):
        raise UsageError(
            f"this graph has a fixed batch of {size}, and a device would get half of it",
            where=where,
            hint="halve it first: sdopt optimize --passes cfg_parallel",
        )
    return Halves([sessions[0], sessions[-1]], where)


def _batch_of(ports: Mapping[str, Port], where: str) -> int | str:
    """The size, or the name, of the batch axis: the first one of the image-like input."""
    images = [port for port in ports.values() if len(port.dims) == 4]
    if not images:
        raise UsageError("no input of this graph is [B, C, H, W]", where=where)
    return images[0].dims[0]


def _of_any_batch(ports: Mapping[str, Port], batch: int | str) -> dict[str, Port]:
    """The ports with a batch that is not fixed: the halves' and the doubled one both fit."""
    return {
        name: Port(port.dtype, ("batch", *port.dims[1:])) if port.dims[:1] == (batch,) else port
        for name, port in ports.items()
    }
