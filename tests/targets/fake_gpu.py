# ruff: noqa: N801, N802, N815 - the names are CUDA's own
"""CUDA and TensorRT in memory: a card whose addresses are offsets, an engine that adds one.

The interfaces are the ones that ``sdopt.targets`` calls, as documented by NVIDIA; an engine here
computes ``out = x + one`` for ``x`` of ``[N, 4]``, on the stream or captured; ``one`` is its
weight of that name, 1 unless it is refitted.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class Card:
    """``cuda.bindings.runtime`` of a card with memory, one stream, and what was called."""

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, cards: int = 1) -> None:
        self.cards, self.calls = cards, [""]
        self.memory: dict[int, np.ndarray] = {}
        self.failing: dict[str, int] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self._next = 256

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if status := self.failing.get(name, 0):
                return (status, None)
            return (0, *getattr(self, f"_{name}")(*arguments))

        return call

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, f"status {status}".encode()

    def at(self, address: int) -> np.ndarray:
        return self.memory[address]

    def put(self, work: Callable[[], None]) -> None:
        """Work of a library on the stream: now, or into the graph that is being captured."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _cudaGetDeviceCount(self) -> tuple[int]:
        return (self.cards,)

    def _cudaSetDevice(self, device: int) -> tuple[()]:
        return ()

    def _cudaStreamCreate(self) -> tuple[int]:
        return (7,)

    def _cudaStreamDestroy(self, stream: int) -> tuple[()]:
        return ()

    def _cudaStreamSynchronize(self, stream: int) -> tuple[()]:
        assert self.capturing is None, "a stream that is captured cannot be waited for"
        return ()

    def _cudaMalloc(self, size: int) -> tuple[int]:
        address, self._next = self._next, self._next + (size + 511) // 256 * 256
        self.memory[address] = np.zeros(size, np.uint8)
        return (address,)

    def _cudaFree(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def _cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[()]:
        if kind == 1:
            self.at(to)[:size] = np.ctypeslib.as_array(
                (ctypes.c_uint8 * size).from_address(source)
            )
        else:
            ctypes.memmove(to, self.at(source)[:size].tobytes(), size)
        return ()

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[()]:
        self.capturing = []
        return ()

    def _cudaStreamEndCapture(self, stream: int) -> tuple[list[Callable[[], None]]]:
        found, self.capturing = self.capturing, None
        assert found is not None
        return (found,)

    def _cudaGraphInstantiate(self, graph: list[Any], flags: int) -> tuple[list[Any]]:
        return (graph,)

    def _cudaGraphDestroy(self, graph: list[Any]) -> tuple[()]:
        return ()

    def _cudaGraphExecDestroy(self, graph: list[Any]) -> tuple[()]:
        graph.clear()
        return ()

    def _cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> tuple[()]:
        assert graph, "a destroyed graph was launched"
        for work in graph:
            work()
        return ()


class Mode(enum.Enum):
    INPUT, OUTPUT = range(2)


class Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Kind(enum.Enum):
    FLOAT, HALF = range(2)


class Weights:
    """So many numbers at an address, which are there only as long as their owner."""

    def __init__(self, type: Kind, ptr: int, count: int) -> None:
        self.type, self.ptr, self.count = type, ptr, count

    def read(self) -> np.ndarray:
        kind = np.dtype({Kind.FLOAT: np.float32, Kind.HALF: np.float16}[self.type])
        data = (ctypes.c_uint8 * (self.count * kind.itemsize)).from_address(self.ptr)
        return np.frombuffer(bytes(data), kind)


class Refitter:
    """Changes an engine's weights, all of a combination at once."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self._engine, self._given = engine, dict[str, Weights]()

    def get_all_weights(self) -> list[str]:
        return list(self._engine.weights)

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        known = self._engine.weights[name]
        fits = (known.size, known.dtype) == (weights.count, weights.read().dtype)
        if fits:
            self._given[name] = weights
        return fits

    def get_missing_weights(self) -> list[str]:
        touched = [c for c in self._engine.combined if c & self._given.keys()]
        return sorted(name for c in touched for name in c - self._given.keys())

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        self._engine.weights |= {name: one.read() for name, one in self._given.items()}
        return True


def library(card: Card, **engine: Any) -> Any:
    """A module like ``tensorrt``: its engines run on ``card``; keywords are those of Engine."""

    class Logger:
        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: Any) -> Any:
            if bytes(data[:6]) == b"engine":
                return Engine(card, **engine)
            self.logger.log(SimpleNamespace(name="ERROR"), "wrong magic tag")
            return None

    return SimpleNamespace(
        __name__="tensorrt",
        __version__="11.0",
        ILogger=Logger,
        Runtime=Runtime,
        TensorIOMode=Mode,
        ExecutionContextAllocationStrategy=Strategy,
        DataType=Kind,
        Weights=Weights,
        Refitter=Refitter,
        init_libnvinfer_plugins=lambda logger, namespace: True,
    )


class Engine:
    """out = x + one of ``[N, 4]``; N from 1 to 4 in the first profile, 8 in the second."""

    num_io_tensors = 2
    num_optimization_profiles = 2

    def __init__(
        self,
        card: Card,
        scratch: int = 1024,
        capturable: Any = None,
        refittable: bool = False,
        combined: tuple[frozenset[str], ...] = (),
    ) -> None:
        self.card, self.device_memory_size_v2 = card, scratch
        self.refittable, self.combined = refittable, combined
        self.weights = {name: np.ones(4, np.float32) for name in ("one", "other")}
        self.contexts: list[Context] = []
        self._capturable = capturable

    def get_tensor_name(self, index: int) -> str:
        return ("x", "out")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [[(1, 4), (2, 4), (4, 4)], [(8, 4), (8, 4), (8, 4)]][profile]

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy.name == "USER_MANAGED"
        made = Context(self)
        if self._capturable is not None:
            made.is_stream_capturable = self._capturable  # type: ignore[attr-defined]
        self.contexts.append(made)
        return made


class Context:
    """An execution context; it refuses to run before it is told everything."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.memory = engine, -1, (0, 0)
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == 7
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile >= 0
        self.shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self.shape else ["x"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape is not None
        return self.shape

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        card, shape = self.engine.card, self.shape
        assert shape is not None
        source, target, scratch = self.addresses["x"], self.addresses["out"], self.memory[0]
        size = 4 * shape[0] * shape[1]

        def work() -> None:
            card.at(scratch)[:] = 1  # memory that was given back is no longer there
            one = np.tile(self.engine.weights["one"], shape[0])
            result = card.at(source)[:size].view(np.float32) + one
            card.at(target)[:size] = result.view(np.uint8)

        card.put(work)
        return True
