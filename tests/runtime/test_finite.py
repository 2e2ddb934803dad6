"""A graph that computes NaN or infinity is named, and nothing black is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import sdopt
from sdopt.bundle import Bundle
from sdopt.errors import NotFiniteError
from sdopt.runtime.generate import generate
from tests.runtime import toy

WEIGHTS = {"text_encoder": "table", "unet": "mix", "vae_decoder": "kernel"}


def broken(path: Path, component: str, number: float, **record: object) -> Bundle:
    """A bundle where a stage of one component holds a number in all of a weight."""
    made = toy.bundle(path)
    model = made.stage(component, "model").load()
    value = model.graph.initializers[WEIGHTS[component]]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), number), name=value.name)
    with made.lock():
        made.commit(model, toy.record(component, "half", **record))
    return made


@pytest.mark.parametrize("component", WEIGHTS)
def test_the_first_component_is_named(tmp_path: Path, component: str) -> None:
    made = broken(tmp_path / "bundle", component, float("nan"))
    with pytest.raises(NotFiniteError, match=f"^{component} computed [1-9]") as caught:
        list(generate(made, ["a one"], steps=2, stage="half"))
    error = caught.value
    assert f"{component}/half.onnx, output" in str(error.where)
    assert error.why is None
    assert f"sdopt precision {made.path} -c {component}" in str(error.hint)
    assert f"sdopt inspect {made.path} -c {component} --weights" in str(error.hint)
    assert error.exit_code == 1


def test_infinity_in_half_precision(tmp_path: Path) -> None:
    made = broken(tmp_path / "bundle", "vae_decoder", float("inf"), dtype="float16")
    pipeline = sdopt.load_pipeline(made, stage="half")
    with pytest.raises(NotFiniteError, match="infinities") as caught:
        pipeline("a one", num_inference_steps=2)
    assert "65504" in str(caught.value.why)


def test_large_numbers_are_no_business_of_it(tmp_path: Path) -> None:
    made = broken(tmp_path / "bundle", "vae_decoder", 1e30)
    assert len(list(generate(made, ["a one"], steps=2, stage="half"))) == 1
