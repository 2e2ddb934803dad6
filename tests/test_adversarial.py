"""Graphs that are shaped to trip a rewrite, through every pass and the usual pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from sdopt import api
from sdopt.errors import BuildError, PassError, WeightsError
from sdopt.pipeline import Pipeline
from sdopt.tolerance import Intent, Numerics
from tests import zoo
from tests.adversarial import TRAPS
from tests.specs import SPECS, write_adapter
from tests.zoo_numbers import difference

LOWERED = "flash_attention=ort,lower_attention,fuse_geglu,lower_channels_last,fuse_skip_norm"
PIPELINES = [
    "clean,raise_ops,clean",
    "@fast",
    "@fast,lower_group_norm,lower_attention",
    f"@fast,{LOWERED}",
    "@fast_fp16",
]
EMPTY = "attention_of_nothing"
"""onnxruntime's Attention (1.31) takes no sequence of length 0, what it is lowered to does."""

EXCEPT = {("empty_and_zero_dimensional_tensors", "lower_opset=11")}
"""Below opset 14 no Reshape has allowzero: a computed 0 copies, as the pass's page says."""

LONG = "a_chain_of_ten_thousand"
"""Seconds for each step: it goes through one pipeline that holds most of the passes."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with zoo.scratch() as path, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_adapter(path)
        yield path


@pytest.mark.parametrize("name", TRAPS.builders)
def test_no_pass_falls_into_it(name: str, folder: Path) -> None:
    trap = TRAPS.builders[name]()
    source, target = folder / "trap.onnx", folder / "out.onnx"
    onnx.save(trap.model, source)
    raws = [zoo.Raw.of(trap.model, feeds) for feeds in trap.feeds]
    assert all(raw.wanted for raw in raws), "nothing here computes it"
    specs = [f"@fast,lower_group_norm,{LOWERED}"] if name == LONG else [*SPECS, *PIPELINES]
    if name == EMPTY:
        specs = [
            f"lower_attention,{spec}" if "lower_opset" in spec else f"{spec},lower_attention"
            for spec in specs
        ]
    specs = [spec for spec in specs if (name, spec) not in EXCEPT]
    problems = {spec: _problem(spec, source, target, raws) for spec in specs}
    assert {spec: text for spec, text in problems.items() if text} == {}


def _problem(spec: str, source: Path, target: Path, raws: list[zoo.Raw]) -> str:
    """What is wrong with what a spec makes of the model, empty if nothing is."""
    try:
        report = api.optimize_file(source, target, spec)
    except PassError as error:
        return str(error)
    except WeightsError as error:
        refused = spec.startswith("lora=") and "the file adapts 4 weights" in str(error)
        return "" if refused else str(error)
    except BuildError as error:
        # What an opset cannot say is refused, never approximated.
        refused = spec.startswith("lower_opset=") and f"in opset {spec.split('=')[1]}" in str(
            error
        )
        return "" if refused else str(error)
    if not any(one.changed for one in report.components[0].passes):
        return ""
    found = onnx.load(target)
    passes = Pipeline.parse(spec).passes
    kinds = {one.exactness() for one in passes}
    if Numerics.LOSSY in kinds or any(one.intent is not Intent.SAME for one in passes):
        return ""
    if spec.startswith("fix_shapes="):  # at those sizes it takes other feeds, or is none
        raws = [raw for raw in raws if _fits(found, raw.feeds)]
    for raw in raws:
        got: list[Any] = raw.run(found)
        for one, wanted in zip(got, raw.wanted, strict=True):
            if text := difference(one, wanted, exact=kinds == {Numerics.EXACT}):
                return text
    return ""


def _fits(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> bool:
    """Whether the graph takes feeds of these sizes."""
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    return all(
        not fixed or fixed == size
        for name, feed in feeds.items()
        for fixed, size in zip(sizes[name], feed.shape, strict=True)
    )
