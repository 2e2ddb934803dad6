"""lower_opset: each operator and whole components in every opset, against the canonical graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sdopt import api, graph, modelfile
from sdopt.errors import BuildError, SpecError
from sdopt.fingerprint import fingerprint
from sdopt.passes.base import PassContext
from sdopt.passes.lower_opset import LowerOpset
from sdopt.passes.raise_ops import RaiseOps
from sdopt.pipeline import Pipeline, RunContext
from sdopt.tolerance import FP32_REASSOCIATED, HALF
from tests import toolkit, zoo_cases, zoo_numbers
from tests.exporters import tiny
from tests.exporters.made import copy_of
from tests.toolkit import Arrays, leaves, model_of, ops, relative_l2, run

OPSETS = range(11, 26)


def lower(model: ir.Model, opset: int) -> PassContext:
    """Apply the pass, and let onnx check everything that it can."""
    ctx = toolkit.apply(LowerOpset(opset), model)
    assert graph.opset(model) == opset
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return ctx


def floats(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


C = {"scale": floats(8, seed=1), "bias": floats(8, seed=2), "wide": floats(4, seed=3)}
X = {"x": floats(2, 8, 6, 4)}
MAP = "float[B,8,H,4] x"


def text_model(text: str, pool: Mapping[str, np.ndarray], opset: int = 23) -> ir.Model:
    """A model from text with those weights of a pool that it names."""
    words = set(re.findall(r"\w+", text))
    return model_of(text, {k: v for k, v in pool.items() if k in words}, opset)


def one(body: str, out: str = MAP.replace("x", "y"), head: str = MAP) -> str:
    return f"g ({head}) => ({out}) {{ {body} }}"


OPERATORS: dict[str, tuple[str, Mapping[str, np.ndarray], Arrays, int, set[str]]] = {
    # name: text, weights, feeds, the opset that brought it, what stands for it before
    "GroupNormalization": (
        one("y = GroupNormalization<num_groups=4, epsilon=0.01>(x, scale, bias)"),
        C,
        X,
        21,
        {"InstanceNormalization", "Reshape", "Shape", "Mul", "Add"},
    ),
    "LayerNormalization": (
        one("y = LayerNormalization<epsilon=0.01>(x, wide, wide)"),
        C,
        X,
        17,
        {"ReduceMean", "Sub", "Pow", "Sqrt", "Add", "Div", "Mul"},
    ),
    "LayerNormalization of two axes": (
        one("y = LayerNormalization<axis=2>(x, both)"),
        {"both": floats(6, 4)},
        X,
        17,
        {"ReduceMean", "Sub", "Pow", "Sqrt", "Add", "Div", "Mul"},
    ),
    "RMSNormalization": (
        one("y = RMSNormalization(x, wide)"),
        C,
        X,
        23,
        {"ReduceMean", "Pow", "Sqrt", "Add", "Div", "Mul"},
    ),
    "Gelu": (one("y = Gelu(x)"), {}, X, 20, {"Div", "Erf", "Add", "Mul"}),
    "Gelu by tanh": (
        one('y = Gelu<approximate="tanh">(x)'),
        {},
        X,
        20,
        {"Pow", "Tanh", "Add", "Mul"},
    ),
    "Mish": (one("y = Mish(x)"), {}, X, 18, {"Softplus", "Tanh", "Mul"}),
    "HardSwish": (one("y = HardSwish(x)"), {}, X, 14, {"HardSigmoid", "Mul"}),
    "Celu": (one("y = Celu<alpha=0.7>(x)"), {}, X, 12, {"Elu", "Div", "Mul"}),
    "Attention": (
        one(
            "y = Attention<is_causal=1>(q, q, x)",
            "float[2,8,6,4] y",
            "float[2,8,6,4] x, float[2,8,6,4] q",
        ),
        {},
        {**X, "q": floats(2, 8, 6, 4, seed=5)},
        23,
        {"Mul", "Transpose", "MatMul", "Less", "Reshape", "Where", "Softmax"},
    ),
    "Trilu": (
        one("y = Trilu<upper=0>(x, k)"),
        {"k": np.array(1)},
        X,
        14,
        {"Shape", "Gather", "Range", "Reshape", "Sub", "Greater", "Where"},
    ),
    "GreaterOrEqual": (
        one("b = GreaterOrEqual(x, wide)\n y = Cast<to=1>(b)"),
        C,
        X,
        12,
        {"Greater", "Equal", "Or", "Cast"},
    ),
    "CastLike": (one("b = CastLike(x, x)\n y = Identity(b)"), {}, X, 15, {"Cast", "Identity"}),
}
"""Operators that some of the opsets lack."""


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_itself_where_the_opset_has_it(name: str, opset: int) -> None:
    body, weights, feeds, since, parts = OPERATORS[name]
    model = text_model(body, weights)
    wanted = run(model, feeds)
    ctx = lower(model, opset)
    (found,) = run(model, feeds)
    assert relative_l2(found, wanted[0]) < FP32_REASSOCIATED
    if opset >= since:
        assert name.split()[0] in ops(model)
        assert "operator" not in ctx.rewrites
    else:
        assert name.split()[0] not in ops(model)
        assert ctx.rewrites["operator"] == 1
        assert not parts or set(ops(model)) - {"Slice"} == parts


SIGNATURES = {
    "axes": """
        m = ReduceMean<keepdims=0>(x, last)
        s = ReduceSum(m, last)
        d = Squeeze(s, last)
        u = Unsqueeze(d, last)
        y = Unsqueeze(u, last)""",
    "Split": """
        a, b = Split<axis=1, num_outputs=2>(x)
        c, d, e = Split<axis=1>(a, sizes)
        f, g, h = Split<axis=1, num_outputs=3>(x)
        y = Concat<axis=1>(h, g, f, e, d, c, b)""",
    "Pad": 'y = Pad<mode="constant">(x, pads, , last)',
    "Shape": """
        s = Shape<start=1, end=3>(x)
        t = Concat<axis=0>(pair, s, minus)
        r = Reshape<allowzero=1>(x, whole)
        y = Reshape(r, t)""",
    "Softmax": "a = Softmax<axis=1>(x)\n b = Softmax(x)\n c = LogSoftmax<axis=-2>(x)\n"
    "d = Add(a, b)\n y = Add(c, d)",
    "Pow": "y = Pow(x, two)",
    "Clip of whole numbers": """
        i = Cast<to=7>(x)
        a = Clip(i, low, high)
        b = Max(i, zero0)
        c = Min(a, b, high)
        y = Cast<to=1>(c)""",
    "Resize": """
        s = Shape(x)
        u = Resize<mode="nearest">(x, , scales)
        y = Resize<mode="linear">(u, , , s)""",
    "Resize of two axes": 'y = Resize<mode="nearest", axes=[2,3]>(x, , halves)',
    "Constant": "c = Constant<value_floats=[1.0,2.0,3.0,4.0]>()\n y = Mul(x, c)",
    "Dropout": "y = Dropout(x, ratio)",
}
NUMBERS: dict[str, np.ndarray] = {
    "last": np.array([-1]),
    "sizes": np.array([1, 2, 1]),
    "pads": np.array([1, 2]),
    "pair": np.array([2]),
    "minus": np.array([-1]),
    "whole": np.array([2, -1]),
    "two": np.array(2),
    "low": np.array(-1),
    "high": np.array(1),
    "zero0": np.array(0),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "halves": np.array([2, 3], np.float32),
    "ratio": np.array(0.5, np.float32),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_that_changed_means_the_same(name: str, opset: int) -> None:
    body = SIGNATURES[name]
    head = "g (float[B,8,H,4] x) => (float[N,M,K,L] y)"
    model = text_model(f"{head} {{ {body} }}", NUMBERS)
    wanted = run(model, X)
    lower(model, opset)
    for found, want in zip(run(model, X), wanted, strict=True):
        assert found.shape == want.shape
        assert relative_l2(found, want) < FP32_REASSOCIATED


@pytest.mark.parametrize("opset", [11, 17, 20, 22])
@pytest.mark.parametrize("name", ["GroupNormalization", "LayerNormalization", "RMSNormalization"])
def test_in_half_precision_statistics_are_float32(name: str, opset: int) -> None:
    body, weights, feeds, *_ = OPERATORS[name]
    half = {key: value.astype(np.float16) for key, value in weights.items()}
    # Squares of these pass 65504, which only float32 holds.
    large = {"x": (feeds["x"] * 600).astype(np.float16)}
    model = text_model(body.replace("float[", "float16["), half)
    (wanted,) = run(text_model(body, weights), {"x": large["x"].astype(np.float32)})
    lower(model, opset)
    (found,) = run(model, large)
    assert relative_l2(found, wanted) < HALF["float16"]


@pytest.mark.parametrize("opset", [13, 17, 22])
def test_what_has_no_rule_is_what_onnx_defines(opset: int) -> None:
    head = "float[2,8,6,4] x, float[2,6,2] cos, float[2,6,2] sin"
    text = f"g ({head}) => (float[2,8,6,4] y) {{ y = RotaryEmbedding(x, cos, sin) }}"
    model, feeds = model_of(text), {**X, "cos": floats(2, 6, 2), "sin": floats(2, 6, 2, seed=1)}
    (wanted,) = run(model, feeds)
    ctx = lower(model, opset)
    assert relative_l2(run(model, feeds)[0], wanted) < FP32_REASSOCIATED
    assert ctx.rewrites["operator"] == 1
    assert not model.functions
    with pytest.raises(BuildError, match="sizes are computed"):
        lower(model_of(text), 12)


def test_gelu_in_half_precision() -> None:
    body = OPERATORS["Gelu"][0]
    model = model_of(body.replace("float[", "float16["))
    half = {"x": X["x"].astype(np.float16)}
    (wanted,) = run(model, half)
    lower(model, 17)
    assert relative_l2(run(model, half)[0], wanted) < HALF["float16"]


@pytest.mark.parametrize(
    ("body", "opset", "words"),
    [
        ("y = Attention<softcap=2.0>(x, x, x)", 17, "sets softcap"),
        ("r = ReduceMean<keepdims=1>(x, axes)\n y = Identity(r)", 17, "its axes are computed"),
        ("y = BitCast<type=1>(x)", 25, "no such operator"),
        ('y = Resize<mode="linear", antialias=1>(x, , scales)', 17, "antialias came later"),
        ('y = Pad<mode="wrap">(x, axes)', 18, "wrap came later"),
        ("a, b = Split<axis=2, num_outputs=2>(x)\n y = Concat<axis=2>(a, b)", 17, "not known"),
        ('y = Einsum<equation="bchw->bchw">(x)', 11, "no such operator"),
    ],
)
def test_what_an_opset_cannot_say_is_refused(body: str, opset: int, words: str) -> None:
    given = 26 if "BitCast" in body else 23
    head = "float[2,8,H,4] x, int64[N] axes"
    weights = {"scales": NUMBERS["scales"]} if "scales" in body else {}
    model = model_of(f"g ({head}) => (float[A,B,C,D] y) {{ {body} }}", weights, given)
    for node in model.graph:
        node.metadata_props[graph.MODULE_KEY] = "down_blocks.0.it"
    with pytest.raises(BuildError, match=words) as caught:
        LowerOpset(opset).apply(model, PassContext(model))
    assert "down_blocks.0.it" in str(caught.value)
    assert f"opset {opset}" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("opset", "least"), [(17, 22), (12, 22), (21, 22)])
def test_bfloat16_is_refused_where_an_operator_had_none(opset: int, least: int) -> None:
    text = (
        "g (bfloat16[B,3,H,W] x, bfloat16[4,3,1,1] w) => (bfloat16[B,4,H,W] y) { y = Conv(x, w) }"
    )
    model = model_of(text)
    with pytest.raises(BuildError, match="it had no bfloat16") as caught:
        LowerOpset(opset).apply(model, PassContext(model))
    assert f"lower_opset={least}" in str(caught.value)
    assert "cast_fp16" in str(caught.value)
    lower(model_of(text), 22)


def test_what_is_older_or_of_that_opset_stays() -> None:
    text = one("y = Relu(x)")
    leaves(LowerOpset(23), model_of(text))
    leaves(LowerOpset(20), model_of(text, opset=17), "it is of opset 17, which is older")
    leaves(LowerOpset(25), model_of(text, opset=22), "raise_ops brings it to 23")


def test_a_file_that_is_newer_than_its_opset_gets_that_ones_version() -> None:
    model = model_of(one("y = Relu(x)"), opset=17)
    model.ir_version = 14
    found = PassContext(model)
    LowerOpset(17).apply(model, found)
    assert model.ir_version == 8
    assert found.rewrites == {"IR version 14 to 8": 1}
    leaves(LowerOpset(17), model)


def test_operators_of_others_stay() -> None:
    body = "a = FlashAttentionTik(x, x, x)\n b = com.microsoft.FastGelu(a)\n y = Relu(b)"
    model = model_of(one(body))
    model.opset_imports["com.microsoft"] = 1
    LowerOpset(17).apply(model, PassContext(model))
    assert ops(model) == {"FlashAttentionTik": 1, "com.microsoft::FastGelu": 1, "Relu": 1}
    assert (graph.opset(model), model.ir_version) == (17, 8)


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_bodies_are_written_in_the_opset_too(opset: int) -> None:
    text = """g (bool c, float[2,8,6,4] x) => (float[2,8,6,4] y) {
        y = If(c) <
            then_branch = t () => (float[2,8,6,4] a) { g = Gelu(x) a = Identity(g) },
            else_branch = e () => (float[2,8,6,4] b) {
                m = ReduceMean<keepdims=1>(x, last)
                b = Sub(x, m)
            }>
    }"""
    model = text_model(text, NUMBERS)
    for choice in (True, False):
        given = {**X, "c": np.array(choice)}
        (wanted,) = run(text_model(text, NUMBERS), given)
        if graph.opset(model) != opset:
            lower(model, opset)
        assert relative_l2(run(model, given)[0], wanted) < FP32_REASSOCIATED
    assert "Gelu" not in ops(model)


def test_a_local_function_is_refused() -> None:
    model = model_of(one("y = Relu(x)"))
    function = ir.Function("own", "F", graph=ir.Graph([], [], nodes=[]), attributes=[])
    model.functions[function.identifier()] = function
    with pytest.raises(BuildError, match="raise_ops inlines them"):
        LowerOpset(17).apply(model, PassContext(model))


@pytest.mark.parametrize("text", ["lower_opset=10", "lower_opset=26", "lower_opset=new"])
def test_opsets_that_there_are_not(text: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(text)


def test_what_was_lowered_is_raised_to_what_it_was() -> None:
    for name in ("GroupNormalization", "LayerNormalization", "Gelu", "Attention"):
        body, weights, *_ = OPERATORS[name]
        model = text_model(body.replace("<is_causal=1>", ""), weights)
        lower(model, 14)
        toolkit.apply(RaiseOps(), model)
        assert ops(model).get(name) == 1, ops(model)


# Onnx's own models of single operators, with what differs for another reason than the pass.
ODD = {
    "test_maxpool_2d_ceil_output_size_reduce_by_one": "onnx infers another size before opset 22",
    "test_averagepool_2d_ceil_last_window_starts_on_pad": "the same",
    "test_reshape_allowzero_reordered": "a computed target of 0, of a tensor without elements",
    "test_max_uint64": "onnxruntime has no Where of uint64 in opset 9",
    "test_min_uint64": "the same",
    "test_swish": "onnxruntime runs the function body of Swish up to opset 24 only",
}


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_onnx_models_of_single_operators_compute_the_same(opset: int) -> None:
    wrong, right = [], 0
    for case in zoo_cases.cases():
        random = case.name.startswith("test_bernoulli")
        if case.category != "node" or case.name in ODD or random:
            continue
        proto, feeds, _ = case.load()
        given = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        if not (opset < given <= 26 or 23 <= given < opset):
            continue
        runner, wanted = zoo_numbers.raw_result(proto, feeds)
        model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
        try:
            LowerOpset(opset).apply(model, PassContext(model))
        except BuildError:
            continue
        found = ir.to_proto(model)
        onnx.checker.check_model(found, full_check=True)
        if runner == "none":
            continue
        if text := zoo_numbers.difference(
            zoo_numbers.RUNNERS[runner](found, feeds), wanted, exact=False
        ):
            wrong.append(f"{case.name}: {text}")
        right += 1
    assert not wrong
    assert right > 30


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion pipeline as a bundle, cleaned."""
    _, bundle = copy_of("sd1", tmp_path_factory)
    api.optimize(bundle, "@fast")
    return bundle


FEEDS: dict[str, Arrays] = {
    "unet": {
        "sample": floats(2, 4, 8, 16),
        "timestep": np.array(501, np.float32),
        "encoder_hidden_states": floats(2, 77, 24),
    },
    "text_encoder": {"input_ids": np.arange(154).reshape(2, 77) % tiny.VOCABULARY},
    "vae_encoder": {"sample": floats(1, 3, 32, 16)},
    "vae_decoder": {"latent_sample": floats(1, 4, 4, 8)},
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", FEEDS)
def test_whole_components_in_every_opset(
    components: Path, tmp_path: Path, name: str, opset: int
) -> None:
    source = components / name / "optimized.onnx"
    model = modelfile.load(source)
    (report,) = Pipeline.parse(f"lower_opset={opset}").run(model, _context())
    assert graph.opset(model) == opset
    assert {node.domain for node in graph.nodes(model)} == {""}
    assert report.changed == (opset != 23)
    path = tmp_path / "model.onnx"
    modelfile.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    feeds = _typed(model, FEEDS[name])
    wanted, found = (_run(one, feeds) for one in (source, path))
    assert relative_l2(found, wanted) < FP32_REASSOCIATED


def test_no_weight_of_a_component_is_copied(components: Path, tmp_path: Path) -> None:
    model = modelfile.load(components / "unet" / "optimized.onnx")
    inside = sum(v.const_value is not None for v in modelfile.initializers(model))
    Pipeline.parse("lower_opset=11").run(model, _context())
    saved = modelfile.save(model, components / "unet" / "opset11.onnx")
    assert inside
    assert saved.bytes_written == 0
    again = modelfile.load(components / "unet" / "opset11.onnx")
    assert fingerprint(again) == fingerprint(model)


def _context() -> RunContext:
    return RunContext()


def _typed(model: ir.Model, feeds: Arrays) -> Arrays:
    """The feeds in the types and ranks that the graph declares."""
    found = {}
    for value in model.graph.inputs:
        array = feeds[value.name or ""]
        assert value.dtype is not None
        found[value.name or ""] = array.astype(value.dtype.numpy())
    return found


def _run(path: Path, feeds: Arrays) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return np.asarray(ort.InferenceSession(str(path), options).run(None, dict(feeds))[0])
