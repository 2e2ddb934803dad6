"""``flash_attention=ort``, and what holds for every kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sdopt import graph, spec
from sdopt.errors import SpecError
from sdopt.passes.base import Numerics
from sdopt.passes.flash_attention import FlashAttention
from sdopt.passes.fuse_qkv import FuseQkv
from sdopt.passes.lower_attention import LowerAttention
from tests.passes.attention_graphs import Sizes, bare, block, feeds
from tests.toolkit import apply, leaves, ops, relative_l2, run

ORT = FlashAttention("ort")
TIGHT = 2e-6
LENGTHS = [{"B": 2, "S": 9, "T": 13}, {"B": 3, "S": 64, "T": 77}]


@pytest.mark.parametrize("v_size", [8, 6])
@pytest.mark.parametrize("attributes", ["", "<scale=0.7>"])
def test_it_computes_the_same(v_size: int, attributes: str) -> None:
    model = block(Sizes(v_size=v_size), attributes=attributes)
    given = [feeds(model, **one) for one in LENGTHS]
    before = [run(model, one)[0] for one in given]
    assert apply(ORT, model).rewrites == {"attention": 1}
    assert ops(model) == {"com.microsoft::MultiHeadAttention": 1}
    assert model.opset_imports["com.microsoft"] == 1
    assert model.graph.outputs[0].name == "y"
    for one, wanted in zip(given, before, strict=True):
        assert relative_l2(run(model, one)[0], wanted) < TIGHT


def test_a_wrong_scale_would_be_seen() -> None:
    model = block(attributes="<scale=0.7>")
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(ORT, model)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    del node.attributes["scale"]
    assert relative_l2(run(model, given)[0], before) > 1e-2


@pytest.mark.parametrize(
    "mask",
    [
        *("float[B,4,S,T]", "float[1,4,S,T]", "float[B,1,S,T]", "float[S,T]", "float[4,S,T]"),
        *("float[B,1,1,T]", "float[1,1,1,T]", "float[1,T]"),
        *("bool[S,T]", "bool[B,1,1,T]", "float16[S,T]"),
    ],
)
def test_every_mask_becomes_a_bias_that_covers_queries_and_keys(mask: str) -> None:
    model = block(mask=mask)
    given = [feeds(model, **one) for one in LENGTHS]
    # onnxruntime's own Attention (1.31) takes no mask of one row, so onnx's is what counts here.
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    before = [evaluator.run(None, one)[0] for one in given]
    unmasked = run(block(), {name: given[0][name] for name in "qkv"})[0]
    assert relative_l2(before[0], unmasked) > 1e-3
    assert apply(ORT, model).rewrites == {"attention": 1}
    whole = mask.endswith("S,T]")
    assert ("Expand" in ops(model)) is not whole
    for one, wanted in zip(given, before, strict=True):
        assert relative_l2(run(model, one)[0], wanted) < TIGHT


def test_causal_with_as_many_keys_as_queries() -> None:
    model = block(Sizes(keys="S"), attributes="<is_causal=1>")
    given = feeds(model, B=2, S=11)
    (before,) = run(model, given)
    apply(ORT, model)
    assert ops(model) == {"com.microsoft::MultiHeadAttention": 1}
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_operands_that_nothing_transposed_are_transposed() -> None:
    model = bare("B,4,S,8")
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(ORT, model)
    assert ops(model) == {"Reshape": 4, "Transpose": 4, "com.microsoft::MultiHeadAttention": 1}
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_operands_of_three_dimensions_are_taken_as_they_are() -> None:
    model = bare("B,S,32", attributes="<q_num_heads=4, kv_num_heads=4>")
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(ORT, model)
    assert ops(model) == {"com.microsoft::MultiHeadAttention": 1}
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_heads_that_were_regrouped_from_other_tokens_are_not_joined() -> None:
    """A Reshape that moves tokens between batch entries is no split into heads."""
    model = block(Sizes(batch=2, queries=6, keys=6))
    for name in ("q_heads", "k_heads", "v_heads"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.array([4, 3, 4, 8]), name=name)
    model.graph.initializers["flat"].const_value = ir.tensor(np.array([2, 6, 32]), name="flat")
    given = feeds(model)
    (before,) = run(model, given)
    apply(ORT, model)
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_another_reader_of_the_heads_still_gets_them() -> None:
    model = block(extra="z = Relu(a)", outputs=", float[B,4,S,8] z")
    given = feeds(model, **LENGTHS[0])
    before = run(model, given)
    apply(ORT, model)
    after = run(model, given)
    assert [relative_l2(a, b) < TIGHT for a, b in zip(after, before, strict=True)] == [True, True]


def test_the_heads_may_be_an_output_of_the_graph() -> None:
    model = block(outputs=", float[B,4,S,8] a")
    given = feeds(model, **LENGTHS[0])
    before = run(model, given)
    apply(ORT, model)
    after = run(model, given)
    assert [relative_l2(a, b) < TIGHT for a, b in zip(after, before, strict=True)] == [True, True]


@pytest.mark.parametrize("one", [ORT, LowerAttention(), FlashAttention("trt", form="decomposed")])
def test_half_precision(one: FlashAttention | LowerAttention) -> None:
    model = block(kind="float16", mask="float16[S,T]")
    given = feeds(model, **LENGTHS[1])
    (wanted,) = run(
        block(mask="float[S,T]"), {name: array.astype(np.float32) for name, array in given.items()}
    )
    apply(one, model)
    (after,) = run(model, given)
    assert after.dtype == np.float16
    assert relative_l2(after, wanted) < 1e-3


class MultiHeadAttention(OpRun):
    """The layouts of onnxruntime's CUDA kernel, from its operator's documentation."""

    op_domain = "com.microsoft"

    def _run(self, q: np.ndarray, k: np.ndarray | None = None, num_heads: int = 0) -> tuple:
        if q.ndim == 5:
            assert k is None
            assert q.shape[3] == 3
            parts = [q[:, :, :, i] for i in range(3)]
        else:
            assert k is not None
            assert k.ndim == 5
            assert k.shape[3] == 2
            split = q.reshape(*q.shape[:2], num_heads, -1)
            parts = [split, k[:, :, :, 0], k[:, :, :, 1]]
        assert parts[0].shape[2] == num_heads
        first, keys, values = (np.swapaxes(part, 1, 2).astype(np.float64) for part in parts)
        scores = first @ np.swapaxes(keys, -1, -2) * first.shape[-1] ** -0.5
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.swapaxes(shares / shares.sum(-1, keepdims=True) @ values, 1, 2)
        return (out.reshape(*out.shape[:2], -1).astype(q.dtype),)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("packed", "self_attention", "matmuls"), [("qkv", True, 1), ("kv", True, 2), ("qkv", False, 2)]
)
def test_packed(packed: str, self_attention: bool, matmuls: int, bias: bool, stored: bool) -> None:
    model = block(self_attention=self_attention, projected=True, bias=bias, stored=stored)
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    ctx = apply(FlashAttention("ort", packed=packed), model)
    assert ctx.rewrites == {"packed_attention": 1, "attention": 1}
    assert ops(model)["MatMul"] == matmuls
    assert ops(model)["Reshape"] == 1
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[MultiHeadAttention])
    (after,) = evaluator.run(None, given)
    assert relative_l2(after, before) < TIGHT


@pytest.mark.parametrize(
    ("model", "fuse", "reason"),
    [
        (block(projected=True, self_attention=True), True, "leave fuse_qkv out"),
        (block(), False, "leave fuse_qkv out"),
        (block(projected=True, mask="float[S,T]"), False, "packed operands take no mask"),
        (block(Sizes(v_size=6), projected=True), False, "another head size"),
    ],
    ids=["fused", "not projected", "masked", "other values"],
)
def test_what_cannot_be_packed_is_written_plainly(
    model: ir.Model, fuse: bool, reason: str
) -> None:
    model = model.clone()
    if fuse:
        apply(FuseQkv(), model)
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    ctx = apply(FlashAttention("ort", packed="kv"), model)
    assert ctx.rewrites == {"attention": 1}
    assert [skip.kind for skip in ctx.skips] == ["packed_attention"]
    assert reason in ctx.skips[0].reason
    assert relative_l2(run(model, given)[0], before) < TIGHT


@pytest.mark.parametrize("one", [ORT, FlashAttention("trt"), FlashAttention("duo")])
def test_a_second_time_changes_nothing(one: FlashAttention) -> None:
    model = block(Sizes(2, 16, 24, size=40, v_size=40), kind="float16")
    apply(one, model)
    leaves(one, model)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(Sizes(kv_heads=2)), "grouped query attention"),
        (bare("B,4,S,8", kind="bfloat16"), "no kernel for bfloat16"),
        (block(attributes="<is_causal=1>"), "not known to be as many"),
        (block(attributes="<softcap=5.0>"), "it sets softcap"),
        (bare("B,N,S,8"), "heads or head sizes are not known"),
        (bare("B,4,S,D"), "heads or head sizes are not known"),
        (bare("B,S,32"), "heads or head sizes are not known"),
    ],
)
def test_leaves_alone(model: ir.Model, reason: str) -> None:
    leaves(ORT, model, reason)


@pytest.mark.parametrize("one", [ORT, LowerAttention(), FlashAttention("trt")])
def test_leaves_a_cache_alone(one: FlashAttention) -> None:
    model = bare("2,4,6,8", "2,4,6,8")
    node = model.graph[0]
    past = [ir.Value(name=n, type=node.inputs[0].type, shape=ir.Shape([2, 4, 3, 8])) for n in "ab"]
    model.graph.inputs.extend(past)
    node.resize_inputs(6)
    node.replace_input_with(4, past[0])
    node.replace_input_with(5, past[1])
    leaves(one, model, "cache of keys and values")


def test_a_place_left_alone_is_told_as_an_attention() -> None:
    model = block(Sizes(kv_heads=2))
    model.graph[-3].metadata_props[graph.MODULE_KEY] = "mid_block.attn1"
    (skip,) = apply(ORT, model).skips
    assert (skip.kind, skip.where) == ("attention", "mid_block.attn1")


@pytest.mark.parametrize(
    "text",
    [
        *("flash_attention=ort", "flash_attention=ort:packed=qkv", "flash_attention=trt"),
        *("flash_attention=trt:form=decomposed", "flash_attention=duo:pad=false"),
        "flash_attention=a2",
    ],
)
def test_options_go_round(text: str) -> None:
    assert str(spec.bind(FlashAttention, spec.parse(text)[0])) == text


@pytest.mark.parametrize(
    "text",
    [
        *("flash_attention", "flash_attention=cuda", "flash_attention=a2:packed=kv"),
        *("flash_attention=ort:form=decomposed", "flash_attention=a2:pad=false"),
    ],
)
def test_wrong_options(text: str) -> None:
    with pytest.raises(SpecError):
        spec.bind(FlashAttention, spec.parse(text)[0])


def test_ascends_kernels_round_to_half_precision() -> None:
    exact = {kernel: FlashAttention(kernel).exactness() for kernel in ("ort", "trt", "duo", "a2")}
    assert exact == {
        "ort": Numerics.REASSOCIATED,
        "trt": Numerics.REASSOCIATED,
        "duo": Numerics.LOSSY,
        "a2": Numerics.LOSSY,
    }
