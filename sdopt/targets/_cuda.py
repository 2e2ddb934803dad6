"""The few calls of CUDA's runtime that an engine needs, through NVIDIA's own bindings.

Source: CUDA Runtime API 12 and 13; every function of ``cuda.bindings.runtime`` returns a tuple of
its status and its results.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from sdopt.errors import BuildError, MissingDependencyError

MODULE = "cuda.bindings.runtime"


class Cuda:
    """One card: memory, a stream, and graphs captured from it.

    Addresses are plain integers, sizes are bytes.

    Raises:
        MissingDependencyError: NVIDIA's bindings are not installed.
        BuildError: there is no card or no driver, or a call failed; in CUDA's words.
    """

    def __init__(self, device: int = 0, runtime: Any = None) -> None:
        self._runtime = runtime if runtime is not None else _bindings()
        found = self._call("cudaGetDeviceCount")
        if device >= found:
            raise BuildError(
                f"there is no card {device}",
                why=f"CUDA sees {found} of them",
                hint="device=0 is the first one",
            )
        self._call("cudaSetDevice", device)
        self.stream: Any = self._call("cudaStreamCreate")

    @property
    def stream_handle(self) -> int:
        """The stream as the number that other libraries take."""
        return int(self.stream)

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes on the card, aligned to 256."""
        return int(self._call("cudaMalloc", size)) if size else 0

    def free(self, address: int) -> None:
        """Give memory back."""
        if address:
            self._call("cudaFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the card; it may be reused at once."""
        if array.nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
            source = array.ctypes.data
            self._call("cudaMemcpyAsync", address, source, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the card into an array; complete after ``synchronize``."""
        if array.nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._call(
                "cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream
            )

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` puts on the stream, as a graph that can be launched; nothing runs yet."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            # The stream must leave capture mode, or every later call on it fails.
            with contextlib.suppress(BuildError):
                self._call("cudaStreamEndCapture", self.stream)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Run a captured graph on the stream."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def forget(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Destroy the stream."""
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status):
            _, text = self._runtime.cudaGetErrorString(status)
            raise BuildError(
                f"CUDA failed in {name}",
                why=text.decode() if isinstance(text, bytes) else str(text),
                hint="engines run on a machine with a card and a driver for its CUDA version",
            )
        return results[0] if results else None


def _bindings() -> Any:
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise MissingDependencyError(
            "running an engine needs NVIDIA's bindings of CUDA",
            why=str(error),
            hint="pip install cuda-bindings",
        ) from error
