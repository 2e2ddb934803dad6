"""A graph on ONNX Runtime's CUDA provider: buffers that stay, and a CUDA graph per shape."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as raised

from sdopt.session import Port, checked_feeds
from sdopt.targets._ort_session import explained, ports, session_options
from sdopt.targets._ort_weights import model_with

_NOT_CAPTURED = "cannot use the graph capture feature"
"""What onnxruntime 1.31 says of a graph with nodes on the host."""

NO_GRAPH = "-1"
"""The graph id of a run that onnxruntime must not capture."""


@dataclasses.dataclass
class Bound:
    """The device buffers of one set of shapes, and the binding that reads and writes them."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    options: Any
    near: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was copied into an input from the card; the same tensor is not copied again."""


class OrtCudaSession:
    """An ONNX file on ONNX Runtime's CUDA provider.

    For each set of input shapes the buffers are allocated once; with ``cuda_graph`` the kernels
    between them are captured at the second run and replayed from then on. A graph with nodes that
    onnxruntime computes on the host cannot be captured, and runs without; ``captures`` says so.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: int = 0,
        cuda_graph: bool = True,
        provider_options: Mapping[str, str] | None = None,
        free_dims: Mapping[str, int] | None = None,
        optimize: bool = True,
        weights: Mapping[str, ir.TensorProtocol] | None = None,
    ) -> None:
        self._where, self._device, self._graph = str(path), device, cuda_graph
        options = session_options(threads=0, optimize=optimize)
        for name, size in (free_dims or {}).items():
            options.add_free_dimension_override_by_name(name, size)
        given = {
            "device_id": str(device),
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            # Sums of residuals in float32: nearer to the model, and 4 % faster on an H200.
            "enable_skip_layer_norm_strict_mode": "1",
            "enable_cuda_graph": str(int(cuda_graph)),
            **(provider_options or {}),
        }
        model, kept = model_with(path, weights or {}, options)
        with explained("onnxruntime cannot load this graph", self._where):
            try:
                self._session = _opened(model, options, given)
            except raised.Fail as error:
                if not cuda_graph or _NOT_CAPTURED not in str(error):
                    raise
                # A text encoder's index arithmetic runs on the host; its launches are few.
                self._graph = False
                self._session = _opened(model, options, {**given, "enable_cuda_graph": "0"})
        kept.clear()  # the session has copies
        self.inputs: Mapping[str, Port] = ports(self._session.get_inputs(), self._where)
        self.outputs: Mapping[str, Port] = ports(self._session.get_outputs(), self._where)
        self._bound: dict[tuple[tuple[int, ...], ...], Bound] = {}

    @property
    def captures(self) -> bool:
        """Whether runs are captured as CUDA graphs."""
        return self._graph

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; float feeds are cast to the declared dtype.

        Raises:
            UsageError: feeds that are not the graph's inputs.
            BuildError: onnxruntime failed inside the graph.
        """
        arrays = checked_feeds(self.inputs, feeds, self._where)
        bound = self.bind(arrays)
        bound.near.clear()
        for name, array in arrays.items():
            bound.inputs[name].update_inplace(array)
        self.launch(bound)
        return {name: value.numpy() for name, value in bound.outputs.items()}

    def run_held(
        self, feeds: Mapping[str, Any], held: Collection[str], *, keep: bool
    ) -> dict[str, Any]:
        """Like ``run``, with values that other sessions on the card gave, and some left there.

        Args:
            feeds: arrays, and tensors of torch on the card, which are copied there.
            held: the outputs that are given as such tensors.
            keep: whether these outlive the next run; else that writes over them.
        """
        import torch

        near = {name: one for name, one in feeds.items() if isinstance(one, torch.Tensor)}
        shapes = {name: np.empty(one.shape, self.inputs[name].dtype) for name, one in near.items()}
        arrays = checked_feeds(self.inputs, {**feeds, **shapes}, self._where)
        bound = self.bind(arrays)
        for name, array in arrays.items():
            if name in near:
                if bound.near.get(name) is not near[name]:
                    _shared(bound.inputs[name]).copy_(near[name])
                bound.near[name] = near[name]
            else:
                bound.near.pop(name, None)
                bound.inputs[name].update_inplace(array)
        if near:
            torch.cuda.synchronize(self._device)  # onnxruntime has a stream of its own
        self.launch(bound)
        found: dict[str, Any] = {}
        for name, value in bound.outputs.items():
            tensor = _shared(value) if name in held else None
            found[name] = value.numpy() if tensor is None else tensor.clone() if keep else tensor
        return found

    def holds(self) -> bool:
        """Whether values can stay on the card between sessions: torch moves them there."""
        if importlib.util.find_spec("torch") is None:
            return False
        import torch

        return torch.cuda.is_available()

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Bound:
        """The buffers for arrays of these shapes, allocated and filled at their first use."""
        key = tuple(array.shape for array in arrays.values())
        if key not in self._bound:
            self._bound[key] = self._allocate(arrays, graph_id=len(self._bound) + 1)
        return self._bound[key]

    def launch(self, bound: Bound) -> None:
        """Compute from the input buffers to the output buffers, and wait for it."""
        with explained("onnxruntime failed in this graph", self._where):
            self._session.run_with_iobinding(bound.binding, bound.options)

    def _allocate(self, arrays: Mapping[str, np.ndarray], graph_id: int) -> Bound:
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {name: make(array, "cuda", self._device) for name, array in arrays.items()}
        trial = self._binding(inputs)
        for name in self.outputs:
            trial.bind_output(name, "cuda", self._device)
        with explained("onnxruntime failed in this graph", self._where):
            self._session.run_with_iobinding(trial, _run_options(NO_GRAPH))
        # The first run tells the outputs' shapes; from now on their buffers are ours and stay.
        outputs = dict(zip(self.outputs, trial.get_outputs(), strict=True))
        binding = self._binding(inputs)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = _run_options(str(graph_id) if self._graph else NO_GRAPH)
        return Bound(inputs, outputs, binding, options)

    def _binding(self, inputs: Mapping[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        return binding


def _opened(
    model: str | bytes, options: onnxruntime.SessionOptions, given: Mapping[str, str]
) -> onnxruntime.InferenceSession:
    providers = [("CUDAExecutionProvider", dict(given))]
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _shared(value: Any) -> Any:
    """An onnxruntime value on the card as a tensor of torch, over the same memory."""
    import torch

    return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())


def _run_options(graph_id: str) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options
