"""Running an engine of TensorRT or TensorRT-RTX on a card.

Written against the documented API of TensorRT 10 and 11, TensorRT-RTX 1.7 and CUDA 12 and 13. The
tests run it with both modules substituted: no card has executed it in this repository's CI.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdopt.errors import BuildError, UsageError
from sdopt.session import Port, checked_feeds
from sdopt.targets._cuda import Cuda
from sdopt.targets._trt_refit import refit

CONTEXTS = 8
"""Sets of shapes that keep their execution context and graph; the longest unused one goes."""

DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""``DataType`` of both libraries to numpy; ``trt.nptype`` knows no bfloat16."""

Shapes = tuple[tuple[int, ...], ...]


class DeviceMemory:
    """Scratch memory for activations that several engines share, since one runs at a time."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.address, self.size = cuda, 0, 0

    def reserve(self, size: int) -> None:
        """Have at least ``size`` bytes; a larger block has another address."""
        if size > self.size:
            self._cuda.synchronize()
            self._cuda.free(self.address)
            self.address, self.size = self._cuda.allocate(size), size

    def close(self) -> None:
        """Give it back."""
        self._cuda.free(self.address)
        self.address = self.size = 0


@dataclass
class Bound:
    """One set of input shapes: its execution context and, once captured, its graph."""

    context: Any
    outputs: dict[str, tuple[int, ...]]
    runs: int = 0
    graph: Any = None
    captured: tuple[int, ...] = field(default=())
    """The addresses that the graph was captured with."""


class TrtSession:
    """An engine, opened; see ``Session``. Shapes are any that one of its profiles allows.

    There is one execution context for each set of shapes, all on the same activation memory, as
    NVIDIA advises where graphs are captured: a context whose shapes change would invalidate its
    graph. The first run of a set of shapes goes without a graph, because the libraries may still
    compile kernels in it; the second captures; later ones replay. A graph is captured again where
    an address has changed since.

    Args:
        path: the engine's file; it is mapped, not read.
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        cuda: the card; the first one by default.
        memory: activation memory shared with other sessions; its own by default.
        cuda_graph: capture and replay.
        weights: initializers of the lowered graph that the engine gets in place of its own.
        graph: that graph's file.

    Raises:
        UsageError: weights for an engine that was built without ``refit``.
        BuildError: the engine is of another library version or card, or there is no card.
    """

    def __init__(
        self,
        path: Path,
        trt: Any,
        *,
        cuda: Cuda | None = None,
        memory: DeviceMemory | None = None,
        cuda_graph: bool = True,
        weights: Mapping[str, ir.TensorProtocol] | None = None,
        graph: Path | None = None,
    ) -> None:
        self._where, self._trt = str(path), trt
        self._cuda = cuda or Cuda()
        self._log, self._kept, self._engine = _load(path, trt)
        if weights and graph is not None:
            refit(trt, self._kept[0], self._engine, weights, graph, self._log)
        self._owned = memory is None
        self._memory = memory or DeviceMemory(self._cuda)
        self._graphs = cuda_graph
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs: Mapping[str, Port] = {name: self._port(name) for name in given}
        self.outputs: Mapping[str, Port] = {n: self._port(n) for n in names if n not in given}
        self._buffers: dict[str, tuple[int, int]] = {}
        self._bound: OrderedDict[Shapes, Bound] = OrderedDict()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output into new arrays, which the caller owns.

        Raises:
            UsageError: feeds that are not the engine's inputs, or of a size outside its profiles.
            BuildError: the library or CUDA failed.
        """
        arrays = checked_feeds(self.inputs, feeds, self._where)
        bound = self.activate({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            self._cuda.upload(self._buffers[name][0], array)
        self._launch(bound)
        found = {
            name: np.empty(shape, self.outputs[name].dtype)
            for name, shape in bound.outputs.items()
        }
        for name, array in found.items():
            self._cuda.download(array, self._buffers[name][0])
        self._cuda.synchronize()
        return found

    def activate(self, shapes: Mapping[str, tuple[int, ...]]) -> Bound:
        """Have context, activation memory and buffers for these input shapes.

        Raises:
            UsageError: no profile of the engine allows them.
        """
        key = tuple(shapes[name] for name in self.inputs)
        if key not in self._bound:
            while len(self._bound) >= CONTEXTS:
                self._drop(self._bound.popitem(last=False)[1])
            self._bound[key] = self._context(dict(zip(self.inputs, key, strict=True)))
        self._bound.move_to_end(key)
        bound = self._bound[key]
        for name, shape in {**dict(zip(self.inputs, key, strict=True)), **bound.outputs}.items():
            port = self.inputs.get(name) or self.outputs[name]
            self._reserve(name, int(np.prod(shape, dtype=np.int64)) * port.dtype.itemsize)
        return bound

    def close(self) -> None:
        """Give everything back that is on the card; shared memory stays."""
        for bound in self._bound.values():
            self._drop(bound)
        self._bound.clear()
        for address, _ in self._buffers.values():
            self._cuda.free(address)
        self._buffers.clear()
        if self._owned:
            self._memory.close()

    def _launch(self, bound: Bound) -> None:
        """Put one inference on the stream: as kernels, or as the graph of them."""
        self._memory.reserve(int(self._engine.device_memory_size_v2))
        addresses = (self._memory.address, *(address for address, _ in self._buffers.values()))
        if bound.captured != addresses:
            bound.context.set_device_memory(self._memory.address, self._memory.size)
            for name, (address, _) in self._buffers.items():
                bound.context.set_tensor_address(name, address)
            if bound.graph is not None:
                self._cuda.forget(bound.graph)
                bound.graph = None
            bound.captured = addresses
        if self._graphs and bound.runs and bound.graph is None and self._capturable(bound):
            bound.graph = self._cuda.capture(lambda: self._enqueue(bound))
        bound.runs += 1
        if bound.graph is not None:
            self._cuda.launch(bound.graph)
        else:
            self._enqueue(bound)

    def _enqueue(self, bound: Bound) -> None:
        if not bound.context.execute_async_v3(self._cuda.stream_handle):
            raise BuildError(
                "the engine failed", where=self._where, why=self._log.errors() or None
            )

    def _capturable(self, bound: Bound) -> bool:
        """RTX alone says it: while kernels for new shapes are compiled, nothing is captured."""
        asked = getattr(bound.context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(self._cuda.stream_handle))

    def _context(self, shapes: dict[str, tuple[int, ...]]) -> Bound:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BuildError(
                "the engine makes no execution context",
                where=self._where,
                why=self._log.errors() or None,
            )
        profile = self._profile(shapes)
        context.set_optimization_profile_async(profile, self._cuda.stream_handle)
        self._cuda.synchronize()
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        if missing := context.infer_shapes():
            raise BuildError(f"the engine wants to know more of {', '.join(missing)}")
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}
        return Bound(context, outputs)

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that allows the shapes."""
        known = []
        for index in range(self._engine.num_optimization_profiles):
            limits = {name: self._engine.get_tensor_profile_shape(name, index) for name in shapes}
            if all(
                low <= size <= high
                for name, (lows, _, highs) in limits.items()
                for low, size, high in zip(lows, shapes[name], highs, strict=True)
            ):
                return index
            known.append(
                "; ".join(f"{n} {tuple(v[0])} to {tuple(v[2])}" for n, v in limits.items())
            )
        given = "; ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(
            f"the engine was not built for {given}",
            where=self._where,
            why=f"its profiles are: {' | '.join(known)}",
            hint="build it with --shapes and --batch that include this size",
        )

    def _reserve(self, name: str, size: int) -> None:
        address, capacity = self._buffers.get(name, (0, 0))
        if size > capacity or name not in self._buffers:
            self._cuda.synchronize()
            self._cuda.free(address)
            self._buffers[name] = (self._cuda.allocate(max(size, 1)), size)

    def _drop(self, bound: Bound) -> None:
        if bound.graph is not None:
            self._cuda.forget(bound.graph)

    def _port(self, name: str) -> Port:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise BuildError(f"{name} is of the type {kind}, which numpy has not")
        shape = self._engine.get_tensor_shape(name)
        return Port(
            DTYPES[kind], tuple(f"{name}_{i}" if d < 0 else int(d) for i, d in enumerate(shape))
        )


def _load(path: Path, trt: Any) -> tuple[Any, Any, Any]:
    """What the library says, what must outlive the engine, and the engine."""
    from sdopt.targets._trt_build import open_engine

    with open(path, "rb") as file:
        size = path.stat().st_size
        if size == 0:
            raise BuildError("the engine is empty", where=str(path), hint="build it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            log, kept, engine = open_engine(trt, mapped)
    if engine is None:
        raise BuildError(
            f"{trt.__name__} {trt.__version__} does not open this engine",
            where=str(path),
            why=log.errors() or "it gave no reason",
            hint="engines run only on the card and library version that they were built for: "
            "build it there again",
        )
    return log, kept, engine
