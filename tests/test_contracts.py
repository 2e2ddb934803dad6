"""What holds for every pass in the registry, whoever wrote it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from sdopt import registry, spec
from sdopt.cli.app import app
from sdopt.fingerprint import fingerprint
from sdopt.manifest import RECORD_KEY, StageRecord, Step
from sdopt.passes.base import Numerics, Pass, PassContext
from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline, RunContext
from tests.specs import EXAMPLES, NAMES, SPECS, write_adapter
from tests.toolkit import model_of


def parse(text: str) -> Pass:
    (one,) = Pipeline.parse(text).passes
    return one


@pytest.fixture(autouse=True)
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that lora's examples name, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path)


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
def test_a_graph_that_gives_nothing_to_do_stays_to_the_byte(text: str) -> None:
    one = parse(text)
    model = nothing_for(one)
    before = serialized(model)
    one.apply(model, PassContext(model))
    assert serialized(model) == before


@pytest.mark.parametrize("text", SPECS)
def test_a_file_that_gives_nothing_to_do_keeps_its_bytes(text: str, tmp_path: Path) -> None:
    """What ``sdopt optimize FILE -o FILE`` writes is the input and, behind it, the record."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(serialized(nothing_for(parse(text))))
    found = CliRunner().invoke(app, ["optimize", str(source), "-o", str(out), "--passes", text])
    assert found.exit_code == 0, found.output
    written = out.read_bytes()
    assert written.startswith(source.read_bytes())
    behind = onnx.ModelProto.FromString(written[source.stat().st_size :])
    assert [entry.key for entry in behind.metadata_props] == [RECORD_KEY]
    (step,) = StageRecord.loads(behind.metadata_props[0].value, str(out)).history
    assert (step.spec, step.changed) == (text, False)
    del behind.metadata_props[:]
    assert behind == onnx.ModelProto()


def nothing_for(one: Pass) -> ir.Model:
    """An integer graph with names, metadata, a body and an unused opset that nobody rewrites.

    What lora looks for is a weight that its adapter names, and merging it is something to do:
    it gets a graph into which the adapter was merged before.
    """
    model = model_of(
        """g (int64[N,3] x, bool[1] flag) => (int64[N,3] y) {
            a = Add(x, w)
            y = If (flag) <
                then_branch = t () => (int64[N,3] b) { b = Neg(a) },
                else_branch = e () => (int64[N,3] c) { c = Mul(a, x) }
            >
        }""",
        {"w": np.arange(3)},
        opset=getattr(one, "opset", 23),
    )
    if opset := getattr(one, "opset", None):  # a version of the file beyond it would be lowered
        model.ir_version = onnx.helper.find_min_ir_version_for(
            [onnx.helper.make_opsetid("", opset)]
        )
    if one.name() == "lora":
        weights = {f"w{each}": np.ones((32, 32), np.float32) for each in "qkvo"}
        body = "a = MatMul(x, wq) b = MatMul(a, wk) c = MatMul(b, wv) y = MatMul(c, wo)"
        model = model_of(f"g (float[N,32] x) => (float[N,32] y) {{ {body} }}", weights)
        one.apply(model, PassContext(model))
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    model.producer_name, model.doc_string = "someone", "theirs"
    model.metadata_props["theirs"] = "kept"
    model.opset_imports["theirs"] = 7
    for index, node in enumerate(model.graph):
        node.name, node.doc_string = f"node {index}", "as written"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'block']"
    return model


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


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
