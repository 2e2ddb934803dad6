"""``flash_attention=duo`` and ``a2`` against the kernels' own description."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sdopt import modelfile
from sdopt.errors import PassError
from sdopt.passes.flash_attention import FlashAttention
from sdopt.passes.lower_attention import LowerAttention
from sdopt.pipeline import Pipeline, RunContext
from tests import ascend_ops
from tests.passes.attention_graphs import Sizes, bare, block, feeds
from tests.toolkit import apply, leaves, ops, relative_l2, run

DUO, A2 = FlashAttention("duo"), FlashAttention("a2")
TIGHT, HALF = 2e-6, 5e-3
LEAST = Sizes(1, 1024, 1024, 5, 5, 40, 40)
"""The smallest self-attention that UnpadFlashAttentionMix takes."""


@pytest.mark.parametrize("size", [40, 128, 8, 72, 73, 161, 512])
@pytest.mark.parametrize("lengths", [(16, 16), (17, 77)])
@pytest.mark.parametrize("attributes", ["", "<scale=0.3>"])
def test_duo(size: int, lengths: tuple[int, int], attributes: str) -> None:
    model = block(Sizes(2, *lengths, 3, 3, size, size), attributes=attributes)
    given = feeds(model)
    (before,) = run(model, given)
    assert apply(DUO, model).rewrites == {"attention": 1}
    padded = size not in (40, 128, 72, 512)
    assert ("Slice" in ops(model), "Concat" in ops(model)) == (padded, padded)
    assert relative_l2(ascend_ops.run(model, given, precise=True)[0], before) < TIGHT
    assert relative_l2(ascend_ops.run(model, given)[0], before) < HALF


def test_duo_in_a_half_precision_graph_needs_no_casts() -> None:
    model = block(Sizes(2, 16, 77, 4, 4, 40, 40), kind="float16")
    given = feeds(model)
    (before,) = run(model, given)
    apply(DUO, model)
    assert ops(model) == {"Reshape": 4, "Transpose": 4, "FlashAttentionTik": 1, "Mul": 1}
    assert relative_l2(ascend_ops.run(model, given)[0], before) < HALF


def test_duo_casts_a_float32_graph_around_the_kernel() -> None:
    model = block(Sizes(2, 16, 77, 4, 4, 40, 40))
    apply(DUO, model)
    kernel = next(node for node in model.graph if node.op_type == "FlashAttentionTik")
    assert kernel.domain == ""
    assert not kernel.attributes
    types = [value.dtype for value in (*kernel.inputs, *kernel.outputs) if value is not None]
    assert types == [ir.DataType.FLOAT16] * 4
    assert kernel.outputs[0].shape == ir.Shape([2, 4, 16, 40])


def test_duo_pads_every_operand_of_one_shape_with_the_same_zeros() -> None:
    model = block(Sizes(2, 16, 16))
    apply(DUO, model)
    zeros = [value for value in model.graph.initializers.values() if "zeros" in (value.name or "")]
    assert len(zeros) == 1
    assert len(list(zeros[0].uses())) == 3


def test_a_wrong_scale_would_be_seen() -> None:
    model = block(Sizes(2, 16, 16, 3, 3, 40, 40))
    given = feeds(model)
    (before,) = run(model, given)
    apply(DUO, model)
    mul = next(node for node in model.graph if node.op_type == "Mul")
    mul.outputs[0].replace_all_uses_with(mul.inputs[0])
    assert relative_l2(ascend_ops.run(model, given, precise=True)[0], before) > 1e-2


@pytest.mark.parametrize("attributes", ["", "<scale=0.3>"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a2(attributes: str, kind: str) -> None:
    model = block(LEAST, attributes=attributes, self_attention=True, kind=kind)
    given = feeds(model)
    (before,) = run(model, given)
    assert apply(A2, model).rewrites == {"attention": 1}
    casts = {"Cast": 4} if kind == "float" else {}
    scale = {"Mul": 1} if attributes else {}
    kernel = {"Reshape": 4, "Transpose": 3, "MatMul": 3, "UnpadFlashAttentionMix": 1}
    assert ops(model) == {**kernel, **casts, **scale}
    (after,) = ascend_ops.run(model, given, precise=kind == "float")
    assert relative_l2(after, before) < (TIGHT if kind == "float" else HALF)


def test_a2_reads_and_writes_tokens_before_heads() -> None:
    model = block(LEAST, self_attention=True)
    apply(A2, model)
    kernel = next(node for node in model.graph if node.op_type == "UnpadFlashAttentionMix")
    assert kernel.domain == ""
    assert not kernel.attributes
    assert kernel.outputs[0].shape == ir.Shape([1, 1024, 5, 40])
    (cast,) = kernel.outputs[0].consumers()
    assert cast.attributes["to"].as_int() == ir.DataType.FLOAT


MASK = "it has a mask"
TIK, MIX = "FlashAttentionTik", "UnpadFlashAttentionMix"


@pytest.mark.parametrize(
    ("one", "model", "reason"),
    [
        (DUO, block(Sizes(2, 16, 16), mask="float[16,16]"), MASK),
        (DUO, block(Sizes(2, 16, 16), attributes="<is_causal=1>"), MASK),
        (DUO, block(Sizes(2, 16, 16, kv_heads=2)), "grouped query attention"),
        (DUO, block(Sizes(2, 16, 16, v_size=6)), "another head size"),
        (DUO, block(Sizes(2, 16, 16, size=520, v_size=520)), "its head size is 520"),
        (FlashAttention("duo", pad=False), block(Sizes(2, 16, 16)), "its head size is 8"),
        (DUO, block(Sizes(65, 2, 2)), f"its batch size is 65, and {TIK} takes 1 to 64"),
        (DUO, block(Sizes("B", 2, 2)), "its batch size is not fixed"),
        (DUO, block(Sizes(2, "S", 2)), "its number of queries is not fixed"),
        (DUO, block(Sizes(2, 2, "T")), "its number of keys is not fixed"),
        (DUO, bare("2,4,131073,8", "2,4,16,8"), "its number of queries is 131073"),
        (DUO, bare("2,4,16,8", kind="bfloat16"), "computes in float16, and this is bfloat16"),
        (A2, block(LEAST), "its keys come from another input"),
        (A2, block(LEAST, projected=True), "its keys come from another input"),
        (A2, block(Sizes(3, 1024, 1024, 5, 5, 40, 40)), "its batch size is 3"),
        (A2, block(Sizes(1, 1024, 1024, 4, 4, 40, 40)), "its number of heads is 4"),
        (A2, block(Sizes(1, 1024, 1024, 11, 11, 40, 40)), "its number of heads is 11"),
        (A2, block(Sizes(1, 1024, 77, 5, 5, 40, 40)), "its number of keys is 77"),
        (A2, block(Sizes(1, 4097, 1024, 5, 5, 40, 40)), "its number of queries is 4097"),
        (A2, block(Sizes(1, 1024, 1024, 5, 5, 80, 80)), f"is 80, and {MIX} takes 40 or 64"),
        (A2, block(Sizes("B", 1024, 1024, 5, 5, 40, 40)), "its batch size is not fixed"),
    ],
)
def test_leaves_alone(one: FlashAttention, model: ir.Model, reason: str) -> None:
    leaves(one, model, reason)


def test_onnx_checks_all_but_the_declared_operators() -> None:
    model = block(Sizes(2, 16, 16))
    Pipeline.parse("clean,flash_attention=duo,clean").run(model, RunContext())
    with pytest.raises(onnx.checker.ValidationError, match="FlashAttentionTik"):
        modelfile.check(model)
    modelfile.check(model, {"FlashAttentionTik"})
    model.graph[-1].attributes["flavour"] = ir.AttrInt64("flavour", 1)
    with pytest.raises(onnx.checker.ValidationError, match="flavour"):
        modelfile.check(model, {"FlashAttentionTik"})


def test_operators_that_were_there_before_pass_and_new_ones_do_not() -> None:
    model = block(Sizes(2, 16, 16))
    model.graph[0].op_type = "TheirReshape"
    Pipeline.parse("flash_attention=duo").run(model, RunContext())

    class Wrong(LowerAttention):
        def apply(self, model: ir.Model, ctx: object) -> None:
            model.graph[1].op_type = "Transpoze"

    with pytest.raises(PassError, match="Transpoze"):
        Pipeline((Wrong(),)).run(model, RunContext())


def test_a_vendors_operator_in_a_subgraph_is_known_too() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = a () => (float[2] p) { p = Theirs(x) },
                else_branch = b () => (float[2] q) { q = Identity(x) }
            >
        }"""
    )
    modelfile.check(model, {"Theirs"})
    with pytest.raises(onnx.checker.ValidationError, match="Theirs"):
        modelfile.check(model)
    assert np.array_equal([node.domain for node in model.graph.all_nodes()], ["", "", ""])
