from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import registry
from sdopt.errors import PassError, SdoptError, SpecError, UnknownNameError
from sdopt.passes.base import Numerics, Pass, PassContext, Role
from sdopt.pipeline import Pipeline, RunContext
from tests.toolkit import model_of, ops

TEXT = "g (float[B,3] x) => (float[B,3] y) { a = Relu(x)\n y = Mul(a, w) }"


def graph() -> ir.Model:
    return model_of(TEXT, {"w": np.ones(3, np.float32)})


@dataclass(frozen=True)
class Breaks(Pass):
    """A pass that breaks one invariant, to see that the runner notices."""

    numerics: ClassVar[Numerics] = Numerics.EXACT
    how: str = "nothing"

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        relu, mul = list(model.graph)
        if self.how == "output name":
            model.graph.outputs[0].name = "z"
        elif self.how == "output type":
            model.graph.outputs[0].dtype = ir.DataType.FLOAT16
        elif self.how == "order":
            model.graph.remove(relu)
            model.graph.append(relu)
        elif self.how == "names":
            relu.outputs[0].name = "y"
        elif self.how == "weight":
            model.graph.initializers["w"].const_value = None
        elif self.how == "checker":
            mul.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)
        elif self.how == "crash":
            raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("output name", "inputs and outputs were"),
        ("output type", "inputs and outputs were"),
        ("order", "reads 'a' before it is made"),
        ("names", "called 'y'|before it is made"),
        ("weight", "'w' has no value"),
        ("checker", "onnx's checker says"),
        ("crash", "RuntimeError: out of ideas"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(how: str, why: str) -> None:
    with pytest.raises(PassError, match="the pass breaks") as caught:
        Pipeline((Breaks(how),)).run(graph(), RunContext("unet"))
    assert caught.value.why
    import re

    assert re.search(why, caught.value.why)
    assert caught.value.where == "unet"


def test_a_report_counts_what_changed() -> None:
    model = model_of(
        "g (float[B,3] x) => (float[B,3] y) { i = Identity(x)\n y = Relu(i) }",
    )
    first, second = Pipeline.parse("clean,clean").run(model, RunContext())
    assert first.changed
    assert first.op_deltas() == {"Identity": -1}
    assert (first.nodes_before, first.nodes_after) == (2, 1)
    assert not second.changed
    assert not second.rewrites


def test_passes_go_only_to_the_components_they_are_for() -> None:
    pipeline = Pipeline.parse("clean,tome=2")
    assert str(pipeline.for_role(Role.DENOISER)) == "clean,tome=2"
    assert str(pipeline.for_role(Role.VAE_DECODER)) == "clean"
    assert str(pipeline.for_role(Role.MODEL)) == "clean,tome=2"


def test_presets_expand_and_print_as_passes() -> None:
    fast = "clean,raise_ops,clean,fuse_qkv,pad_align"
    assert str(Pipeline.parse("@fast,tome=5")) == f"{fast},tome=5"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("nonsense", UnknownNameError, "unknown pass 'nonsense'"),
        ("@nonsense", UnknownNameError, "unknown preset '@nonsense'"),
        ("cast_fp16,clean", SpecError, "cast_fp16 must come after clean"),
        ("missing.recipe", SpecError, "the recipe cannot be read"),
    ],
)
def test_what_is_no_pipeline(text: str, kind: type[SdoptError], message: str) -> None:
    with pytest.raises(kind, match=message):
        Pipeline.parse(text)


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path with one pass and its entry point, as an installed one leaves it."""
    (tmp_path / "their_passes.py").write_text(
        textwrap.dedent('''
        from dataclasses import dataclass
        from typing import ClassVar
        from sdopt.passes.base import Numerics, Pass

        @dataclass(frozen=True)
        class DropRelu(Pass):
            """Drop every Relu."""

            numerics: ClassVar[Numerics] = Numerics.LOSSY
            most: int = 100

            def apply(self, model, ctx):
                for node in list(model.graph)[: self.most]:
                    if node.op_type == "Relu":
                        node.outputs[0].replace_all_uses_with(node.inputs[0])
                        model.graph.remove(node, safe=True)
                        ctx.count("Relu dropped")
        ''')
    )
    info = tmp_path / "their_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sdopt.passes]\ndrop_relu = their_passes:DropRelu\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.table.cache_clear()
    yield info
    registry.table.cache_clear()
    sys.modules.pop("their_passes", None)


def test_a_plug_in_pass_appears_by_itself(plug_in: Path) -> None:
    assert "drop_relu" in registry.table("passes")
    model = graph()
    (report,) = Pipeline.parse("drop_relu:most=1").run(model, RunContext())
    assert ops(model) == {"Mul": 1}
    assert report.rewrites == {"Relu dropped": 1}


def test_a_plug_in_may_not_take_a_name_that_is_taken(plug_in: Path) -> None:
    (plug_in / "entry_points.txt").write_text("[sdopt.passes]\nclean = their_passes:DropRelu\n")
    registry.table.cache_clear()
    with pytest.raises(SdoptError, match="two packages provide the passes name 'clean'") as caught:
        registry.table("passes")
    assert "their-passes" in str(caught.value)


def test_a_plug_in_that_cannot_be_imported_is_named(plug_in: Path) -> None:
    (plug_in / "entry_points.txt").write_text("[sdopt.passes]\ngone = nowhere_at_all:Gone\n")
    registry.table.cache_clear()
    with pytest.raises(SdoptError, match="the plug-in behind 'gone' cannot be loaded"):
        registry.resolve("passes", "gone")


@pytest.mark.parametrize(("version", "expected"), [(3, 4), (8, 8)])
def test_a_weight_that_is_no_input_raises_an_ir_version_that_has_none(
    version: int, expected: int
) -> None:
    model = model_of("""g (float[2] x) => (float[2] y) {
        two = Constant<value_float=2.0>()
        y = Mul(x, two)
    }""")
    model.ir_version, model.opset_imports[""] = version, 12
    (report,) = Pipeline.parse("clean").run(model, RunContext())
    assert report.changed
    assert len(model.graph.initializers) == 1
    assert model.ir_version == expected
