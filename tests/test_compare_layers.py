from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.compare import compare_layers
from sdopt.compare.layer_report import FLOOR, LayerComparison, page
from sdopt.compare.looking import layers_of
from sdopt.errors import UsageError
from tests.browser import opened
from tests.exporters import made
from tests.runtime import toy
from tests.toolkit import model_of

SMALL = {"height": 8, "width": 16, "sequence_length": 7}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A tiny pipeline's checkpoint and its bundle, with the stages that are compared here."""
    source, copy = made.copy_of("sd1", tmp_path_factory)
    for stage, passes in (
        ("optimized", "@fast"),
        ("fp16", "@fast,cast_fp16:keep=io"),
        ("hoisted", "@fast,hoist"),
        ("merged", "@fast,tome=2"),
    ):
        api.optimize(copy, passes, stage=stage, components=["unet"])
    return source, Bundle.open(copy)


def layers(
    a: str | Path, b: str | Path, component: str = "unet", **more: object
) -> LayerComparison:
    options: dict[str, object] = {"components": [component], **more}
    if component == "unet":
        options.setdefault("sizes", SMALL)
    (found,) = compare_layers(a, b, **options)  # type: ignore[arg-type]
    return found


def at(bundle: Bundle, stage: str) -> str:
    return f"{bundle.path}@{stage}"


def planted(
    bundle: Bundle, stage: str, weight: str, change: Callable[[np.ndarray], np.ndarray]
) -> str:
    """A stage of the raw UNet with one weight changed."""
    raw = bundle.stage("unet", "model")
    model = raw.load()
    (value,) = [v for v in model.graph.initializers.values() if v.name == weight]
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=weight)
    record = toy.record(
        "unet", stage, source_stage="model", source=raw.digest, origin=raw.record.origin
    )
    with bundle.lock():
        bundle.commit(model, record)
    return at(bundle, stage)


@pytest.mark.parametrize(
    "module",
    [
        "conv_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "mid_block.resnets.0.norm2",
        "up_blocks.1.resnets.0.conv_shortcut",
    ],
)
def test_the_module_with_a_planted_mistake_is_named(
    sides: tuple[Path, Bundle], module: str
) -> None:
    wrong = planted(sides[1], "wrong", f"{module}.weight", lambda weight: weight * 1.2)
    found = layers(wrong, at(sides[1], "model"))
    jump = found.first_jump
    assert jump is not None
    assert jump.name == module
    assert jump.fed < 1e-6
    assert f"the error jumps at {module}" in found.lines()[0]
    # Against PyTorch and through fused graphs it is the same one.
    assert layers(wrong, sides[0]).first_jump.name == module  # type: ignore[union-attr]


def test_where_an_infinity_begins(sides: tuple[Path, Bundle]) -> None:
    def overflow(weight: np.ndarray) -> np.ndarray:
        weight.reshape(-1)[0] = np.inf
        return weight

    wrong = planted(sides[1], "endless", "mid_block.resnets.1.conv1.weight", overflow)
    found = layers(wrong, at(sides[1], "model"))
    assert found.first_jump is not None
    assert found.first_jump.name == "mid_block.resnets.1.conv1"
    assert found.first_jump.error == math.inf
    assert found.first_jump.figures.inf_a + found.first_jump.figures.nan_a > 0
    assert "hold NaN or infinity, from mid_block.resnets.1.conv1" in found.chart().texts
    other = layers(at(sides[1], "model"), wrong)
    assert any(math.isnan(one.error) for one in other.layers)
    json.dumps(other.to_json(), allow_nan=False)


def test_an_optimized_graph_equals_the_checkpoint_in_every_layer(
    sides: tuple[Path, Bundle],
) -> None:
    found = layers(at(sides[1], "optimized"), sides[0])
    assert len(found.layers) > 100
    assert found.reshaped == ()
    # Before a norm evens it out, a layer may be farther off than the output may.
    assert max(one.error for one in found.layers) < 5e-5
    whole = {one.name for one in layers(at(sides[1], "model"), at(sides[1], "model")).layers}
    assert len(found.layers) > 0.6 * len(whole)


def test_layers_of_the_text_encoder_and_the_vae_are_found_in_pytorch(
    sides: tuple[Path, Bundle],
) -> None:
    for component in ("text_encoder", "vae_encoder", "vae_decoder"):
        found = layers(at(sides[1], "model"), sides[0], component)
        assert len(found.layers) > 15
        assert max(one.error for one in found.layers) < 5e-5


def test_half_precision_has_no_jump(sides: tuple[Path, Bundle]) -> None:
    found = layers(at(sides[1], "fp16"), at(sides[1], "model"))
    assert found.first_jump is None
    assert 1e-5 < max(one.error for one in found.layers) < FLOOR * 20


def test_companions_are_looked_into_too(sides: tuple[Path, Bundle]) -> None:
    found = layers(at(sides[1], "hoisted"), at(sides[1], "optimized"))
    names = {one.name for one in found.layers}
    assert "time_embedding.linear_1" in names, "it runs in a companion"
    assert "conv_out" in names, "it runs in the main graph"
    assert max(one.error for one in found.layers) == 0


def test_merged_tokens_begin_where_they_are_merged(sides: tuple[Path, Bundle]) -> None:
    found = layers(at(sides[1], "merged"), at(sides[1], "optimized"))
    assert found.first_jump is not None
    assert found.first_jump.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert found.reshaped, "what is computed of merged tokens has another shape"
    assert found.allowed is None


def test_two_changes_and_the_first_is_named(sides: tuple[Path, Bundle]) -> None:
    planted(sides[1], "twice", "up_blocks.0.resnets.0.conv1.weight", lambda w: w * 2)
    raw = sides[1].stage("unet", "twice")
    model = raw.load()
    value = model.graph.initializers["down_blocks.1.resnets.0.conv2.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name=value.name)
    with sides[1].lock():
        sides[1].commit(model, raw.record)
    found = layers(at(sides[1], "twice"), at(sides[1], "model"))
    assert found.first_jump is not None
    assert found.first_jump.name == "down_blocks.1.resnets.0.conv2"


def test_graphs_without_modules_are_matched_by_value(tmp_path: Path) -> None:
    body = "g (float[2,4] x) => (float[2,4] y) { a = MatMul(x, w)\nb = Tanh(a)\ny = MatMul(b, v) }"
    weights = {"w": np.eye(4, dtype=np.float32), "v": np.eye(4, dtype=np.float32)}
    ir.save(model_of(body, weights), tmp_path / "one.onnx")
    ir.save(model_of(body, {**weights, "v": 2 * weights["v"]}), tmp_path / "other.onnx")
    (found,) = compare_layers(tmp_path / "other.onnx", tmp_path / "one.onnx")
    assert [one.name for one in found.layers] == ["a", "b", "y"]
    assert found.first_jump is not None
    assert found.first_jump.name == "y"
    assert found.first_jump.error == pytest.approx(1.0)


def test_a_module_that_ran_twice_and_shared_work_is_told_by_its_last_result() -> None:
    model = model_of(
        "g (float[2,4] x) => (float[2,4] y) {\na = Sigmoid(x)\nb = Mul(x, a)\nc = Tanh(b)\n"
        "d = Mul(c, a)\ny = Relu(d) }"
    )
    paths = ["block.act", "block.act", "block.conv", "block", "out"]
    for node, path in zip(model.graph, paths, strict=True):
        node.metadata_props["sdopt.module"] = path
    named = {one.name: one.value for one in layers_of(model, True, {})}
    assert named == {"block.act": "b", "block.conv": "c", "block": "d", "out": "y"}


def test_a_page_with_every_layer(sides: tuple[Path, Bundle], tmp_path: Path) -> None:
    found = layers(at(sides[1], "fp16"), at(sides[1], "model"))
    page([found]).write(tmp_path / "layers.html")
    assert found.chart().png()
    with opened(tmp_path / "layers.html") as one:
        assert one.charts() == 1
        assert one.page.locator("tbody tr").count() == len(found.layers)
        dots = one.page.locator("svg.marks path[aria-roledescription=point]")
        assert dots.count() == sum(1 for layer in found.layers if layer.error)
        assert one.complaints == []


def test_the_command(
    sides: tuple[Path, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    from sdopt.cli import main

    wrong = planted(sides[1], "wrong", "conv_in.weight", lambda weight: weight * 2)
    words = ["compare", wrong, at(sides[1], "model"), "-c", "unet", "--layers", "--json"]
    for name, size in SMALL.items():
        words += ["--dim", f"{name}={size}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdopt", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    data = json.loads(capsys.readouterr().out)
    assert data["layers"][0]["first_jump"] == "conv_in"
    assert {path.name for path in (tmp_path / "layers").iterdir()} == {"layers.html", "unet.png"}


def test_two_checkpoints_have_no_graph(sides: tuple[Path, Bundle]) -> None:
    with pytest.raises(UsageError, match="no graph to compare"):
        layers(sides[0], sides[0])
