"""The matrix's comparison goes red for every mistake that is planted, and is green without."""

from __future__ import annotations

import functools
import math

import onnx
import onnx_ir as ir
import pytest

from sdopt.pipeline import Pipeline, RunContext
from tests.surgery import cells, checking
from tests.surgery import mutations as wrong
from tests.surgery.cells import Cell

UNET = Cell("unet", "torchscript", 14, "eager", "static", "fp32")
TEXT = Cell("text_encoder", "torchscript", 14, "sdpa", "dynamic", "fp32")
VAE = Cell("vae_decoder", "dynamo", 18, "eager", "dynamic", "fp32")

MARGIN = 10
"""How many times the tolerance a mistake must move the outputs to be called seen."""

PLANTED: dict[str, tuple[Cell, str, wrong.Edit]] = {
    "attention scale off by sqrt(2)": (UNET, "Attention", wrong.scaled(0, math.sqrt(2))),
    "q and k swapped": (TEXT, "Attention", wrong.swap(0, 1)),
    "k and v swapped": (UNET, "Attention", wrong.swap(1, 2)),
    "one head of its own: q and v swapped": (VAE, "Attention", wrong.swap(0, 2)),
    "head order": (UNET, "Attention", wrong.heads_reversed),
    "causal mask dropped": (TEXT, "Attention", wrong.attribute("is_causal", lambda _: 0)),
    "causal where it is not": (VAE, "Attention", wrong.attribute("is_causal", lambda _: 1)),
    "group norm epsilon 1e-6": (
        UNET,
        "GroupNormalization",
        wrong.attribute("epsilon", lambda _: 1e-6),
    ),
    "half as many groups": (
        VAE,
        "GroupNormalization",
        wrong.attribute("num_groups", lambda groups: groups // 2),
    ),
    "group norm scale and bias swapped": (UNET, "GroupNormalization", wrong.swap(1, 2)),
    "layer norm beta dropped": (TEXT, "LayerNormalization", wrong.drop(2)),
    "layer norm gamma dropped": (UNET, "LayerNormalization", wrong.ones_for(1)),
    "tanh for erf": (UNET, "Gelu", wrong.attribute("approximate", lambda _: "tanh")),
}

TRANSFORMED = {
    "geglu halves swapped": wrong.geglu_halves,
    "skip order": wrong.skip_order,
    "residual lost": wrong.residual,
}


@functools.cache
def _cleaned(cell: Cell) -> tuple[bytes, list[list[object]]]:
    """The cell as ``raise_ops`` is given it, and the raw graph's outputs."""
    raw = cells.proto(cell)
    wanted = checking.outputs(raw, checking.sizes(cell))
    model = ir.from_proto(raw)
    Pipeline.parse("clean").run(model, RunContext())
    return ir.to_proto(model).SerializeToString(), wanted


def _raised(cell: Cell) -> ir.Model:
    model = ir.from_proto(onnx.load_from_string(_cleaned(cell)[0]))
    Pipeline.parse("raise_ops").run(model, RunContext())
    return model


def _off(cell: Cell, model: ir.Model) -> float:
    found = checking.outputs(ir.to_proto(model), checking.sizes(cell))
    return checking.distance(found, _cleaned(cell)[1])


@pytest.mark.parametrize("cell", [UNET, TEXT, VAE], ids=str)
def test_without_a_mistake_it_is_green(cell: Cell) -> None:
    assert _off(cell, _raised(cell)) <= checking.TOLERANCE["fp32"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_a_rewrite_turns_it_red(name: str) -> None:
    cell, op_type, edit = PLANTED[name]
    with wrong.planted(op_type, edit) as hit:
        model = _raised(cell)
    kinds = {
        "Attention": "attention",
        "GroupNormalization": "group_norm",
        "LayerNormalization": "layer_norm",
        "Gelu": "geglu",
    }
    assert len(hit) == cells.manifest()["counts"][cell.model][kinds[op_type]]
    assert _off(cell, model) > MARGIN * checking.TOLERANCE["fp32"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_mistake_in_what_comes_out_turns_it_red(name: str) -> None:
    model = _raised(UNET)
    assert TRANSFORMED[name](model) >= 12
    assert _off(UNET, model) > MARGIN * checking.TOLERANCE["fp32"]
