"""raise_ops on opset 9 and 10: each operator that was spelled otherwise, against the old graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.passes.raise_ops import RaiseOps
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

SLICED = "y = Slice<starts=[1,0], ends=[4,-1], axes=[2,3]>(x)"
CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "Slice": (SLICED, (9,)),
    "Slice of the first axes": ("y = Slice<starts=[0,1], ends=[1,3]>(x)", (9,)),
    "Slice of inputs": ("y = Slice(x, one, five, axis, two)", (10,)),
    "Upsample": ('y = Upsample<mode="nearest">(x, twice)', (9,)),
    "Upsample between": ('y = Upsample<mode="linear">(x, more)', (9,)),
    "Upsample unevenly": ('y = Upsample<mode="nearest">(x, more)', (9,)),
    "Resize": ('y = Resize<mode="nearest">(x, twice)', (10,)),
    "Resize unevenly": ('y = Resize<mode="nearest">(x, more)', (10,)),
    "Resize between": ('y = Resize<mode="linear">(x, less)', (10,)),
    "Clip": ("y = Clip<min=-0.5, max=0.25>(x)", (9, 10)),
    "Clip from above": ("y = Clip<max=0.25>(x)", (9, 10)),
    "Clip from below": ("y = Clip<min=0.0>(x)", (9, 10)),
    "Clip not at all": ("y = Clip(x)", (9, 10)),
    "Pad": ("y = Pad<pads=[0,0,1,2,0,0,0,1]>(x)", (9, 10)),
    "Pad with a number": ("y = Pad<pads=[0,0,1,2,0,0,0,1], value=-3.0>(x)", (9, 10)),
    "Pad by reflection": ('y = Pad<mode="reflect", pads=[0,0,1,2,0,0,0,1]>(x)', (9, 10)),
    "TopK": ("y, i = TopK<axis=1, k=2>(x)", (9,)),
    "TopK of an input": ("y, i = TopK<axis=1>(x, two)", (10,)),
    "Scatter": ("y = Scatter<axis=1>(x, where, what)", (9, 10)),
    "BatchNormalization": ("y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)", (9, 10)),
    "MaxPool": (
        "y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[1,1]>(x)",
        (9, 10),
    ),
    "AveragePool": ("y = AveragePool<kernel_shape=[2,2]>(x)", (9, 10)),
    "Softmax": ("y = Softmax<axis=1>(x)", (9, 10)),
    "Dropout": ("y = Dropout<ratio=0.5>(x)", (9, 10)),
    "Split": ("a, c = Split<axis=1, split=[1,3]>(x)\n y = Mul(a, c)", (9, 10)),
    "ReduceMean": ("y = ReduceMean<axes=[2,3]>(x)", (9, 10)),
    "OneHot": ("i = ArgMax<axis=1, keepdims=0>(x)\n y = OneHot<axis=-1>(i, two, pair)", (9, 10)),
    "Squeeze": ("a = Unsqueeze<axes=[0]>(x)\n y = Squeeze<axes=[0]>(a)", (9, 10)),
}

FLOATS = {
    "twice": [1, 1, 2, 2],
    "more": [1, 1, 1.5, 2.5],
    "less": [1, 1, 0.5, 1.5],
    "s": [1, 2, 3, 4],
    "b": [0, 1, 0, -1],
    "m": [0.5, 0, 0, 0.25],
    "v": [1, 2, 0.5, 1],
    "pair": [-1, 2],
}
INTEGERS = {"one": [1], "two": [2], "five": [5], "axis": [3]}
POOL: dict[str, np.ndarray] = {
    **{name: np.array(numbers, np.float32) for name, numbers in FLOATS.items()},
    **{name: np.array(numbers, np.int64) for name, numbers in INTEGERS.items()},
    "where": np.array([[[[2, 0, 1]]]], np.int64),
    "what": np.array([[[[9, 8, 7]]]], np.float32),
}


def old(text: str, opset: int, kind: str = "float") -> ir.Model:
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    weights = {name: array for name, array in POOL.items() if name in words}
    model = model_of(f"g ({kind}[N,4,6,7] x) => ({kind}[P,Q,R,S] y) {{ {text} }}", weights, opset)
    model.ir_version = 4
    return model


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name, (_, opsets) in CASES.items() for opset in opsets]
)
def test_an_operator_means_what_it_did(name: str, opset: int) -> None:
    text, _ = CASES[name]
    raw, model = old(text, opset), old(text, opset)
    ctx = apply(RaiseOps(), model)
    assert ctx.rewrites == {f"opset {opset} to 23": 1}
    assert graph.opset(model) == 23
    assert not {"Upsample", "Scatter"} & set(ops(model))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 7)).astype(np.float32)}
    (found,), (wanted,) = run(model, feeds)[:1], run(raw, feeds)[:1]
    assert found.shape == wanted.shape
    assert relative_l2(found, wanted) <= 1e-7


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ('y = Resize<mode="nearest">(x, less)', 10, "does not say how it rounds"),
        ("y, z = Dropout(x)", 9, "has a mask"),
        ('y = ConvTranspose<auto_pad="SAME_UPPER">(x, x)', 9, "pads by itself"),
    ],
)
def test_what_old_opsets_left_open_stays(text: str, opset: int, reason: str) -> None:
    model = old(text, opset)
    leaves(RaiseOps(), model, reason)
    assert graph.opset(model) == opset


def test_below_opset_9_all_stays() -> None:
    leaves(RaiseOps(), old("y = Relu(x)", 8), "opset 8 is not between 9 and 23")


def test_bounds_are_of_the_type_of_what_they_bound() -> None:
    model = old("h = Relu(x)\n y = Clip<min=-0.5, max=0.25>(h)", 10, "float16")
    apply(RaiseOps(), model)
    (clip,) = [node for node in model.graph if node.op_type == "Clip"]
    assert [one.dtype for one in clip.inputs[1:] if one] == [ir.DataType.FLOAT16] * 2
