"""What holds for every pass in the registry, whoever wrote it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from sdopt import registry, spec
from sdopt.fingerprint import fingerprint
from sdopt.manifest import Step
from sdopt.passes.base import Numerics, Pass, PassContext
from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline, RunContext
from tests.toolkit import model_of

ADAPTER = "adapter.safetensors"
"""A file for the block of these tests, written beside each."""

EXAMPLES = {
    "deep_cache": ["deep_cache=3", "deep_cache=0:steps=1+2+4", "deep_cache=2:cut=1:step=sigma"],
    "hoist": ["hoist", "hoist:prompt=context+pooled:step=sigma"],
    "tome": ["tome=1", "tome=5:ratio=0.25", "tome=2:seed=3"],
    "lora": [f"lora={ADAPTER}", f"lora={ADAPTER}:scale=0.5"],
    "cast_bf16": ["cast_bf16", "cast_bf16:keep=io+LayerNormalization+mid_block.*"],
    "cast_fp16": ["cast_fp16", "cast_fp16:keep=io+LayerNormalization+mid_block.*"],
    "graphsurgeon": ["graphsurgeon=tests.passes.gs_scripts.tidy"],
    "quantize": ["quantize=w8", "quantize=w4:block=16:ends=true", "quantize=w8:keep=Conv+mid.*"],
    "flash_attention": ["flash_attention=ort", "flash_attention=trt:form=decomposed"],
    "lower_opset": ["lower_opset=20", "lower_opset=11"],
    "quick_gelu": ["quick_gelu", "quick_gelu:kernel=ascend"],
    "pad_align": ["pad_align", "pad_align:mode=crop", "pad_align:mode=pad"],
}
"""Specs to try per pass; those that are not listed have no options to vary."""

NAMES = sorted(registry.table("passes"))
SPECS = [text for name in NAMES for text in EXAMPLES.get(name, [name])]


def parse(text: str) -> Pass:
    (one,) = Pipeline.parse(text).passes
    return one


@pytest.fixture(autouse=True)
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that lora's examples name, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    factors = {
        f"w{one}.lora_{kind}.weight": s
        for one in "qkvo"
        for kind, s in (("down", (4, 32)), ("up", (32, 4)))
    }
    rng = np.random.default_rng(1)
    save_file({f"lora_unet_{n}": rng.standard_normal(s) for n, s in factors.items()}, ADAPTER)


@pytest.fixture
def attention_block() -> ir.Model:
    """A self-attention with norm and residual, as a fresh export spells it."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        f"w{one}": (rng.standard_normal((32, 32)) / 6).astype(np.float32) for one in "qkvo"
    }
    weights |= {"gamma": np.ones(32, np.float32), "beta": np.zeros(32, np.float32)}
    weights |= {"heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])}
    lines = ["n = LayerNormalization(x, gamma, beta)"]
    for one in "qkv":
        lines += [
            f"t{one} = Transpose<perm=[1,0]>(w{one})",
            f"m{one} = MatMul(n, t{one})",
            f"r{one} = Reshape(m{one}, heads)",
            f"h{one} = Transpose<perm=[0,2,1,3]>(r{one})",
        ]
    lines += [
        "a = Attention(hq, hk, hv)",
        "b = Transpose<perm=[0,2,1,3]>(a)",
        "f = Reshape(b, flat)",
        "to = Transpose<perm=[1,0]>(wo)",
        "o = MatMul(f, to)",
        "y = Add(o, x)",
    ]
    body = "\n".join(lines)
    return model_of(f"g (float[B,S,32] x) => (float[B,S,32] y) {{\n{body}\n}}", weights)


@pytest.mark.parametrize("name", NAMES)
def test_class_file_and_word_are_one_name(name: str) -> None:
    cls = registry.resolve("passes", name)
    assert cls.name() == name
    assert Path(inspect.getfile(cls)).stem == name
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_pass_has_its_headings(name: str) -> None:
    page = inspect.getdoc(registry.resolve("passes", name)) or ""
    for heading in ("Before / After:", "Applies when:", "Numerics:", "Options:"):
        assert heading in page, f"{name} lacks {heading}"
    for field in dataclasses.fields(registry.resolve("passes", name)):
        assert f"{field.name}:" in page, f"{name} does not document {field.name}"
    numerics = registry.resolve("passes", name).numerics.value
    assert f"\nNumerics: {numerics}" in page, f"{name} declares {numerics}, its page does not"


@pytest.mark.parametrize("text", SPECS)
def test_the_page_of_a_pass_names_every_kind_that_it_counts(
    text: str, attention_block: ir.Model
) -> None:
    (report,) = Pipeline.parse(text).run(attention_block, RunContext())
    page = inspect.getdoc(type(parse(text))) or ""
    for one in report.coverage():
        assert f"``{one.kind}``" in page, f"{text} counts {one.kind}, its page does not say so"


@pytest.mark.parametrize("name", NAMES)
def test_declared_predecessors_exist_or_are_planned(name: str) -> None:
    planned = {"raise_ops"}
    assert set(registry.resolve("passes", name).after) <= set(NAMES) | planned


@pytest.mark.parametrize("text", SPECS)
def test_the_text_of_a_pass_parses_back_to_it(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("text", SPECS)
def test_an_empty_graph_is_fine(text: str) -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Identity(x) }")
    Pipeline.parse(text).run(model, RunContext())


@pytest.mark.parametrize("text", SPECS)
def test_a_second_application_changes_nothing_or_is_refused(
    text: str, attention_block: ir.Model
) -> None:
    pipeline = Pipeline.parse(text)
    pipeline.run(attention_block, RunContext())
    if parse(text).once:
        with pytest.raises(Exception, match="was applied to this stage already"):
            pipeline.refuse_repeats([Step(text, "lossy")], "here")
        return
    before = fingerprint(attention_block)
    (report,) = pipeline.run(attention_block, RunContext())
    assert fingerprint(attention_block) == before
    assert not report.changed


@pytest.mark.parametrize("text", SPECS)
def test_inputs_and_outputs_stay_unless_declared(text: str, attention_block: ir.Model) -> None:
    def signature() -> list[tuple[str | None, str]]:
        graph = attention_block.graph
        return [(v.name, str(v.type)) for v in [*graph.inputs, *graph.outputs]]

    before = signature()
    one = parse(text)
    one.apply(attention_block, PassContext(attention_block))
    assert [name for name, _ in signature()] == [name for name, _ in before]
    assert one.changes_interface() or signature() == before


@pytest.mark.parametrize("text", SPECS)
def test_no_weight_is_read_that_need_not_be(text: str, attention_block: ir.Model) -> None:
    """With weight matrices that cannot be read; only cast_fp16 must look at their range."""

    class Untouchable(ir.LazyTensor):
        def __init__(self, like: ir.TensorProtocol) -> None:
            def read() -> ir.TensorProtocol:
                raise AssertionError(f"{text} read {like.name}")

            super().__init__(
                read, dtype=like.dtype, shape=ir.Shape(like.shape.numpy()), name=like.name
            )

    for value in attention_block.graph.initializers.values():
        if value.const_value is not None and len(value.const_value.shape) == 2:
            value.const_value = Untouchable(value.const_value)
    one = parse(text)
    if one.name() == "cast_fp16":
        with pytest.raises(AssertionError, match="read w"):
            one.apply(attention_block, PassContext(attention_block))
    else:
        one.apply(attention_block, PassContext(attention_block))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_hold_nothing_lossy_but_the_cast_in_their_name(name: str) -> None:
    for one in Pipeline.parse(f"@{name}").passes:
        lossy = one.exactness() is Numerics.LOSSY
        assert not lossy or (one.name().startswith("cast_") and one.name()[5:] in name)


def test_options_are_types_that_the_grammar_can_bind() -> None:
    for name in NAMES:
        cls = registry.resolve("passes", name)
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                value = dataclasses.replace(parse(first_spec(name)), **{field.name: field.default})
                assert spec.bind(cls, spec.unbind(value, name)) == value


def first_spec(name: str) -> str:
    return EXAMPLES.get(name, [name])[0]
