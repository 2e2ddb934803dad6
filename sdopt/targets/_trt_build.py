"""Driving TensorRT's and TensorRT-RTX's builder: one code path over both modules' API.

Written against the documented API of TensorRT 10 and 11 and run on TensorRT-RTX 1.7. What differs
is asked of the module itself: 11 removed the precision flags and weak typing, RTX has compute
capabilities and needs no GPU to build.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from sdopt.errors import BuildError
from sdopt.report import Progress
from sdopt.shapes import Extent

Profile = Mapping[str, Sequence[Extent]]

_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+),.*?Metadata: ?(.*)$", re.M)
_FUSED_ATTENTION = re.compile(r"mha", re.I)
"""Myelin's name for a kernel that computes a whole attention (``_gemm_mha_v2_...``)."""


@dataclass
class Settings:
    """Options of one build; those that the library does not have are left out by the target."""

    workspace_bytes: int = 0
    level: int | None = None
    capabilities: Sequence[str] = ()
    flags: Sequence[str] = ()
    timing_cache: Path | None = None


@dataclass
class Log:
    """What the library said, by severity."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def errors(self) -> str:
        """The errors, the first ones first."""
        found = [text for severity, text in self.lines if "ERROR" in severity]
        return "; ".join(found[:3])

    def layers(self) -> list[tuple[str, str, str]]:
        """Name, type and origin of every layer, from the dump in the verbose log."""
        dumps = [text for _, text in self.lines if text.startswith("Layers:")]
        return [found for text in dumps for found in _LAYER.findall(text[len("Layers:") :])]


class Builder:
    """One builder and its logger; the library wants a single live one per process."""

    def __init__(self, trt: Any) -> None:
        self.trt, self.log = trt, Log()
        self._logger = _logger(trt, self.log)
        # Before parse and before deserialize: InstanceNormalization is imported as a plugin.
        trt.init_libnvinfer_plugins(self._logger, "")
        self._builder = trt.Builder(self._logger)

    def parse(self, path: Path) -> Any:
        """The network of an ONNX file; weights beside it are found by its path.

        Raises:
            BuildError: naming the node that the parser refuses.
        """
        trt = self.trt
        flags = trt.NetworkDefinitionCreationFlag
        network = self._builder.create_network(1 << int(flags.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise refused(trt, path, errors)
        self._parser = parser  # the network reads weights that the parser holds
        _decompose(trt, network)
        return network

    def build(
        self, network: Any, profiles: Sequence[Profile], settings: Settings, progress: Progress
    ) -> bytes:
        """The engine; Ctrl-C ends the build at the builder's next step.

        Raises:
            BuildError: in the library's words.
            KeyboardInterrupt: the build was cancelled.
        """
        trt, config = self.trt, self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if settings.workspace_bytes:
            kind = trt.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(kind, settings.workspace_bytes)
        if settings.level is not None:
            config.builder_optimization_level = settings.level
        for name in settings.flags:
            config.set_flag(getattr(trt.BuilderFlag, name))
        if settings.capabilities:
            config.num_compute_capabilities = len(settings.capabilities)
            for index, name in enumerate(settings.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        for profile in profiles:
            self._add_profile(config, network, profile)
        cache = _open_cache(config, settings.timing_cache)
        with _cancellable() as cancelled:
            # The library keeps no reference of its own to a monitor written in Python.
            monitor = _monitor(trt, progress, cancelled)
            config.progress_monitor = monitor
            plan = self._builder.build_serialized_network(network, config)
        if cancelled():
            raise KeyboardInterrupt
        if plan is None:
            refit = "REFIT" in settings.flags and trt.__name__ == "tensorrt_rtx"
            raise BuildError(
                f"{trt.__name__} could not build an engine",
                why=self.log.errors() or "it gave no reason",
                hint="TensorRT-RTX 1.7 builds refittable engines on a machine with a card only"
                if refit
                else "sdopt build --check says whether it takes the graph; --emit-only keeps the "
                "lowered graph for its own tools",
            )
        _save_cache(config, cache, settings.timing_cache)
        return bytes(plan)

    def _add_profile(self, config: Any, network: Any, profile: Profile) -> None:
        made = self._builder.create_optimization_profile()
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        for one in inputs:
            extents = profile[one.name]
            if any(dim == -1 for dim in one.shape):
                low, usual, high = zip(*extents, strict=True)
                made.set_shape(one.name, low, usual, high)
        if config.add_optimization_profile(made) < 0:
            raise BuildError("the library refused an optimisation profile", why=self.log.errors())


def open_engine(trt: Any, serialized: Any) -> tuple[Log, Any, Any]:
    """What the library says, what must outlive the engine, and the engine, None if refused."""
    log = Log()
    logger = _logger(trt, log)
    # Before deserialize as before parse: an engine may hold InstanceNormalization as a plugin.
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    return log, (logger, runtime), runtime.deserialize_cuda_engine(serialized)


def refused(trt: Any, path: Path, errors: Sequence[Any]) -> BuildError:
    """The parser's errors as one that names node, operator and what to do."""
    first = errors[0]
    return BuildError(
        f"{trt.__name__}'s parser refuses {first.node_operator() or 'the graph'}",
        where=f"{path}: node {first.node_name() or '?'}",
        why="; ".join(dict.fromkeys(str(error.desc()) for error in errors[:3])),
        hint="lower it for this target with sdopt build, which writes what the parser takes",
    )


def attentions(log: Log) -> int:
    """How many attentions of the graph are computed by one kernel, in whichever profile."""
    return len({origin for name, _, origin in log.layers() if _FUSED_ATTENTION.search(name)})


def _decompose(trt: Any, network: Any) -> None:
    """Allow attentions without a kernel of their own to be computed in parts, not refused."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer returns the plain base class
            layer.attention.decomposable = True


def _logger(trt: Any, log: Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.lines.append((severity.name, message))

    return Logger()


def _monitor(trt: Any, progress: Progress, cancelled: Callable[[], bool]) -> Any:
    """The library's progress monitor as sdopt's; only the outermost phase moves the bar."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.outer: str | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = max(1, steps)
            if parent is None:
                self.outer = name

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer:
                progress(name, min(1.0, (step + 1) / self.steps.get(name, 1)))
            return not cancelled()

    return Monitor()


@contextlib.contextmanager
def _cancellable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag while the library builds: an exception cannot cross its C++ frames."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _open_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_cache(config: Any, cache: Any, path: Path | None) -> None:
    if path is not None and cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(config.get_timing_cache().serialize()))
