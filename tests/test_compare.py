from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from sdopt import api, modelfile
from sdopt.bundle import Bundle
from sdopt.compare import Comparison, compare
from sdopt.compare import inputs as making
from sdopt.compare.figures import figures
from sdopt.errors import BuildError, SdoptError, UnknownNameError, UsageError
from sdopt.manifest import Step
from sdopt.session import Port
from sdopt.tolerance import Change, Intent, Numerics, between
from tests.exporters import tiny
from tests.runtime import toy
from tests.toolkit import model_of

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return toy.bundle(tmp_path / "bundle")


def stage(
    made: Bundle,
    component: str,
    name: str,
    change: Callable[[ir.Model], None],
    *history: Step,
) -> None:
    """Commit a changed form of a component's raw graph."""
    raw = made.stage(component, "model")
    model = raw.load()
    change(model)
    record = toy.record(component, name, source_stage="model", source=raw.digest, history=history)
    with made.lock():
        made.commit(model, record)


def scaled(by: float) -> Callable[[ir.Model], None]:
    """Multiply every float weight, as a planted mistake."""

    def change(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1:
                value.const_value = ir.tensor(tensor.numpy() * np.float32(by), name=value.name)

    return change


def nothing(_: ir.Model) -> None:
    """The same graph."""


def verdicts(found: Comparison) -> dict[str, str]:
    return {one.component: one.verdict for one in found.components}


def at(made: Bundle, name: str) -> str:
    return f"{made.path}@{name}"


# Figures


def test_figures_by_hand() -> None:
    b = np.array([[3.0, 0.0], [0.0, -4.0]], np.float32)
    one = figures("y", b + np.array([[0, 0.5], [0, 0]], np.float32), b)
    assert (one.name, one.shape) == ("y", (2, 2))
    assert one.max_abs == 0.5
    assert one.relative_l2 == pytest.approx(0.1)
    assert one.cosine == pytest.approx(25 / (5 * math.sqrt(25.25)))
    assert one.psnr_db == pytest.approx(20 * math.log10(7 / 0.25))
    assert one.within(0.11)
    assert not one.within(0.09)


def test_figures_of_equals() -> None:
    for array in (np.ones(3), np.zeros(3), np.empty(0)):
        one = figures("y", array, array.copy())
        assert one.relative_l2 == one.max_abs == 0.0
        assert one.within(0.0)


def test_figures_against_nothing() -> None:
    one = figures("y", np.ones(3), np.zeros(3))
    assert one.relative_l2 == math.inf
    assert one.cosine == 0.0
    assert not one.within(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_what_is_no_number_never_passes(bad: float, sides: tuple[bool, bool]) -> None:
    a, b = (np.array([1.0, bad if side else 1.0]) for side in sides)
    one = figures("y", a, b)
    assert not one.within(math.inf)
    counts = (one.nan_a, one.nan_b) if math.isnan(bad) else (one.inf_a, one.inf_b)
    assert counts == tuple(map(int, sides))


def test_float16_is_measured_in_float64() -> None:
    a, b = np.full(100_000, 200, np.float16), np.full(100_000, 100, np.float16)
    assert figures("y", a, b).relative_l2 == pytest.approx(1.0)


# Inputs


def test_inputs_are_seeded_and_do_not_depend_on_one_another() -> None:
    ports = {"sample": Port(FLOAT, ("batch_size", 4, "height", "width")), "x": Port(FLOAT, (3,))}
    first, again = making.make(ports, 0, {}, {}), making.make(ports, 0, {}, {})
    assert first["sample"].shape == (2, 4, 16, 24)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    alone = making.make({"x": ports["x"]}, 0, {}, {})
    np.testing.assert_array_equal(alone["x"], first["x"])
    assert (making.make(ports, 1, {}, {})["x"] != first["x"]).any()


def test_inputs_of_every_kind() -> None:
    ports = {
        "input_ids": Port(INT, ("b", "s")),
        "other_ids": Port(INT, ("b", "s")),
        "timestep": Port(FLOAT, ()),
        "timesteps": Port(INT, ("b",)),
        "image": Port(FLOAT, ("b", 3, "h", "w")),
        "mask": Port(np.dtype(np.bool_), ("b", "s")),
        "half": Port(np.dtype(np.float16), ("b", "s", "e")),
    }
    made = making.make(ports, 0, {"s": 500}, {"input_ids": 1000})
    assert made["input_ids"].shape == made["mask"].shape == (2, 500)
    assert 900 < made["input_ids"].max() < 1000
    assert made["input_ids"].min() >= 0
    assert made["other_ids"].max() < 10
    assert made["timestep"].shape == ()
    assert 1 <= made["timestep"] == int(made["timestep"]) < 1000
    assert made["timesteps"].shape == (2,)
    assert np.abs(made["image"]).max() == 1.0
    assert made["half"].dtype == np.float16
    assert made["half"].shape == (2, 500, 32)


def test_sizes_by_name_and_unknown_ones() -> None:
    ports = {"sample": Port(FLOAT, ("batch_size", 4, "height", "width"))}
    made = making.make(ports, 0, {"height": 9, "batch_size": 1}, {})
    assert made["sample"].shape == (1, 4, 9, 24)
    with pytest.raises(UsageError, match="no input has a dimension hight"):
        making.make(ports, 0, {"hight": 9}, {})


def test_two_sides_agree_on_fixed_sizes_and_the_narrower_type() -> None:
    left = {"x": Port(FLOAT, ("b", 4, "h"))}
    right = {"x": Port(np.dtype(np.float16), (1, "c", "h2"))}
    agreed = making.agreed_ports(left, right, ("a", "b"))
    assert agreed == {"x": Port(np.dtype(np.float16), (1, 4, "h2"))}


@pytest.mark.parametrize(
    "right",
    [
        {"y": Port(FLOAT, ("b", 4))},
        {"x": Port(FLOAT, ("b", 5))},
        {"x": Port(FLOAT, ("b",))},
        {"x": Port(INT, ("b", 4))},
        {},
    ],
)
def test_two_sides_that_do_not_agree(right: Mapping[str, Port]) -> None:
    with pytest.raises(UsageError, match="a and b"):
        making.agreed_ports({"x": Port(FLOAT, ("b", 4))}, right, ("a", "b"))


# Verdicts


def test_a_thing_and_itself(bundle: Bundle) -> None:
    told: list[str] = []
    found = compare(bundle.path, bundle.path, progress=lambda what, share: told.append(what))
    assert found.passed
    assert verdicts(found) == dict.fromkeys(bundle.components, "same")
    assert told == [one.component for one in found.components]
    assert compare(bundle.path, bundle.path, components=[]).components == found.components
    assert set(told) == set(bundle.components)
    for one in found.components:
        assert one.allowed == 0.0
        assert all(output.relative_l2 == 0.0 for output in one.outputs)
        assert one.note == ""


EXACT, OTHER = Step("clean", "exact"), Step("fuse_qkv", "reassociated")
CAST = Step("cast_fp16:keep=io", "lossy", intent="cast")
LOSSY = Step("tome=5", "lossy")
ADAPTER = Step("lora=a.safetensors", "reassociated", intent="other")


@pytest.mark.parametrize(
    ("history", "by", "verdict"),
    [
        ((EXACT,), 1.0, "same"),
        ((EXACT,), 1 + 1e-6, "different"),
        ((OTHER,), 1 + 1e-6, "same"),
        ((OTHER,), 1 + 1e-3, "different"),
        ((EXACT, OTHER), 1 + 1e-6, "same"),
        ((OTHER, LOSSY), 1.5, "unjudged"),
        ((OTHER, LOSSY), 1.0, "unjudged"),
        ((CAST,), 1.0, "unjudged"),  # in fp32 still: what it lost cannot be seen
        ((ADAPTER, OTHER), 1.5, "unjudged"),
        ((Step("fuse_qkv", "reassociated", changed=False),), 1 + 1e-6, "different"),
    ],
)
def test_the_passes_between_decide(
    bundle: Bundle, history: tuple[Step, ...], by: float, verdict: str
) -> None:
    stage(bundle, "vae_decoder", "optimized", scaled(by), *history)
    found = compare(bundle.path, at(bundle, "model"), components=["vae_decoder"])
    (one,) = found.components
    assert one.verdict == verdict
    assert one.passes == tuple(step.spec for step in history if step.changed)
    assert found.passed == (verdict != "different")


def test_passes_that_both_went_through_allow_nothing(bundle: Bundle) -> None:
    stage(bundle, "vae_decoder", "first", nothing, OTHER, LOSSY)
    stage(bundle, "vae_decoder", "second", scaled(1 + 1e-6), OTHER, LOSSY, EXACT)
    found = compare(at(bundle, "first"), at(bundle, "second"))
    assert found.components[0].passes == ("clean",)
    assert verdicts(found) == {"vae_decoder": "different"}
    assert found.skipped == ()


def halved(model: ir.Model) -> None:
    """Weights in float16, and casts around them."""
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 1:
            half = ir.tensor(tensor.numpy().astype(np.float16), name=value.name)
            value.const_value, value.type = half, ir.TensorType(ir.DataType.FLOAT16)
            cast = ir.node("Cast", [value], {"to": 1})
            cast.outputs[0].name = f"{value.name}_wide"
            for user, index in tuple(value.uses()):
                user.replace_input_with(index, cast.outputs[0])
            cast.replace_input_with(0, value)
            model.graph.insert_before(model.graph[0], cast)


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        ((CAST,), "same"),
        ((OTHER, CAST), "same"),
        ((LOSSY, CAST), "unjudged"),
        ((ADAPTER, CAST), "unjudged"),
    ],
)
def test_half_precision_is_judged_and_what_is_lossy_beside_it_not(
    bundle: Bundle, history: tuple[Step, ...], verdict: str
) -> None:
    stage(bundle, "vae_decoder", "half", halved, *history)
    found = compare(at(bundle, "half"), at(bundle, "model"))
    (one,) = found.components
    assert one.dtypes == ("float16", "float32")
    assert "sdopt precision see it" in one.note
    assert f"  note: {one.note}" in found.lines()
    assert one.verdict == verdict
    assert 1e-5 < one.outputs[0].relative_l2 < 5e-3
    assert found.skipped == ("text_encoder", "unet", "vae_encoder")


def test_half_precision_excuses_no_mistake(bundle: Bundle) -> None:
    def both(model: ir.Model) -> None:
        scaled(1.02)(model)
        halved(model)

    stage(bundle, "vae_decoder", "half", both, CAST)
    assert verdicts(compare(at(bundle, "half"), at(bundle, "model"))) == {
        "vae_decoder": "different"
    }


@pytest.mark.parametrize(
    ("changes", "dtypes", "allowed", "reason"),
    [
        ([], [], 0.0, "exact passes only"),
        ([("clean", "exact")], ["float32"], 0.0, "exact passes only"),
        ([("fuse_qkv", "reassociated"), ("clean", "exact")], ["float32"], 5e-6, "another order"),
        ([("fuse_qkv", "reassociated")], ["float32", "bfloat16"], 4e-2, "half precision"),
        ([("cast_fp16", "lossy", "cast")], ["float16", "float32"], 5e-3, "half precision"),
        ([("cast_fp16", "lossy", "cast")], ["float32"], None, "judge the images"),
        ([("tome", "lossy")], ["float32"], None, "judge the images"),
        ([("tome", "lossy"), ("cast_fp16", "lossy", "cast")], ["float16"], None, "the images"),
        ([("lora", "reassociated", "other")], ["float32"], None, "lora changes what the model"),
        ([("lora", "reassociated", "other")] * 2, ["float16"], None, "lora changes what the"),
        (
            [("lora", "reassociated", "other"), ("edit", "lossy", "other")],
            ["float16"],
            None,
            "lora and edit change what the model computes",
        ),
    ],
)
def test_what_lies_between_decides_the_tolerance(
    changes: list[tuple[str, ...]], dtypes: list[str], allowed: float | None, reason: str
) -> None:
    made = [Change(name, Numerics(how), *map(Intent, rest)) for name, how, *rest in changes]
    found = between(made, dtypes)
    assert found.relative_l2 == allowed
    assert reason in found.reason


def test_a_stage_with_an_adapter_is_not_judged_against_one_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    body = """g (float[n,8] x) => (float[n,8] y) {
        t = Transpose<perm=[1,0]>("to_q.weight")
        y = MatMul(x, t)
    }"""
    plain, merged, again = (tmp_path / f"{name}.onnx" for name in ("plain", "merged", "again"))
    modelfile.save(
        model_of(body, {"to_q.weight": rng.standard_normal((8, 8)).astype(np.float32)}), plain
    )
    adapter, key = tmp_path / "adapter.safetensors", "lora_unet_to_q.lora_{}.weight"
    factors = {"down": rng.standard_normal((2, 8)), "up": rng.standard_normal((8, 2))}
    save_file({key.format(word): array for word, array in factors.items()}, adapter)
    for out in (merged, again):
        api.optimize_file(plain, out, f"lora={adapter}")
    found = compare(merged, plain)
    assert verdicts(found) == {"plain": "unjudged"}
    assert found.components[0].reason == "lora changes what the model computes"
    assert found.components[0].outputs[0].relative_l2 > 1e-2
    # What both went through is nothing between them: rounding is judged as ever.
    assert verdicts(compare(merged, again)) == {"plain": "same"}
    # The same words with another file behind them are another adapter.
    factors["down"] *= 1 + 1e-5
    save_file({key.format(word): array for word, array in factors.items()}, adapter)
    api.optimize_file(plain, again, f"lora={adapter}")
    found = compare(merged, again)
    assert verdicts(found) == {"plain": "unjudged"}
    assert found.components[0].passes == (f"lora={adapter}",) * 2


@pytest.mark.parametrize("history", [(), (LOSSY,)])
def test_a_nan_never_passes(bundle: Bundle, history: tuple[Step, ...]) -> None:
    stage(bundle, "unet", "broken", scaled(float("nan")), *history)
    found = compare(at(bundle, "broken"), at(bundle, "model"))
    assert verdicts(found) == {"unet": "different"}
    assert not found.passed
    assert "NaN" in "\n".join(found.lines())
    both = compare(at(bundle, "broken"), at(bundle, "broken"))
    assert not both.passed


# Which things


def test_one_file_is_any_component(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "their.onnx"
    ir.save(toy.graphs()["unet"], path)
    found = compare(path, bundle.path, components=["unet"], sizes={"height": 9})
    assert verdicts(found) == {"unet": "same"}
    # Nothing is known of where the file comes from, so rounding is allowed.
    assert found.components[0].allowed == 5e-6
    assert found.components[0].shapes["sample"] == (2, 4, 9, 24)
    assert verdicts(compare(bundle.path, path, components=["unet"])) == {"unet": "same"}
    assert compare(path, path).passed
    with pytest.raises(UsageError, match="which component is this file"):
        compare(path, bundle.path)
    with pytest.raises(UsageError, match="different inputs"):
        compare(path, bundle.path, components=["vae_decoder"])
    with pytest.raises(UnknownNameError, match="no 'unnet' to compare"):
        compare(path, bundle.path, components=["unnet"])


def test_a_stages_own_file_is_its_component(bundle: Bundle) -> None:
    found = compare(bundle.path / "unet" / "model.onnx", bundle.path)
    assert verdicts(found) == {"unet": "same"}
    assert found.components[0].allowed == 0.0


def test_a_path_with_an_at_sign_is_that_path(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "someone@home")
    assert compare(made.path, at(made, "model"), components=["unet"]).passed


def test_components_of_one_side_only_are_named(bundle: Bundle, tmp_path: Path) -> None:
    other = toy.bundle(tmp_path / "other", without=("vae_encoder",))
    found = compare(bundle.path, other.path)
    assert found.skipped == ("vae_encoder",)
    assert "vae_encoder: only one side has it" in found.lines()
    with pytest.raises(UnknownNameError, match="no 'vae_encoder' to compare"):
        compare(bundle.path, other.path, components=["vae_encoder"])
    half = toy.bundle(tmp_path / "half", without=("unet", "text_encoder", "vae_decoder"))
    with pytest.raises(UsageError, match="no component in common") as caught:
        compare(other.path, half.path)
    assert "sdopt adopt FILE.onnx --component unet" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{tmp}/none", UsageError, "nothing to compare"),
        ("{tmp}/none@model", UsageError, "nothing to compare"),
        ("{bundle}@modle", UnknownNameError, "did you mean model"),
        ("{tmp}", SdoptError, "no sdopt bundle here"),
    ],
)
def test_what_is_not_there(
    bundle: Bundle, tmp_path: Path, text: str, error: type[SdoptError], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    place = text.format(
        tmp=tmp_path / "empty" if text == "{tmp}" else tmp_path, bundle=bundle.path
    )
    with pytest.raises(error) as caught:
        compare(place, bundle.path)
    assert message in str(caught.value)


def with_other_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "image"


def test_other_outputs_are_no_pair(bundle: Bundle) -> None:
    stage(bundle, "vae_decoder", "renamed", with_other_output)
    with pytest.raises(UsageError, match="different outputs"):
        compare(at(bundle, "renamed"), at(bundle, "model"))


def test_a_size_that_a_graph_cannot_take(bundle: Bundle) -> None:
    with pytest.raises(BuildError, match="failed in this graph"):
        compare(
            bundle.path,
            bundle.path,
            components=["vae_encoder"],
            sizes={"sample_height": 4},
        )


def test_token_ids_stay_within_the_table(tmp_path: Path) -> None:
    body = """g (int64[b,s] ids) => (float[b,s,2] y) {
        flat = Reshape(ids, line)
        y0 = Gather(table, flat)
        y = Unsqueeze(y0, zero)
    }"""
    constants = {
        "table": np.zeros((5, 2), np.float32),
        "line": np.array([-1]),
        "zero": np.array([0]),
    }
    path = tmp_path / "ids.onnx"
    ir.save(model_of(body, constants), path)
    assert compare(path, path).passed


# The report


def test_the_report_as_data_and_as_lines(bundle: Bundle) -> None:
    stage(bundle, "vae_decoder", "optimized", scaled(1 + 1e-6), OTHER)
    found = compare(bundle.path, at(bundle, "model"), components=["vae_decoder", "unet"], seed=3)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["passed"] is True
    assert data["seed"] == 3
    decoder, unet = data["components"]
    assert decoder["passes"] == ["fuse_qkv"]
    assert decoder["allowed"] == 5e-6
    assert decoder["shapes"] == {"latent_sample": [2, 4, 16, 24]}
    assert decoder["outputs"][0]["name"] == "sample"
    assert unet["outputs"][0]["psnr_db"] is None  # infinite: they are equal
    lines = found.lines()
    assert lines[2].startswith("vae_decoder: same (the same sums in another order, in fp32, up to")
    assert lines[3].startswith("  sample: relative L2 ")


# PyTorch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(folder / "pipeline", folder / "tokenizer")
    return folder / "pipeline"


def traced(folder: Path, path: Path) -> Any:
    """The tiny text encoder's graph, by torch's own exporter and so of no origin."""
    import warnings

    import torch
    from transformers import CLIPTextModel

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.model(input_ids)
            return out.last_hidden_state, out.pooler_output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Wrapped(),
            (torch.zeros(2, 11, dtype=torch.int64),),
            dynamo=True,
            opset_version=23,
            verbose=False,
            input_names=["input_ids"],
            output_names=["last_hidden_state", "pooler_output"],
        )
    assert program is not None
    ir.save(program.model, path)
    return program.model


def test_a_graph_against_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    model = traced(checkpoint, path)
    found = compare(path, checkpoint, components=["text_encoder"])
    assert verdicts(found) == {"text_encoder": "same"}
    assert found.components[0].allowed == 5e-6
    assert 0 < found.components[0].outputs[0].relative_l2 < 5e-6
    assert compare(path, f"{checkpoint}@pytorch", components=["text_encoder"]).passed
    # A planted mistake: one bias off by a little.
    bias = next(v for n, v in model.graph.initializers.items() if n.endswith("q_proj.bias"))
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.01), name=bias.name)
    ir.save(model, path)
    assert not compare(path, checkpoint, components=["text_encoder"]).passed


@pytest.mark.parametrize(
    ("component", "shapes", "output"),
    [
        ("unet", {"sample": (2, 4, 9, 7), "encoder_hidden_states": (2, 5, 24)}, (2, 4, 9, 7)),
        ("vae_decoder", {"latent_sample": (2, 4, 3, 5)}, (2, 3, 24, 40)),
        ("vae_encoder", {"sample": (1, 3, 24, 40)}, (1, 8, 3, 5)),
    ],
)
def test_the_reference_computes_each_component(
    checkpoint: Path,
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    output: tuple[int, ...],
) -> None:
    from sdopt.compare import reference

    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if component == "unet":
        feeds["timestep"] = np.array(7, np.float32)
    (found,) = reference.module(checkpoint, component).run(feeds).values()
    assert found.shape == output
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_a_checkpoint_without_the_component(checkpoint: Path, bundle: Bundle) -> None:
    from sdopt.compare import reference

    assert set(reference.components(checkpoint)) == set(toy.ROLES)
    with pytest.raises(UnknownNameError, match="no weights of 'unnet'"):
        reference.module(checkpoint, "unnet")
    with pytest.raises(UsageError, match="no graph to compare"):
        compare(checkpoint, checkpoint, components=["vae_decoder"])
    with pytest.raises(UsageError, match="PyTorch's unet cannot take"):
        compare(bundle.path, checkpoint, components=["unet"])


def test_dynamic_sides_of_an_image_are_pixels_by_any_name() -> None:
    ports = {"images": Port(FLOAT, ("n", 3, "height", "columns")), "x": Port(FLOAT, ("width",))}
    made = making.make(ports, 0, {}, {})
    assert made["images"].shape == (2, 3, 128, 192)
    assert made["x"].shape == (24,)
    made = making.make(ports, 0, {"height": 64}, {})
    assert made["images"].shape == (2, 3, 64, 192)
