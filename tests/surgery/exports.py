"""Exporting one cell of the matrix as users do: torch's two exporters at their defaults."""

from __future__ import annotations

import functools
from io import BytesIO
from typing import Any

import onnx
import torch

from tests.surgery import models
from tests.surgery.cells import Cell


def export(cell: Cell) -> onnx.ModelProto:
    """The cell's graph with the parameters inside.

    Raises:
        Exception: whatever torch says where it cannot export the cell.
    """
    return _torchscript(cell) if cell.exporter == "torchscript" else _dynamo(cell)


def _torchscript(cell: Cell) -> onnx.ModelProto:
    file = BytesIO()
    with models.quiet():
        torch.onnx.export(
            models.module(cell.model, cell.attention, cell.dtype),
            models.arguments(cell.model, cell.dtype),
            file,
            dynamo=False,
            opset_version=cell.opset,
            input_names=models.INPUTS[cell.model],
            output_names=models.OUTPUTS[cell.model],
            dynamic_axes=models.dynamic_axes(cell.model) if cell.is_dynamic else None,
        )
    return onnx.load_from_string(file.getvalue())


@functools.cache
def _traced(model: str, attention: str, shapes: str, dtype: str) -> torch.export.ExportedProgram:
    free: Any = None
    if shapes == "dynamic":
        free = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in models.AXES[model])
    with models.quiet():
        return torch.export.export(
            models.module(model, attention, dtype),
            models.arguments(model, dtype),
            dynamic_shapes=free,
            strict=False,
        )


def _dynamo(cell: Cell) -> onnx.ModelProto:
    """Traced once for all opsets, as torch.onnx.export itself does first."""
    with models.quiet():
        program = torch.onnx.export(
            _traced(cell.model, cell.attention, cell.shapes, cell.dtype),
            (),
            dynamo=True,
            opset_version=cell.opset,
            verbose=False,
            input_names=models.INPUTS[cell.model],
            output_names=models.OUTPUTS[cell.model],
        )
    assert program is not None
    return onnx.load_from_string(program.model_proto.SerializeToString())
