"""Every model of onnx's backend tests through ``sdopt optimize``, as docs/zoo.md tells it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sdopt.passes.base import Numerics
from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline
from tests import zoo
from tests.zoo_cases import CHUNKS, cases, chunk
from tests.zoo_numbers import difference


@pytest.mark.parametrize("index", range(CHUNKS))
def test_nothing_crashes_and_no_result_changes(index: int) -> None:
    with zoo.scratch() as folder:
        found = list(zoo.by_case(chunk(index), folder))
    wrong = [
        f"{one.case.name} through {one.spec} ({one.runner}): {one.error}"
        for each in found
        for one in each
        if one.error
    ]
    assert not wrong, "\n".join(wrong)
    recorded = json.loads(zoo.COUNTS.read_text("utf-8"))
    if recorded["versions"] == zoo.versions():
        assert zoo.tally(found) == recorded["chunks"][index], "run python -m tests.zoo"


def test_the_page_says_what_the_chunks_give() -> None:
    recorded = json.loads(zoo.COUNTS.read_text("utf-8"))
    assert zoo.PAGE.read_text("utf-8") == zoo.page(recorded)


def test_every_model_of_the_package_is_in_one_chunk() -> None:
    dealt = [case for index in range(CHUNKS) for case in chunk(index)]
    assert len(dealt) == len(cases()) == len(set(dealt)) > 1500
    assert {case.category for case in dealt} == {
        *("node", "light", "simple", "pytorch-converted", "pytorch-operator"),
    }


def test_every_preset_that_is_not_lossy_is_run() -> None:
    def lossy(spec: str) -> bool:
        return any(p.exactness() is Numerics.LOSSY for p in Pipeline.parse(spec).passes)

    wanted = {f"@{name}" for name in PRESETS if not lossy(f"@{name}")}
    assert wanted
    assert wanted <= set(zoo.SPECS)
    assert not any(map(lossy, zoo.SPECS))


def test_a_changed_result_would_be_seen() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "y"))

    def model(op: str) -> ModelProto:
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [x], [y])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)

    feeds = {"x": np.array([1, -2, 3], np.float32)}
    raw = zoo.Raw.of(model("Abs"), feeds)
    assert (raw.runner, raw.random) == ("ort", False)
    assert difference(raw.run(model("Abs")), raw.wanted, exact=True) == ""
    assert difference(raw.run(model("Neg")), raw.wanted, exact=False)
    assert zoo.Raw.of(model("Bernoulli"), {"x": abs(feeds["x"]) / 4}).random
