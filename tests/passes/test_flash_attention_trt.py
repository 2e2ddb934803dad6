"""``flash_attention=trt`` as a rewrite; test_flash_attention_rtx.py builds what it writes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from sdopt.passes.flash_attention import FlashAttention
from tests.passes.attention_graphs import Sizes, bare, block, feeds
from tests.toolkit import apply, leaves, ops, relative_l2, run

NATIVE, WRITTEN_OUT = FlashAttention("trt"), FlashAttention("trt", form="decomposed")
HALF = 5e-3
DECOMPOSED = {"Reshape": 4, "Transpose": 4, "MatMul": 2, "Mul": 1, "Softmax": 1}


@pytest.mark.parametrize(
    "model",
    [
        block(kind="float16"),
        block(kind="float16", mask="float16[B,1,S,T]"),
        block(kind="float16", mask="bool[S,T]"),
        block(kind="float16", attributes="<is_causal=1, scale=0.7>"),
        block(Sizes(kv_heads=2), kind="float16"),
        block(Sizes(size=256, v_size=256), kind="float16"),
        bare("B,4,S,8", kind="bfloat16"),
    ],
    ids=["plain", "masked", "bool", "causal", "grouped", "256", "bf16"],
)
def test_within_the_limits_it_is_there_already(model: ir.Model) -> None:
    leaves(NATIVE, model)
    assert apply(NATIVE, model).present == {"attention": 1}


def test_an_attribute_that_the_parser_refuses_goes() -> None:
    model = block(kind="float16", attributes="<softmax_precision=1>")
    assert apply(NATIVE, model).rewrites == {"attention": 1}
    assert ops(model) == ops(block(kind="float16"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert "softmax_precision" not in node.attributes


def test_a_mask_of_another_type_is_cast() -> None:
    model = block(kind="float16", mask="float[S,T]")
    given = feeds(model, B=2, S=9, T=13)
    (before,) = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    assert apply(NATIVE, model).rewrites == {"attention": 1}
    assert ops(model)["Cast"] == 1
    assert relative_l2(run(model, given)[0], before) < HALF


@pytest.mark.parametrize("lengths", [{"B": 2, "S": 9, "T": 13}, {"B": 1, "S": 33, "T": 7}])
def test_written_out(lengths: dict[str, int]) -> None:
    model = block(kind="float16", mask="float16[S,T]", attributes="<scale=0.7>")
    given = feeds(model, **lengths)
    (before,) = run(model, given)
    assert apply(WRITTEN_OUT, model).rewrites == {"attention": 1}
    assert ops(model) == {**DECOMPOSED, "Add": 1}
    assert relative_l2(run(model, given)[0], before) < HALF


@pytest.mark.parametrize("one", [NATIVE, WRITTEN_OUT], ids=["native", "decomposed"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(), "this is float (put cast_fp16 before)"),
        (block(Sizes(heads=1, kv_heads=1, size=512, v_size=512), kind="float16"), "of 512"),
        (block(Sizes(v_size=257), kind="float16"), "its head size of 257 is above the 256"),
    ],
    ids=["fp32", "512", "257"],
)
def test_what_no_kernel_fuses_is_written_out_and_told(
    one: FlashAttention, model: ir.Model, reason: str
) -> None:
    model = model.clone()
    given = feeds(model, B=2, S=9, T=13)
    (before,) = run(model, given)
    ctx = apply(one, model)
    assert ctx.rewrites == {"decomposed_attention": 1}
    (skip,) = ctx.skips
    assert skip.kind == "attention"
    assert reason in skip.reason
    assert ops(model) == DECOMPOSED
    tolerance = HALF if before.dtype == np.float16 else 2e-6
    assert relative_l2(run(model, given)[0], before) < tolerance


@pytest.mark.parametrize("one", [NATIVE, WRITTEN_OUT], ids=["native", "decomposed"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(kind="float16", attributes="<softcap=5.0>"), "it sets softcap"),
        (bare("B,N,S,8", kind="float16"), "heads or head sizes are not known"),
    ],
)
def test_leaves_alone(one: FlashAttention, model: ir.Model, reason: str) -> None:
    leaves(one, model, reason)
