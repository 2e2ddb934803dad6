"""``pad_align`` and sizes that tracing froze: arithmetic that is exact stays, the rest goes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import graph
from tests.passes.pad_graphs import (
    ASYMMETRIC,
    BLOCK,
    FROZEN,
    HALVES,
    JOIN,
    UP,
    align,
    left_alone,
    lines,
    run,
    tokens,
)


def test_sizes_that_follow_the_skip_are_right_already() -> None:
    live = "ks = Shape(skip) hw = Slice(ks, i2, i4) to = Concat <axis=0> (bc, hw)"
    up = f"up = Resize <mode='nearest', {ASYMMETRIC}> (down, , , to)"
    assert left_alone(tokens(live + up + JOIN)) == []


def test_sizes_that_are_exact_arithmetic_on_the_input_are_right_already() -> None:
    up = f"up = Resize <mode='nearest', {ASYMMETRIC}> (down, , , to)"
    assert left_alone(tokens("to = Concat <axis=0> (bc, h, w)" + up + JOIN)) == []


@pytest.mark.parametrize(
    "sizes",
    [
        FROZEN + "to = Concat <axis=0> (bc, fh, fw)",
        "ds = Shape(down) dhw = Slice(ds, i2, i4) hw = Mul(dhw, i2) to = Concat <axis=0> (bc, hw)",
        "to = Concat <axis=0> (bc, i8, i8)",
    ],
    ids=["frozen arithmetic", "twice its input", "constants"],
)
@pytest.mark.parametrize("mode", ["resize", "crop"])
def test_sizes_that_hold_only_where_traced_are_replaced(sizes: str, mode: str) -> None:
    up = f"up = Resize <mode='nearest', {ASYMMETRIC}> (down, , , to)"
    model = tokens(sizes + up + JOIN)
    before = tokens(sizes + up + JOIN)
    assert align(model, mode).rewrites == {"upsampler": 1}
    assert run(model, 7, 5).shape == (1, 4, 7, 5)
    np.testing.assert_array_equal(run(model, 8, 8), run(before, 8, 8))


def test_frozen_reshapes_take_their_sizes_from_live_tensors() -> None:
    model = tokens(FROZEN + UP + BLOCK)
    assert align(model).rewrites == {"upsampler": 1, "baked_size": 2}
    text = lines(model)
    assert text[text.index("joined = Concat(Resize_out, skip)") :] == [
        "joined = Concat(Resize_out, skip)",
        "nhwc = Transpose(joined)",
        "b = Slice(s, [0], [1])",
        "Concat_out_1 = Concat(b, [-1], [4])",
        "t = Reshape(nhwc, Concat_out_1)",
        "split = Concat(b, [-1], [2], [2])",
        "heads = Reshape(t, split)",
        "swapped = Transpose(heads)",
        "merge = Concat(b, [-1], [4])",
        "merged = Reshape(swapped, merge)",
        "projected = MatMul(merged, k)",
        "r = Add(projected, t)",
        "Shape_out_2 = Shape(nhwc)",
        "Slice_out_2 = Slice(Shape_out_2, [1], [2])",
        "Shape_out_3 = Shape(nhwc)",
        "Slice_out_3 = Slice(Shape_out_3, [2], [3])",
        "Concat_out_2 = Concat(b, Slice_out_2, Slice_out_3, [4])",
        "image = Reshape(r, Concat_out_2)",
        "out = Transpose(image)",
    ]
    assert not {"Div", "Mul", "Sub"} & set(graph.op_counts(model)), "the arithmetic is dead"
    assert run(model, 7, 5).shape == (1, 4, 7, 5)
    np.testing.assert_array_equal(run(model, 8, 6), run(tokens(FROZEN + UP + BLOCK), 8, 6))
    assert left_alone(model) == []


def test_a_flattening_that_is_free_already_is_still_found() -> None:
    body = FROZEN + UP + BLOCK.replace("(b, fhw, i4)", "(b, m1, i4)")
    model = ShapeInferencePass()(tokens(body)).model
    assert align(model).rewrites == {"upsampler": 1, "baked_size": 1}
    assert run(model, 7, 5).shape == (1, 4, 7, 5)


def test_reshapes_with_exact_arithmetic_stay() -> None:
    flatten = """
      b = Slice(s, i0, i1) hw = Mul(hh, ww) flat = Concat <axis=0> (b, i2, hw)
      t = Reshape(down, flat) whole = Concat <axis=0> (b, i2, hh, ww) d2 = Reshape(t, whole)
    """
    body = HALVES + flatten + UP.replace("down", "d2") + JOIN
    model = tokens(body)
    assert align(model).rewrites == {"upsampler": 1}
    assert [line for line in lines(model) if "Reshape" in line] == [
        "t = Reshape(down, flat)",
        "d2 = Reshape(t, whole)",
    ]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("whole = Concat <axis=0> (m1, fh, fw, i2)", "no live tensor to take it from"),
        ("whole = Concat <axis=0> (m1, i2, fhw)", "no live tensor to take it from"),
    ],
    ids=["not flattened before", "two unknowns"],
)
def test_a_frozen_reshape_without_a_source_is_reported(block: str, reason: str) -> None:
    body = FROZEN + UP + JOIN + block + "other = Reshape(up, whole)"
    ctx = align(tokens(body))
    assert [skip.reason for skip in ctx.skips] == [f"Reshape with a frozen size, and {reason}"]
    assert ctx.rewrites == {"upsampler": 1}


def test_other_readers_of_frozen_sizes_are_reported() -> None:
    expand = "one = Slice(s, i0, i1) to = Concat <axis=0> (one, i2, fh, fw) e = Expand(k3, to)"
    (skip,) = align(tokens(FROZEN + expand + UP + JOIN)).skips
    assert skip.reason == "Expand with a size that holds only where it was traced"
