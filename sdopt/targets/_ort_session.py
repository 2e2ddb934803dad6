"""A graph opened by ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as raised

from sdopt.errors import BuildError
from sdopt.session import Port, checked_feeds
from sdopt.targets._ort_weights import WEIGHTS_FOLDER, model_with

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

# onnxruntime's exceptions have no common base of their own.
_FAILURES = (
    raised.Fail,
    raised.InvalidArgument,
    raised.InvalidGraph,
    raised.InvalidProtobuf,
    raised.NoModel,
    raised.NoSuchFile,
    raised.NotImplemented,
    raised.RuntimeException,
    raised.EPFail,
)


class OrtSession:
    """An ONNX file on ONNX Runtime's CPU provider."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        optimize: bool = True,
        weights: Mapping[str, ir.TensorProtocol] | None = None,
    ) -> None:
        self._where = str(path)
        options = session_options(threads, optimize)
        model, kept = model_with(path, weights or {}, options)
        with explained("onnxruntime cannot load this graph", self._where):
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        kept.clear()  # the session has copies
        self.inputs: Mapping[str, Port] = ports(self._session.get_inputs(), self._where)
        self.outputs: Mapping[str, Port] = ports(self._session.get_outputs(), self._where)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; float feeds are cast to the declared dtype.

        Raises:
            UsageError: feeds that are not the graph's inputs.
            BuildError: onnxruntime failed inside the graph (a size it cannot take, say).
        """
        arrays = checked_feeds(self.inputs, feeds, self._where)
        with explained("onnxruntime failed in this graph", self._where):
            values = self._session.run(list(self.outputs), arrays)
        return dict(zip(self.outputs, values, strict=True))


class OrtPiece:
    """A part of a graph on the CPU provider, its weights beside it, onnxruntime's rewrites off.

    Its inputs are of any shape; they are not checked but by onnxruntime.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, threads: int) -> None:
        self._where = str(folder)
        self._gives = [value.name for value in model.graph.output]
        options = session_options(threads, optimize=False)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(folder.absolute()))
        with explained("onnxruntime cannot load a part of this graph", self._where):
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the part gives, in its order.

        Raises:
            BuildError: onnxruntime failed inside.
        """
        with explained("onnxruntime failed in a part of this graph", self._where):
            values = self._session.run(self._gives, dict(feeds))
        return dict(zip(self._gives, values, strict=True))


def ports(arguments: list[Any], where: str) -> dict[str, Port]:
    """A graph's inputs or outputs, by name.

    Raises:
        BuildError: one is of a type that numpy arrays cannot carry to onnxruntime.
    """
    found = {}
    for one in arguments:
        if one.type not in _DTYPES:
            raise BuildError(
                f"{one.name} is a {one.type}, which cannot be passed to onnxruntime",
                where=where,
                hint="export with --dtype fp16 or fp32",
            )
        # A dynamic axis without a name is None to onnxruntime.
        dims = tuple(dim if dim is not None else "?" for dim in one.shape)
        found[one.name] = Port(np.dtype(_DTYPES[one.type]), dims)
    return found


@contextlib.contextmanager
def explained(message: str, where: str) -> Iterator[None]:
    """Turn what onnxruntime raises into an error that says what to do.

    Raises:
        BuildError: onnxruntime refused or failed.
    """
    try:
        yield
    except _FAILURES as error:
        raise BuildError(
            message,
            where=where,
            why=str(error).strip().split("\n", 1)[0],
            hint=_hint(str(error)),
        ) from error


def session_options(threads: int, optimize: bool) -> onnxruntime.SessionOptions:
    """Options of a session; ``optimize=False`` turns onnxruntime's own rewrites off."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    )
    options.log_severity_level = (
        4  # its own log goes straight to the terminal; errors are raised too
    )
    return options


def _hint(text: str) -> str | None:
    if "find an implementation" in text:
        return "onnxruntime's CPU has no bfloat16 kernels: export such a graph with --dtype fp16"
    if "Concat" in text and "mismatched dimensions" in text:
        return (
            "a UNet that was traced at one size fails at others that it cannot halve evenly: "
            "sdopt optimize --passes @fast (its pad_align) makes it right at multiples of 8 pixels"
        )
    if "external" in text.lower():
        return "the weights beside the ONNX file are missing or short: copy it again with them"
    return None
