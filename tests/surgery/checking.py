"""Raising a cell, counting what it holds by structure, comparing it with the raw graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.errors import BuildError
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.report import PassReport
from sdopt.targets._trt_build import Builder
from sdopt.targets.trt_rtx import TrtRtx
from tests.surgery import cells
from tests.surgery.cells import Cell
from tests.toolkit import Arrays, relative_l2

PIPELINE = "clean,raise_ops,clean"
ROLES = {
    "unet": Role.DENOISER,
    "text_encoder": Role.TEXT_ENCODER,
    "vae_decoder": Role.VAE_DECODER,
}
TOLERANCE = {"fp32": 5e-6, "fp16": 5e-3}

ILL_TYPED = {f"text_encoder-torchscript17-sdpa-{shapes}-fp16" for shapes in ("static", "dynamic")}
"""Graphs that no runtime takes, so that there are no numbers to compare with: torch 2.13 writes
the causal mask of a half-precision model in float32, and what reads the sum is of two types."""

WRITTEN_OUT = {"Softmax", "InstanceNormalization", "Erf", "Tanh", "ReduceMean", "Pow", "Sqrt"}
"""What the spellings of attention, norms and GELU are made of, and these models nothing else."""


def raised(raw: onnx.ModelProto) -> tuple[ir.Model, list[PassReport]]:
    """The model after the pipeline, and what its passes said; ``raw`` stays as it is."""
    own = onnx.ModelProto()
    own.CopyFrom(raw)
    model = ir.from_proto(own)
    return model, Pipeline.parse(PIPELINE).run(model, RunContext())


def held(model: ir.Model) -> dict[str, int]:
    """How many of each kind a canonical graph holds, by structure."""
    found = Counter(
        {
            "attention": 0,
            "group_norm": 0,
            "layer_norm": 0,
            "geglu": 0,
            "silu": 0,
            "quick_gelu": 0,
        }
    )
    for node in model.graph:
        match node.op_type:
            case "Attention":
                found["attention"] += 1
            case "GroupNormalization":
                found["group_norm"] += 1
            case "LayerNormalization":
                found["layer_norm"] += 1
            case "Mul":
                found.update(_product(node))
    return dict(found)


def _product(mul: ir.Node) -> list[str]:
    """The kind that a Mul is the last node of, if any."""
    for one, other in (mul.inputs, mul.inputs[::-1]):
        if gelu := graph.producer(one, "Gelu"):
            halves = graph.producer(gelu.inputs[0], "Split")
            if halves is not None and list(halves.outputs) == [other, gelu.inputs[0]]:
                return ["geglu"]
        if sigmoid := graph.producer(one, "Sigmoid"):
            source = sigmoid.inputs[0]
            if source is other:
                return ["silu"]
            scaled = graph.producer(source, "Mul")
            factors = {
                round(number, 3)
                for side in (scaled.inputs if scaled is not None else ())
                if side is not other and (number := graph.scalar(side)) is not None
            }
            if scaled is not None and other in scaled.inputs and factors == {1.702}:
                return ["quick_gelu"]
    return []


def assert_raised(model: ir.Model, cell: Cell) -> None:
    """Everything that the PyTorch modules count is one node or one form, nothing is left."""
    wanted = cells.manifest()["counts"][cell.model]
    assert held(model) == wanted
    ops = graph.op_counts(model)
    assert not WRITTEN_OUT & set(ops)
    assert ops.get("Gelu", 0) == wanted["geglu"]
    assert ops.get("Sigmoid", 0) == wanted["silu"] + wanted["quick_gelu"]


def outputs(model: onnx.ModelProto, inputs: list[Arrays]) -> list[list[np.ndarray]]:
    """The outputs for each of the inputs, on ONNX Runtime's CPU without optimisations."""
    session = cells.session(model)
    return [[np.asarray(out) for out in session.run(None, one)] for one in inputs]


def distance(found: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> float:
    """The largest relative L2 of any output at any size; NaN where one holds a NaN."""
    pairs = [
        pair
        for ours, theirs in zip(found, wanted, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return float(np.max([relative_l2(a, b) for a, b in pairs]))


def sizes(cell: Cell) -> list[Arrays]:
    """Inputs of the traced size and, where shapes are dynamic, of another one."""
    return [
        cells.feeds(cell, other=other)
        for other in ((False, True) if cell.is_dynamic else (False,))
    ]


def check(cell: Cell) -> None:
    """Raise the shipped graph of a cell: N of N, the same numbers, and TensorRT-RTX parses it."""
    raw = cells.proto(cell)
    model, _ = raised(raw)
    assert_raised(model, cell)
    if str(cell) in ILL_TYPED:
        with pytest.raises(Exception, match="bound to different types"):
            cells.session(raw)
        with pytest.raises(BuildError, match="refuses LayerNormalization"):
            parse(model, cell)
        return
    inputs = sizes(cell)
    off = distance(outputs(ir.to_proto(model), inputs), outputs(raw, inputs))
    assert off <= TOLERANCE[cell.dtype]
    assert parse(model, cell) > 0


def parse(model: ir.Model, cell: Cell) -> int:
    """Lower a raised cell for TensorRT-RTX; how many layers its parser makes of it.

    Dynamic ones in single precision are cast to half on the way.
    """
    cast = cell.dtype == "fp32" and cell.is_dynamic
    target = TrtRtx(dtype="fp16" if cast else "")
    Pipeline.parse(target.lowering(ROLES[cell.model])).run(model, RunContext())
    target.check_legal(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lowered.onnx"
        ir.save(model, path)
        return int(Builder(target.library()).parse(path).num_layers)
