"""Which values activations take on recorded inputs, found by running the graph.

The extremes come out of the graph itself as numbers (ReduceMin, ReduceMax). A percentile needs
the tensors: as many at a time as fit in ``HELD_BYTES``, each counted into a histogram.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdopt import modelfile
from sdopt.errors import MissingDependencyError, UsageError
from sdopt.recorded import Recording, Sample

HELD_BYTES = 256 << 20
"""Of activations in memory at once."""

BINS = 2048
"""Of a histogram between the extremes; a threshold is exact to one of them."""

Range = tuple[float, float]


def ranges(
    model: ir.Model,
    values: Sequence[ir.Value],
    recording: Recording,
    samples: Sequence[Sample],
    percentile: float | None,
    symmetric: bool,
) -> list[Range]:
    """The range of each value over the samples: its extremes, or what ``percentile`` leaves.

    A symmetric range is ``(-t, t)``; one that is not holds 0.

    Raises:
        UsageError: the samples do not fit the graph, onnxruntime cannot run it, or an activation
            is not finite.
        MissingDependencyError: onnxruntime is not installed.
    """
    if not values:
        return []
    names = [value.name or "" for value in values]
    with tempfile.TemporaryDirectory(prefix="sdopt-calibrate-") as folder:
        probe = _Probe(model, Path(folder), recording, samples)
        low, high, sizes = _extremes(probe, names)
        if percentile is not None:
            low, high = _percentiles(probe, names, sizes, low, high, percentile, symmetric)
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


class _Probe:
    """The model in a folder of its own, run for other outputs than its own."""

    def __init__(
        self, model: ir.Model, folder: Path, recording: Recording, samples: Sequence[Sample]
    ) -> None:
        self._recording, self._samples = recording, samples
        self._model = model.clone()
        self._path = folder / "model.onnx"
        self._inputs = {value.name or "": value for value in model.graph.inputs}
        _check_fit(self._inputs, samples, str(recording.folder))
        modelfile.save(self._model, self._path)

    def run(
        self, names: Sequence[str], outputs: Callable[[ir.Graph, ir.Value], list[ir.Value]]
    ) -> Iterator[list[np.ndarray]]:
        """Sample by sample what ``outputs`` makes of each named value, one after another."""
        model = self._model.clone()
        inner = {v.name: v for node in model.graph for v in node.outputs}
        inner |= {v.name: v for v in [*model.graph.inputs, *model.graph.initializers.values()]}
        made = [one for name in names for one in outputs(model.graph, _as_float(inner[name]))]
        for index, value in enumerate(made):
            value.name = f"sdopt_probe_{index}"
        model.graph.outputs.clear()
        model.graph.outputs.extend(made)
        RemoveUnusedNodesPass()(model)
        self._path.write_bytes(ir.to_proto(model).SerializeToString())
        session, failures = _session(self._path)
        needed = [one.name for one in session.get_inputs()]
        for sample in self._samples:
            arrays = self._recording.load(sample)
            feeds = {name: arrays[name].astype(self._dtype(name)) for name in needed}
            try:
                yield session.run(None, feeds)
            except failures as error:
                raise _cannot_run(error) from error

    def _dtype(self, name: str) -> np.dtype:
        dtype = self._inputs[name].dtype
        if dtype is None:
            raise TypeError(f"the input {name} has no type")
        return dtype.numpy()


def _extremes(probe: _Probe, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest and largest number, and largest element count, of each over the samples."""

    def numbers(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
        makers = [("ReduceMin", {"keepdims": 0}), ("ReduceMax", {"keepdims": 0}), ("Size", {})]
        return [_append(graph, op, value, **attributes) for op, attributes in makers]

    low, high, size = np.full((3, len(names)), np.nan)
    for found in probe.run(names, numbers):
        table = np.array([float(one) for one in found]).reshape(-1, 3)
        low, high = np.fmin(low, table[:, 0]), np.fmax(high, table[:, 1])
        wrong = ~np.isfinite(table[:, :2]).all(axis=1)
        if wrong.any():
            raise UsageError(
                "an activation is not finite on the recorded inputs",
                where=names[int(np.argmax(wrong))],
                hint="calibrate the fp32 graph, or keep what is behind this value in fp32",
            )
        size = np.fmax(size, table[:, 2])
    return low, high, size


def _percentiles(
    probe: _Probe,
    names: Sequence[str],
    sizes: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    percentile: float,
    symmetric: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The ranges that hold ``percentile`` percent of all numbers, cut alike at both ends."""
    counts = np.zeros((len(names), BINS), np.int64)
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = np.zeros_like(high)
    for group in _groups(sizes):
        for tensors in probe.run([names[i] for i in group], lambda _, value: [_named(value)]):
            for index, tensor in zip(group, tensors, strict=True):
                numbers = np.abs(tensor) if symmetric else tensor
                if high[index] > low[index]:
                    counts[index] += np.histogram(numbers, BINS, (low[index], high[index]))[0]
    left_out = (100 - percentile) / 100
    for index, row in enumerate(counts):
        edges = np.linspace(low[index], high[index], BINS + 1)
        share = np.cumsum(row) / max(1, row.sum())
        tail = left_out if symmetric else left_out / 2
        # The first bin with enough below its upper edge; rounding must not ask for more than all.
        high[index] = edges[1 + int(np.searchsorted(share, min(1 - tail, share[-1])))]
        if not symmetric:
            low[index] = edges[int(np.searchsorted(share, tail, side="right"))]
    return low, high


def _groups(sizes: np.ndarray) -> Iterator[list[int]]:
    """Neighbours whose float32 values fit together in ``HELD_BYTES``; a larger one comes alone."""
    group: list[int] = []
    held = 0.0
    for index, size in enumerate(sizes):
        if group and held + 4 * size > HELD_BYTES:
            yield group
            group, held = [], 0.0
        group.append(index)
        held += 4 * size
    if group:
        yield group


def _as_float(value: ir.Value) -> ir.Value:
    """``value`` in float32: onnxruntime's CPU has few kernels for half types."""
    graph = value.graph
    if value.dtype == ir.DataType.FLOAT or not isinstance(graph, ir.Graph):
        return value
    return _append(graph, "Cast", value, to=int(ir.DataType.FLOAT))


def _named(value: ir.Value) -> ir.Value:
    """``value`` under a name of its own: it may be an input, or asked for by two names."""
    graph = value.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError("an activation is in the main graph")
    return _append(graph, "Identity", value)


def _append(graph: ir.Graph, op: str, value: ir.Value, **attributes: int) -> ir.Value:
    node = ir.node(op, [value], attributes)
    graph.append(node)
    made = node.outputs[0]
    made.type = ir.TensorType(ir.DataType.INT64 if op == "Size" else ir.DataType.FLOAT)
    return made


def _check_fit(inputs: Mapping[str, ir.Value], samples: Sequence[Sample], where: str) -> None:
    for sample in samples:
        for name, (_, shape) in sample.inputs.items():
            dims = inputs[name].shape
            if dims is None:
                continue
            fits = len(dims) == len(shape) and all(
                not isinstance(dim, int) or dim == size
                for dim, size in zip(dims, shape, strict=True)
            )
            if not fits:
                raise UsageError(
                    f"the recorded {name} is {list(shape)}, and the graph takes {dims}",
                    where=where,
                    hint="record at the size (and with the guidance) that this graph is for",
                )


def _session(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as raised
    except ImportError as error:
        raise MissingDependencyError(
            "calibration runs the graph with onnxruntime", hint='pip install "sdopt[ort]"'
        ) from error
    failures = (
        raised.Fail,
        raised.InvalidArgument,
        raised.InvalidGraph,
        raised.NotImplemented,
        raised.RuntimeException,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]), failures
    except failures as error:
        raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> UsageError:
    return UsageError(
        "onnxruntime's CPU cannot run this graph, so it cannot be calibrated",
        why=str(error).strip().split("\n", 1)[0],
        hint="quantize before the graph is lowered for another target",
    )
