from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from sdopt.passes.flash_attention import FlashAttention
from sdopt.passes.lower_attention import LowerAttention
from tests.passes.attention_graphs import Sizes, bare, block, feeds, hidden_rows
from tests.toolkit import apply, leaves, ops, relative_l2, run

TIGHT = 2e-6
LENGTHS = [{"B": 2, "S": 9, "T": 13}, {"B": 3, "S": 64, "T": 77}]
FORMS = {
    "plain": (Sizes(), "", ""),
    "other values": (Sizes(v_size=6), "", ""),
    "scaled": (Sizes(), "<scale=0.7>", ""),
    "unscaled": (Sizes(), "<scale=1.0>", ""),
    "masked": (Sizes(), "", "float[B,1,S,T]"),
    "masked by bool": (Sizes(), "", "bool[S,T]"),
    "causal": (Sizes(), "<is_causal=1>", ""),
    "causal, of fixed sizes": (Sizes(2, 9, 13), "<is_causal=1>", ""),
    "causal and masked": (Sizes(), "<is_causal=1>", "float[4,S,T]"),
    "grouped": (Sizes(kv_heads=2), "", ""),
    "grouped and masked": (Sizes(kv_heads=1), "", "float[B,4,S,T]"),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_same(form: str) -> None:
    sizes, attributes, mask = FORMS[form]
    model = block(sizes, attributes=attributes, mask=mask)
    given = [feeds(model, **one) for one in LENGTHS]
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    before = [evaluator.run(None, one)[0] for one in given]
    assert apply(LowerAttention(), model).rewrites == {"attention": 1}
    assert "Attention" not in ops(model)
    for one, wanted in zip(given, before, strict=True):
        assert relative_l2(run(model, one)[0], wanted) < TIGHT


@pytest.mark.parametrize("attributes", ["", "<is_causal=1>"])
@pytest.mark.parametrize("mask", ["bool[S,T]", "bool[B,4,S,T]"])
def test_a_query_that_sees_no_key_becomes_zero(mask: str, attributes: str) -> None:
    model = block(mask=mask, attributes=attributes)
    given = hidden_rows(model, **LENGTHS[0])
    (before,) = run(model, given)
    assert not before[:, 1].any()
    apply(LowerAttention(), model)
    (after,) = run(model, given)
    assert not after[:, 1].any()
    assert relative_l2(after, before) < TIGHT


@pytest.mark.parametrize(("key", "extra"), [(0, 0), (1, 1)])
def test_a_stored_mask_is_asked_whether_it_hides_a_query(key: int, extra: int) -> None:
    """One that shows the first key to all costs no second Where, in the causal case too."""
    model = block(mask="bool[S,T]", attributes="<is_causal=1>")
    mask = model.graph.inputs.pop()
    seen = np.zeros((9, 13), bool)
    seen[:, key] = True
    mask.const_value = ir.tensor(seen, name="mask")
    model.graph.initializers.add(mask)
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(LowerAttention(), model)
    assert ops(model)["Where"] == 2 + extra
    assert relative_l2(run(model, given)[0], before) < TIGHT


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 23])
@pytest.mark.parametrize("form", FORMS)
def test_its_operators_mean_the_same_in_every_opset(form: str, opset: int) -> None:
    sizes, attributes, mask = FORMS[form]
    model = block(sizes, attributes=attributes, mask=mask)
    given = feeds(model, **LENGTHS[0])
    apply(LowerAttention(), model)
    (newest,) = run(model, given)
    model.opset_imports[""], model.ir_version = opset, 7 if opset < 18 else 10
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert (run(model, given)[0] == newest).all()


def test_what_it_writes() -> None:
    model = block()
    apply(LowerAttention(), model)
    assert ops(model) == {"Reshape": 4, "Transpose": 4, "MatMul": 2, "Mul": 1, "Softmax": 1}
    scale = next(node for node in model.graph if node.op_type == "Mul")
    scores = next(node for node in model.graph if node.op_type == "MatMul")
    assert scores.inputs[0] is scale.outputs[0], "the scale comes before the first MatMul"


@pytest.mark.parametrize("shape", ["B,4,S,8", "B,S,32"])
def test_operands_as_they_come(shape: str) -> None:
    attributes = "" if shape.count(",") == 3 else "<q_num_heads=4, kv_num_heads=4>"
    model = bare(shape, attributes=attributes)
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(LowerAttention(), model)
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_a_softmax_asked_for_in_float32_stays_there() -> None:
    model = bare("B,4,S,8", attributes="<softmax_precision=1>", kind="float16")
    apply(LowerAttention(), model)
    assert ops(model)["Cast"] == 2
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    cast = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    assert cast is not None
    assert cast.attributes["to"].as_int() == ir.DataType.FLOAT


def test_it_takes_what_a_kernel_left() -> None:
    model = block(Sizes(2, 16, 16), mask="float[S,T]".replace("S,T", "16,16"))
    given = feeds(model)
    (before,) = run(model, given)
    leaves(FlashAttention("duo"), model, "it has a mask")
    apply(LowerAttention(), model)
    assert relative_l2(run(model, given)[0], before) < TIGHT


def test_another_order_of_heads_would_be_seen() -> None:
    model = block(Sizes(kv_heads=2))
    given = feeds(model, **LENGTHS[0])
    (before,) = run(model, given)
    apply(LowerAttention(), model)
    given["k"] = np.roll(given["k"].reshape(2, 13, 2, 8), 1, axis=2).reshape(2, 13, 16)
    assert relative_l2(run(model, given)[0], before) > 1e-2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (block(attributes="<softcap=5.0>"), "it sets softcap"),
        (bare("B,N,S,8"), "heads or head sizes are not known"),
        (bare("B,S,32"), "heads or head sizes are not known"),
    ],
)
def test_leaves_alone(model: ir.Model, reason: str) -> None:
    leaves(LowerAttention(), model, reason)
