"""What ``cast_fp16`` has of its own; the rest is in ``test_casts.py``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt.passes.cast_fp16 import CastFp16
from tests.passes.cast_blocks import BLOCK, block_feeds, block_weights, types
from tests.toolkit import apply, model_of, relative_l2, run

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def test_weights_inputs_and_outputs_become_half() -> None:
    model = model_of(BLOCK, block_weights())
    feeds = block_feeds()
    wanted = run(model, feeds)[0]
    apply(CastFp16(), model)
    assert types(model) == {"sample": HALF, "timestep": FLOAT, "out": HALF}
    weight = next(v for n, v in model.graph.initializers.items() if n.startswith("w."))
    assert weight.const_value is not None
    assert weight.const_value.dtype == HALF
    feeds["sample"] = feeds["sample"].astype(np.float16)
    assert relative_l2(run(model, feeds)[0], wanted) < 2e-3


def test_a_weight_beyond_65504_is_named_and_stays() -> None:
    model = model_of(BLOCK, block_weights(scale=1e5))
    for node in model.graph:
        node.metadata_props["sdopt.module"] = f"blocks.7.{node.op_type}"
    wanted = run(model, block_feeds())[0]
    ctx = apply(CastFp16(("io",)), model)
    assert [s.where for s in ctx.skips] == ["blocks.7.MatMul"]
    assert "w holds values beyond 65504" in ctx.skips[0].reason
    assert "w" in model.graph.initializers
    # What the layer hands on is beyond 65504 too, so this graph is honest about its limits:
    # the weight is exact, and the report says where to keep more.
    assert np.isfinite(wanted).all()


def test_scales_of_resize_stay_float32() -> None:
    model = model_of(
        """g (float[1,2,4,4] x) => (float[1,2,8,8] y) {
        y = Resize<mode="nearest">(x, , scales) }""",
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )
    apply(CastFp16(), model)
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float16)
    np.testing.assert_array_equal(run(model, {"x": x})[0], x.repeat(2, 2).repeat(2, 3))
