"""``lower_token_merging``: the same best matches and sums by other operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sdopt import graph
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.passes.clean import Clean
from sdopt.passes.lower_token_merging import LowerTokenMerging
from sdopt.passes.tome import Tome
from sdopt.targets.ort import Ort
from tests.passes import tome_reference as ref

TIGHT = 5e-6

BEST = """
<ir_version: 10, opset_import: ["" : OPSET]>
g (float[B, N] x) => (float[P, M] best, int64[P, M] place)
<int64[1] one = {COUNT}>
{
  best, place = TopK<axis = AXIS, largest = LARGEST>(x, one)
}
"""


def _best(opset=23, count=1, axis=-1, largest=1):
    text = BEST.replace("OPSET", str(opset)).replace("COUNT", str(count))
    text = text.replace("AXIS", str(axis)).replace("LARGEST", str(largest))
    return ir.from_proto(onnx.parser.parse_model(text))


def _lowered(model):
    ctx = ref.context(model)
    LowerTokenMerging().apply(model, ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return ctx


def _run(model, feed):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feed)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_best_match_and_its_place_ties_included(axis):
    x = np.array([[3, 7, 7, 1], [5, 5, 5, 5]], np.float32)
    want = _run(_best(axis=axis), {"x": x})
    model = _best(axis=axis)
    assert _lowered(model).rewrites == {"best_match": 1}
    got = _run(model, {"x": x})
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], [[1], [0]])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize(
    "other", [{"count": 2}, {"largest": 0}, {"axis": 0}, {"opset": 13}], ids=str
)
def test_another_topk_stays(other):
    model = _best(**other)
    assert not _lowered(model).rewrites
    assert graph.op_counts(model) == {"TopK": 1}


@pytest.mark.parametrize("size", [(16, 16), (13, 23)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_merged_unet_computes_the_same(size, ratio):
    feed = ref.inputs(2, *size)
    model = ref.exported()
    Tome(3, ratio).apply(model, ref.context(model))
    want = ref.session(model).run(["out_sample"], feed)[0]
    ctx = _lowered(model)
    assert ctx.rewrites == {"best_match": 3, "token_sum": 6}
    counts = graph.op_counts(model)
    assert counts["ArgMax"] == 3
    assert "Equal" not in counts, "the one-hot matrices are still there"
    got = ref.session(model).run(["out_sample"], feed)[0]
    assert ref.distance(got, want) <= TIGHT


def test_what_a_cast_keeps_in_single_precision_stays_so():
    model = ref.exported()
    ctx = ref.context(model)
    for one in (Tome(1), Clean(), CastFp16()):
        one.apply(model, ctx)
    _lowered(model)
    found = {node.op_type: node for node in model.graph}
    sums = [node for node in model.graph if node.op_type == "ScatterElements"]
    adding = [node for node in sums if graph.attribute(node, "reduction", "none") == "add"]
    assert len(adding) == 2
    assert {node.inputs[2].dtype for node in adding[:1]} == {ir.DataType.FLOAT}
    assert found["ArgMax"].inputs[0].dtype == ir.DataType.FLOAT


def test_cuda_wants_it_and_the_cpu_does_not():
    assert "lower_token_merging" in Ort(provider="cuda").wants
    assert "lower_token_merging" not in Ort().wants
