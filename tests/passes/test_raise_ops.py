"""raise_ops: every spelling raised with equal numbers, near misses left, mutations seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from sdopt import graph
from sdopt.fingerprint import fingerprint
from sdopt.passes.clean import Clean
from sdopt.passes.fuse_qkv import FuseQkv
from sdopt.passes.raise_ops import RaiseOps
from tests.passes import adopted
from tests.passes import raise_graphs as spelled
from tests.toolkit import Arrays, apply, model_of, ops, relative_l2, run

TOLERANCE = {"float": 5e-6, "float16": 5e-3}
SIZES = {"B": 3, "S": 5, "H": 6, "W": 4}
KINDS = pytest.mark.parametrize("kind", ["float", "float16"])


def feeds(model: ir.Model) -> Arrays:
    rng = np.random.default_rng(1)
    found: Arrays = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [dim if isinstance(dim, int) else SIZES[str(dim.value)] for dim in value.shape]
        found[value.name or ""] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return found


def raised(build: Callable[[], ir.Model], kind: str, op: str) -> ir.Model:
    """The raised graph, checked to hold one ``op`` and to compute what the raw one does."""
    model = build()
    apply(RaiseOps(), model)
    assert ops(model).get(op) == 1, ops(model)
    inputs = feeds(model)
    assert relative_l2(run(model, inputs)[0], run(build(), inputs)[0]) <= TOLERANCE[kind]
    assert graph.opset(model) == 23
    return model


def left(model: ir.Model, reason: str, op: str) -> None:
    """Only the opset moves, and the reason is said."""
    ctx = apply(RaiseOps(), model)
    assert op not in ops(model)
    assert any(reason in skip.reason for skip in ctx.skips), ctx.skips


@KINDS
@pytest.mark.parametrize("shape", ["B,2,S,4", "3,2,5,4"])
@pytest.mark.parametrize(
    "spelling", ["after", "divided", "before", "on keys", "both", "masked", "cast", "shape"]
)
def test_attention_in_four_dimensions(spelling: str, shape: str, kind: str) -> None:
    model = raised(lambda: spelled.attention_4d(kind, shape, spelling=spelling), kind, "Attention")
    assert "Softmax" not in ops(model)


def test_keys_transposed_while_they_are_split() -> None:
    keys = "kt = Transpose<perm=[BSHD]>(k)"
    model = raised(lambda: spelled.attention_4d(keys=keys), "float", "Attention")
    (node,) = [node for node in model.graph if node.op_type == "Transpose"]
    assert list(graph.attribute(node, "perm")) == [0, 2, 1, 3]


@KINDS
@pytest.mark.parametrize("dynamic", [True, False])
def test_attention_with_heads_in_the_batch(dynamic: bool, kind: str) -> None:
    shape = "B,S,8" if dynamic else "3,5,8"
    model = raised(
        lambda: spelled.attention_3d(kind, shape=shape, dynamic=dynamic), kind, "Attention"
    )
    assert not {"Softmax", "ConstantOfShape", "Add"} & set(ops(model))
    assert apply(FuseQkv(), model).rewrites == {"self_attention_qkv": 1}


@KINDS
@pytest.mark.parametrize("shape", ["B,8,H,W", "3,8,6,4"])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(affine: bool, shape: str, kind: str) -> None:
    target = (0, 4, -1) if "B" in shape else (3, 4, 48)
    model = raised(
        lambda: spelled.group_norm(kind, shape, target=target, affine=affine),
        kind,
        "GroupNormalization",
    )
    assert not {"InstanceNormalization", "Mul", "Add"} & set(ops(model))


@KINDS
@pytest.mark.parametrize("shape", ["B,S,8", "3,5,8"])
@pytest.mark.parametrize("spelling", ["div", "mul"])
@pytest.mark.parametrize("centred", [True, False])
def test_layer_and_rms_norm(centred: bool, spelling: str, shape: str, kind: str) -> None:
    op = "LayerNormalization" if centred else "RMSNormalization"
    model = raised(
        lambda: spelled.layer_norm(kind, shape, spelling=spelling, centred=centred), kind, op
    )
    assert ops(model) == {op: 1}


@KINDS
@pytest.mark.parametrize("shape", ["B,6", "3,6"])
@pytest.mark.parametrize("spelling", sorted(spelled.GELUS))
def test_gelu(spelling: str, shape: str, kind: str) -> None:
    model = raised(lambda: spelled.gelu(spelling, kind, shape), kind, "Gelu")
    assert ops(model) == {"Gelu": 1}


NEAR_MISSES: dict[str, tuple[Callable[[], ir.Model], str, str]] = {
    "softmax over queries": (
        lambda: spelled.attention_4d(axis=2),
        "not over the keys",
        "Attention",
    ),
    "groups over the batch": (
        lambda: spelled.group_norm(target=(1, 4, -1), affine=False),
        "groups run over the batch",
        "GroupNormalization",
    ),
    "scaled groups": (
        lambda: spelled.group_norm(ones=2.0),
        "scales each group",
        "GroupNormalization",
    ),
    "uneven groups": (
        lambda: spelled.group_norm(target=(0, 3, -1)),
        "not a multiple of its groups",
        "GroupNormalization",
    ),
    "norm over tokens": (
        lambda: spelled.layer_norm(axis=1),
        "does not run over the last axes",
        "LayerNormalization",
    ),
    "another constant": (lambda: spelled.gelu("tanh", k=0.05), "other constants", "Gelu"),
    "half missing": (lambda: spelled.gelu("x(1+erf)half", half=0.25), "other constants", "Gelu"),
}


@pytest.mark.parametrize("name", sorted(NEAR_MISSES))
def test_near_misses_are_left_with_the_reason(name: str) -> None:
    build, reason, op = NEAR_MISSES[name]
    left(build(), reason, op)


def test_an_unknown_operator_keeps_the_opset() -> None:
    body = "g (float[2,4,1] x, int64 n) => (float[2,3,2] y) { y = DFT<onesided=1>(x, n) }"
    model = model_of(body, opset=17)
    before = fingerprint(model)
    ctx = apply(RaiseOps(), model)
    assert fingerprint(model) == before
    assert graph.opset(model) == 17
    assert any("opset 17 stays: DFT" in skip.reason for skip in ctx.skips)


@pytest.mark.parametrize("opset", [11, 12])
def test_old_spellings_of_axes_and_softmax_mean_the_same(opset: int) -> None:
    body = """g (float[B,4,6] x) => (float[B,12] y) {
        a, b = Split<axis=2, split=[2,4]>(x)
        s = Softmax<axis=1>(b)
        u = Unsqueeze<axes=[0]>(s)
        q = Squeeze<axes=[0]>(u)
        m = ReduceMean<axes=[2], keepdims=1>(a)
        t = ReduceSum<axes=[1], keepdims=1>(q)
        c = Add(q, m)
        d = Dropout<ratio=0.5>(c)
        e = Add(d, t)
        h, i, j, k = Split<axis=2>(e)
        n = Concat<axis=1>(h, i, j)
        y = Flatten<axis=1>(n)
    }"""
    if opset > 11:
        body = body.replace("Dropout<ratio=0.5>", "Dropout")
    model, raw = model_of(body, opset=opset), model_of(body, opset=opset)
    assert apply(RaiseOps(), model).rewrites == {f"opset {opset} to 23": 1}
    inputs = feeds(model)
    assert relative_l2(run(model, inputs)[0], run(raw, inputs)[0]) <= 1e-6


def test_a_group_norm_of_opset_18_gets_a_scale_for_each_channel() -> None:
    body = """g (float[B,8,H,W] x) => (float[B,8,H,W] y) {
        y = GroupNormalization<num_groups=2>(x, s, b) }"""
    weights = {"s": np.array([2, 3], np.float32), "b": np.array([1, -1], np.float32)}
    model = model_of(body, weights, opset=18)
    apply(RaiseOps(), model)
    inputs = feeds(model)
    x = inputs["x"].reshape(3, 2, -1).astype(np.float64)
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    wanted = (n * weights["s"][:, None] + weights["b"][:, None]).reshape(3, 8, 6, 4)
    assert relative_l2(run(model, inputs)[0], wanted) <= 5e-6


def test_a_canonical_graph_stays_as_it_is() -> None:
    body = """g (float[B,2,S,4] q, float[B,8,H,W] x) => (float[B,2,S,4] y, float[B,8,H,W] z) {
        a = Attention<scale=0.5>(q, q, q)
        y = Gelu(a)
        n = GroupNormalization<num_groups=4>(x, s, s)
        i = Sigmoid(n)
        z = Mul(n, i)
    }"""
    model = model_of(body, {"s": np.ones(8, np.float32)})
    before = fingerprint(model)
    ctx = apply(RaiseOps(), model)
    assert fingerprint(model) == before
    assert not ctx.rewrites
    assert not ctx.skips


def _edit(op: str, name: str, value: float | int | str) -> Callable[[ir.Model], None]:
    makers = {float: ir.AttrFloat32, int: ir.AttrInt64, str: ir.AttrString}
    make: Callable[[str, object], ir.Attr] = makers[type(value)]  # type: ignore[assignment]

    def edit(model: ir.Model) -> None:
        (node,) = [node for node in model.graph if node.op_type == op]
        node.attributes[name] = make(name, value)

    return edit


def _swap(op: str) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        (node,) = [node for node in model.graph if node.op_type == op]
        q, k = node.inputs[:2]
        node.replace_input_with(0, k)
        node.replace_input_with(1, q)

    return edit


MUTATIONS: dict[str, tuple[Callable[[], ir.Model], Callable[[ir.Model], None]]] = {
    "scale off by sqrt(2)": (spelled.attention_4d, _edit("Attention", "scale", 0.5 * 2**0.5)),
    "q and k swapped": (spelled.attention_4d, _swap("Attention")),
    "causal": (spelled.attention_4d, _edit("Attention", "is_causal", 1)),
    "group norm epsilon": (spelled.group_norm, _edit("GroupNormalization", "epsilon", 1e-3)),
    "number of groups": (spelled.group_norm, _edit("GroupNormalization", "num_groups", 2)),
    "layer norm epsilon": (spelled.layer_norm, _edit("LayerNormalization", "epsilon", 1e-3)),
    "tanh for erf": (
        lambda: spelled.gelu("x(1+erf)half"),
        _edit("Gelu", "approximate", "tanh"),
    ),
}


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_wrong_rewrite_would_be_seen(name: str) -> None:
    build, edit = MUTATIONS[name]
    model = build()
    apply(RaiseOps(), model)
    inputs = feeds(model)
    wanted = run(build(), inputs)[0]
    assert relative_l2(run(model, inputs)[0], wanted) <= TOLERANCE["float"]
    edit(model)
    assert relative_l2(run(model, inputs)[0], wanted) > 10 * TOLERANCE["float"]


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_a_whole_unet_is_raised_and_fused(processor: type) -> None:
    """Counted from the PyTorch modules; both attentions as torch's older exporter writes them."""
    whole = adopted.unet()
    unet = whole.unet
    kept = unet.attn_processors
    unet.set_attn_processor(processor())
    try:
        arguments = adopted._arguments(16, 16)
        data = adopted.jit(whole, arguments, adopted.INPUTS, "out_sample")
    finally:
        unet.set_attn_processor(kept)
    raw, model = (ir.from_proto(onnx.load_from_string(data)) for _ in range(2))
    apply(Clean(), model)
    found = apply(RaiseOps(), model)
    count = {
        kind: sum(isinstance(module, kind) for module in whole.modules())
        for kind in (Attention, torch.nn.GroupNorm, torch.nn.LayerNorm)
    }
    gelus = sum(type(module).__name__ == "GEGLU" for module in whole.modules())
    assert count[Attention] >= 20
    assert gelus >= 10
    held = ops(model)
    assert held["Attention"] == found.rewrites["attention"] == count[Attention]
    assert held["GroupNormalization"] == count[torch.nn.GroupNorm]
    assert held["LayerNormalization"] == count[torch.nn.LayerNorm]
    assert held["Gelu"] == gelus
    assert not found.skips
    assert not {"Softmax", "Erf", "InstanceNormalization"} & set(held)
    fused = apply(FuseQkv(), model)
    assert sum(fused.rewrites.values()) == count[Attention]
    assert not fused.skips
    for size in ((16, 16), (8, 24)):
        inputs = adopted.feeds(*size)
        answers = [adopted.session(one).run(None, inputs)[0] for one in (model, raw)]
        assert adopted.distance(*answers) <= 5e-6
