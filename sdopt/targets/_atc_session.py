"""Running an .om model: an adapter to Ascend's runtime, which only their machines have.

Nothing here has run on an NPU. What an ``.om`` is opened with is a ``Device``: named inputs and
outputs in the order of the graph, and a call that computes. By default that is Ascend's ais_bench,
whose ``InferSession(device, path)`` loads a model through ACL; anything with the same three
methods serves as well, and is handed to ``OmSession``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdopt.errors import BuildError, MissingDependencyError
from sdopt.session import Port, checked_feeds

Signature = Sequence[tuple[str, str, Sequence[int]]]
"""Per input or output its name, numpy's name of its type, and its sizes; -1 where gears differ."""


class Device(Protocol):
    """A loaded model."""

    def inputs(self) -> Signature:
        """What it takes, in order."""

    def outputs(self) -> Signature:
        """What it gives, in order."""

    def infer(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Compute; arrays are contiguous, in the declared types and order."""


class OmSession:
    """An .om file on a device."""

    def __init__(self, path: Path, device: Device | None = None) -> None:
        self._where = str(path)
        self._device = device or _ais_bench(path)
        self.inputs: Mapping[str, Port] = _ports(self._device.inputs())
        self.outputs: Mapping[str, Port] = _ports(self._device.outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; float feeds are cast to the declared dtype.

        Raises:
            UsageError: feeds that are not the model's inputs.
            BuildError: the device gave another number of outputs than it declares.
        """
        ready = checked_feeds(self.inputs, feeds, self._where)
        arrays = self._device.infer([ready[name] for name in self.inputs])
        if len(arrays) != len(self.outputs):
            raise BuildError(
                f"the device gave {len(arrays)} outputs, not {len(self.outputs)}",
                where=self._where,
            )
        return dict(zip(self.outputs, map(np.asarray, arrays), strict=True))


def _ports(signature: Signature) -> dict[str, Port]:
    return {
        name: Port(
            np.dtype(dtype),
            tuple(f"{name}_{axis}" if size < 0 else size for axis, size in enumerate(sizes)),
        )
        for name, dtype, sizes in signature
    }


def _ais_bench(path: Path) -> Device:
    try:
        from ais_bench.infer.interface import InferSession  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingDependencyError(
            "an .om model runs on Ascend's NPUs only, through their ais_bench",
            where=str(path),
            why=str(error),
            hint="install CANN and ais_bench on that machine; compare the lowered graph here",
        ) from error
    return _AisBench(InferSession(0, str(path)))


class _AisBench:
    """ais_bench's session as a ``Device``."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def inputs(self) -> Signature:
        return [(one.name, str(one.datatype), one.shape) for one in self._session.get_inputs()]

    def outputs(self) -> Signature:
        return [(one.name, str(one.datatype), one.shape) for one in self._session.get_outputs()]

    def infer(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        dynamic = any(size < 0 for _, _, sizes in self.inputs() for size in sizes)
        return list(self._session.infer(list(arrays), mode="dymdims" if dynamic else "static"))
