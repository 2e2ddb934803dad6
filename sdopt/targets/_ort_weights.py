"""Weights that an ONNX Runtime session takes in place of those in the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Setting of a session that is made of bytes: where its weights lie."""


def model_with(
    path: Path, weights: Mapping[str, ir.TensorProtocol], options: onnxruntime.SessionOptions
) -> tuple[str | bytes, list[Any]]:
    """What a session is made of, and what must stay until it is made.

    Large weights stay on disk but for those replaced, which onnxruntime copies. They must be
    replaced before its own rewrites, which else transpose and fuse what is in the file: with
    ``add_initializer`` onnxruntime 1.31 computes with the old weights and says nothing. That
    cannot replace what lies inside the file, so where such a weight changes the graph is given as
    bytes.
    """
    if not weights:
        return str(path), []
    model = onnx.load(path, load_external_data=False)
    inside: list[onnx.TensorProto] = []
    outside: list[onnx.TensorProto] = []
    for one in model.graph.initializer:
        if one.name in weights:
            external = one.data_location == onnx.TensorProto.EXTERNAL
            (outside if external else inside).append(one)
    values = [_value(weights[one.name]) for one in outside]
    if values:
        options.add_external_initializers([one.name for one in outside], values)
    if missing := weights.keys() - {one.name for one in (*inside, *outside)}:
        raise KeyError(f"{path} has no initializers {', '.join(sorted(missing))}")
    if not inside:
        return str(path), values
    for one in inside:
        tensor = weights[one.name]
        one.CopyFrom(ir.to_proto(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=one.name)))
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent.absolute()))
    return model.SerializeToString(), values


def _value(tensor: ir.TensorProtocol) -> Any:
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.BFLOAT16:
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(array.view("uint16"), onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
