"""Adapters on stages that passes made, against diffusers' own ``load_lora_weights``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import sdopt
from sdopt import api, companions, modelfile, origins, registry
from sdopt.adapters.replaying import Replaced
from sdopt.bundle import RAW, Bundle
from sdopt.errors import BundleError, SdoptError, UsageError, WeightsError
from sdopt.runtime.adapting import adapt
from sdopt.runtime.generate import generate, save_png
from sdopt.targets.onnx import Onnx
from tests import lora_files
from tests.exporters import families
from tests.exporters.families import FP16, FP32, distance
from tests.exporters.made import copy_of
from tests.test_cli import Shell

SCALE = 0.7
IMAGE = 2e-5
STAGES = {
    "optimized": "@fast",
    "fused": "@fast,flash_attention=ort",
    "hoisted": "@fast,hoist",
    "deep": "@fast,hoist,deep_cache=2",
    "half": "@fast_fp16",
    "channels": "clean,fuse_shared_linears,lower_group_norm,lower_channels_last",
}
"""Name to the passes that make it."""
SAME = ["model", "optimized", "fused", "hoisted", "ort_cpu"]
"""The stages that equal PyTorch in fp32 and that onnxruntime's CPU runs."""


class Made:
    """A pipeline, an adapter for it, both merged by diffusers, and a bundle with its stages."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        root = factory.mktemp("adapters")
        self.source, self.bundle = copy_of("sd1-ddim", factory)
        pipeline = StableDiffusionPipeline.from_pretrained(self.source)
        self.lora = lora_files.write(pipeline, root / "style.safetensors")
        self.other = lora_files.write_kohya(pipeline, root / "other.safetensors", seed=5)
        adapted = ["text_encoder", "unet"]
        for stage, passes in STAGES.items():
            api.optimize(self.bundle, passes, stage=stage, components=adapted)
        api.build(self.bundle, "ort", source="optimized", components=adapted)
        self.root = root

    def fused(self, *loras: tuple[Path, float]) -> Path:
        folder = self.root / "-".join(f"{path.stem}{scale}" for path, scale in loras)
        if not folder.is_dir():
            lora_files.fuse(StableDiffusionPipeline, self.source, folder, loras)
        return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory)


def replaced(bundle: Path, component: str, stage: str, *loras: Any) -> Replaced:
    known = Bundle.open(bundle)
    found = adapt(known, {component: known.stage(component, stage)}, loras)
    return dict(found.replaced).get(component, {})


def tensors(path: Path) -> Iterator[tuple[str, str, ir.TensorProtocol]]:
    """Graph, name and tensor of every initializer of a stage and its companions."""
    model = modelfile.load(path)
    graphs = {"": model, **companions.graphs(model)}
    for graph, one in graphs.items():
        for value in modelfile.initializers(one):
            assert value.const_value is not None
            yield graph, value.name or "", value.const_value


@pytest.mark.parametrize("stage", SAME)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_stage_equals_pytorch(made: Made, component: str, stage: str) -> None:
    model = families.reference(made.fused((made.lora, SCALE)), component)
    plain = families.reference(made.source, component)
    session = lora_files.opened(made.bundle, component, stage, [(made.lora, SCALE)])
    for seed, size in enumerate([(8, 8), (9, 13)]):
        feeds = families.feeds_of(component, size, seed)
        families.check(session, model, feeds, FP32)
        with pytest.raises(AssertionError):  # the adapter is no rounding error
            families.check(session, plain, feeds, 0.05)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_half_precision(made: Made, component: str) -> None:
    model = families.reference(made.fused((made.lora, SCALE)), component)
    session = lora_files.opened(made.bundle, component, "half", [(made.lora, SCALE)])
    feeds = families.feeds_of(component, (9, 13), 1)
    families.check(session, model, feeds, FP16)


@pytest.mark.parametrize("stage", ["model", "optimized", "ort_cpu"])
def test_several_adapters_add_up(made: Made, stage: str) -> None:
    loras = ((made.lora, SCALE), (made.other, -0.4))
    for component in ("unet", "text_encoder"):
        model = families.reference(made.fused(*loras), component)
        session = lora_files.opened(made.bundle, component, stage, loras)
        families.check(session, model, families.feeds_of(component, (9, 13), 1), FP32)


@pytest.mark.parametrize("stage", sorted(STAGES))
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_the_weights_are_those_of_the_pass_in_front(
    made: Made, component: str, stage: str
) -> None:
    """Every weight of every graph of the stage, as ``optimize lora=FILE`` would write it."""
    merged = f"with_{stage}"
    passes = f"lora={made.lora}:scale={SCALE},{STAGES[stage]}"
    api.optimize(made.bundle, passes, stage=merged, components=[component])
    known = Bundle.open(made.bundle)
    changed = replaced(made.bundle, component, stage, (made.lora, SCALE))
    wanted = {(g, n): t for g, n, t in tensors(known.stage(component, merged).path)}
    count = 0
    for graph, name, tensor in tensors(known.stage(component, stage).path):
        found = changed.get(graph, {}).get(name, tensor)
        assert found.dtype == wanted[graph, name].dtype
        a, b = found.numpy(), wanted[graph, name].numpy()
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
            continue
        # Rounded to half twice, not once: at most one step of it.
        at = 2**-10 if a.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(a, b, rtol=at, atol=at * np.abs(b).max(initial=0.0))
        count += found is not tensor
    assert count == sum(map(len, changed.values())) > 0
    if stage == "deep" and component == "unet":
        assert set(changed) == {"", "prompt", "step", "shallow"}


@pytest.mark.parametrize(
    "target",
    [
        "ort:provider=cuda:dtype=fp16",
        "trt:dtype=fp16:refit=true",
        "onnx:opset=17",
    ],
)
def test_origins_pass_through_builds(made: Made, target: str) -> None:
    """The weights of a build of an optimized stage, as a build of the merged one has them."""
    api.optimize(made.bundle, f"lora={made.lora}:scale={SCALE},@fast", stage="to_build")
    build: dict[str, Any] = {"components": ["unet"], "emit_only": True, "shapes": "64x64"}
    api.build(made.bundle, target, source="optimized", **build)
    stage = registry.make("targets", target).stage_name()
    path = Bundle.open(made.bundle).stage("unet", stage).path
    changed = replaced(made.bundle, "unet", stage, (made.lora, SCALE))[""]
    found = {n: changed.get(n, t).numpy() for _, n, t in tensors(path)}
    api.build(made.bundle, target, source="to_build", **build)
    wanted = {name: tensor.numpy() for _, name, tensor in tensors(path)}
    assert len(changed) > 30
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        at = 2**-10 if array.dtype == np.float16 else 1e-6
        limit = at * np.abs(array).max(initial=0.0)
        np.testing.assert_allclose(found[name], array, rtol=at, atol=limit, err_msg=name)


def test_companions_draw_what_the_merged_stage_draws(made: Made) -> None:
    passes = f"lora={made.lora}:scale={SCALE},{STAGES['deep']}"
    api.optimize(made.bundle, passes, stage="deep_merged")
    pipelines = [
        sdopt.load_pipeline(made.bundle, stage="deep", loras=[(made.lora, SCALE)]),
        sdopt.load_pipeline(made.bundle, stage="deep_merged"),
        sdopt.load_pipeline(made.bundle, stage="deep"),
    ]
    one, other, plain = (families.latents(each, "ab a") for each in pipelines)
    assert distance(one.numpy(), other) <= 1e-6
    assert distance(plain.numpy(), other) > 0.01


@pytest.mark.parametrize("stage", ["optimized", "ort_cpu"])
def test_images_equal_pytorch(made: Made, stage: str) -> None:
    options: dict[str, Any] = {"width": 104, "height": 72, "negative_prompt": "q"}
    theirs = StableDiffusionPipeline.from_pretrained(made.fused((made.lora, SCALE)))
    ours = sdopt.load_pipeline(made.bundle, stage=stage, loras=[f"{made.lora}:{SCALE}"])
    found = [families.latents(one, "ab a cab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_both_devices_of_a_run_have_the_adapter(made: Made) -> None:
    options: dict[str, Any] = {"stage": "optimized", "loras": [(made.lora, SCALE)]}
    pipelines = [
        sdopt.load_pipeline(made.bundle, device=device, **options) for device in (None, "cpu,cpu")
    ]
    one, other = (families.latents(each, "ab a", guidance_scale=3.0) for each in pipelines)
    assert distance(one.numpy(), other) <= 1e-6


def test_scale_0_is_none(made: Made) -> None:
    assert replaced(made.bundle, "unet", "optimized", (made.lora, 0.0)) == {}
    with pytest.raises(WeightsError):  # yet what does not fit is said
        replaced(made.bundle, "unet", "optimized", (strange(made), 0.0))


def test_the_bundle_stays_as_it_was(made: Made) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = (path for path in made.bundle.rglob("*") if path.is_file())
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}

    before = state()
    options: dict[str, Any] = {"steps": 2, "seed": 4}
    (plain,) = generate(made.bundle, ["ab"], **options)
    (styled,) = generate(made.bundle, ["ab"], loras=[made.lora], **options)
    (again,) = generate(made.bundle, ["ab"], **options)
    assert np.array_equal(np.array(plain.image), np.array(again.image))
    assert not np.array_equal(np.array(plain.image), np.array(styled.image))
    assert state() == before


def test_the_png_says_which_adapters(made: Made, tmp_path: Path) -> None:
    from PIL import Image

    loras = [f"{made.lora}:0.5", (made.other, 1)]
    (one,) = generate(made.bundle, ["ab"], steps=1, loras=loras)
    save_png(one, tmp_path / "a.png")
    text = Image.open(tmp_path / "a.png").text  # type: ignore[attr-defined]
    first, second = text["loras"].split(", ")
    assert first.startswith("style.safetensors (")
    assert first.endswith(") at 0.5")
    assert second.endswith(") at 1")
    (plain,) = generate(made.bundle, ["ab"], steps=1)
    assert "loras" not in plain.text()
    assert plain.bundle == one.bundle


def test_the_command_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    shell = Shell(monkeypatch, capsys)
    words = ("run", str(made.bundle), "-p", "ab", "--steps", "1", "--seed", "3")
    loras = ("--lora", f"{made.lora}:0.5", "--lora", str(made.other))
    code, out, err = shell(*words, *loras, "-o", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path / '0000.png'}\n"), err
    (wanted,) = generate(
        made.bundle, ["ab"], steps=1, seed=3, loras=[(made.lora, 0.5), (made.other, 1)]
    )
    assert np.array_equal(np.array(Image.open(tmp_path / "0000.png")), np.array(wanted.image))
    code, out, err = shell(*words, "--lora", "nothing.safetensors:0.5")
    assert (code, out) == (2, "")
    assert "the adapter file cannot be read" in err
    assert "Traceback" not in err


def test_a_packed_bundle_needs_no_raw_stage(made: Made, tmp_path: Path) -> None:
    api.pack(made.bundle, tmp_path / "packed", stage="hoisted", components=["unet"])
    model = families.reference(made.fused((made.lora, SCALE)), "unet")
    session = lora_files.opened(tmp_path / "packed", "unet", RAW, [(made.lora, SCALE)])
    families.check(session, model, families.feeds_of("unet", (9, 13), 1), FP32)


def test_another_adapter_on_a_stage_with_one(made: Made) -> None:
    api.optimize(made.bundle, f"lora={made.lora}:scale={SCALE},@fast", stage="styled")
    loras = ((made.lora, SCALE), (made.other, 0.5))
    for component in ("unet", "text_encoder"):
        model = families.reference(made.fused(*loras), component)
        session = lora_files.opened(made.bundle, component, "styled", [(made.other, 0.5)])
        families.check(session, model, families.feeds_of(component, (9, 13), 1), FP32)
    # The one that is there is not added again, and not at another scale.
    assert replaced(made.bundle, "unet", "styled", (made.lora, SCALE)) == {}
    with pytest.raises(UsageError, match="merged already, at another scale"):
        replaced(made.bundle, "unet", "styled", (made.lora, 1.0))


def strange(made: Made) -> Path:
    """An adapter with a key for nothing."""
    state = load_file(made.lora)
    key = "unet.down_blocks.0.attentions.0.proj_in"
    state = {name.replace(key, key + "_2"): tensor for name, tensor in state.items()}
    path = made.root / "strange.safetensors"
    save_file(state, path)
    return path


def wide(made: Made) -> Path:
    """An adapter for a wider model."""
    state = load_file(made.lora)
    path = made.root / "wide.safetensors"
    save_file({k: v.repeat(1, 2, *[1] * (v.dim() - 2)) for k, v in state.items()}, path)
    return path


def for_xl(made: Made) -> Path:
    """An adapter for the second text encoder alone."""
    state = load_file(made.lora)
    path = made.root / "xl.safetensors"
    texts = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    save_file({k.replace("text_encoder.", "text_encoder_2."): v for k, v in texts.items()}, path)
    return path


@pytest.mark.parametrize("stage", ["model", "optimized", "deep"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (strange, r"2 do not match|1 do not match a weight of the graph"),
        (wide, "updates do not fit their weights"),
        (for_xl, "nothing for a component of this bundle"),
    ],
)
def test_adapters_that_do_not_fit(made: Made, file: Any, message: str, stage: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        sdopt.load_pipeline(made.bundle, stage=stage, loras=[file(made)])
    assert str(file(made)) in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["style.safetensors:strong"], "'strong' is no scale"),
        (["style.safetensors:nan"], "must be a number"),
        (["style.safetensors", ("style.safetensors", 2)], "asked for twice"),
        (["nothing.safetensors:0.5"], "the adapter file cannot be read"),
        ("style.safetensors", "loras is a list"),
    ],
)
def test_what_cannot_be_asked_for(
    made: Made, asked: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.root)
    with pytest.raises(SdoptError, match=message):
        sdopt.load_pipeline(made.bundle, loras=asked)


def test_quantized_weights_are_refused_by_name(made: Made) -> None:
    api.optimize(made.bundle, "@fast,quantize=w8", stage="w8", components=["unet"])
    with pytest.raises(WeightsError, match=r"integers: no adapter can be applied") as caught:
        sdopt.load_pipeline(made.bundle, stage="w8", loras=[made.lora])
    assert "quantize made it of" in str(caught.value)
    assert "--passes lora=FILE" in str(caught.value)


def test_a_stage_of_a_foreign_tool_is_refused_by_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scripts.py").write_text(
        "import numpy as np\n"
        "def double(graph):\n"
        "    name = 'time_embedding.linear_1.weight'\n"
        "    weight = graph.tensors()[name]\n"
        "    weight.values = np.asarray(weight.values) * 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    passes = "graphsurgeon=my_scripts.double"
    api.optimize(made.bundle, passes, stage="mine", components=["unet"])
    with pytest.raises(WeightsError, match=r"time_embedding\.linear_1\.weight: nothing tells"):
        sdopt.load_pipeline(made.bundle, stage="mine", loras=[made.lora])


def test_simplify_is_refused_where_it_computed_weights(made: Made) -> None:
    """It transposes the UNet's small weights, and leaves the text encoder's alone."""
    pytest.importorskip("onnxsim")
    both = ["unet", "text_encoder"]
    api.optimize(made.bundle, "simplify", stage="simple", components=both)
    with pytest.raises(WeightsError, match="nothing tells which weights it was made of"):
        replaced(made.bundle, "unet", "simple", made.lora)
    model = families.reference(made.fused((made.lora, SCALE)), "text_encoder")
    session = lora_files.opened(made.bundle, "text_encoder", "simple", [(made.lora, SCALE)])
    families.check(session, model, families.feeds_of("text_encoder", (9, 13), 1), FP32)


def test_a_script_that_leaves_the_weights_alone_costs_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "idle_scripts.py").write_text("def nothing(graph):\n    graph.name = 'other'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    passes = "@fast,graphsurgeon=idle_scripts.nothing"
    api.optimize(made.bundle, passes, stage="idle", components=["unet"])
    model = families.reference(made.fused((made.lora, SCALE)), "unet")
    session = lora_files.opened(made.bundle, "unet", "idle", [(made.lora, SCALE)])
    families.check(session, model, families.feeds_of("unet", (9, 13), 1), FP32)


def test_a_stage_of_an_older_sdopt_says_so(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.bundle, tmp_path / "old")
    path = tmp_path / "old/unet/optimized.onnx"
    model = onnx.load(path, load_external_data=False)
    kept = [one for one in model.metadata_props if one.key != origins.ORIGINS_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, path)
    with pytest.raises(BundleError, match="does not say where its weights came from") as caught:
        sdopt.load_pipeline(tmp_path / "old", stage="optimized", loras=[made.lora])
    assert "make the stage again" in str(caught.value)
    # Stages that are made of it know no more; made again from the raw one, it knows.
    api.optimize(tmp_path / "old", "clean", source="optimized", stage="more", components=["unet"])
    with pytest.raises(BundleError, match="does not say"):
        sdopt.load_pipeline(tmp_path / "old", stage="more", loras=[made.lora])


def test_a_target_that_cannot_says_so(made: Made) -> None:
    changed = replaced(made.bundle, "unet", "optimized", made.lora)
    path = Bundle.open(made.bundle).stage("unet", "optimized").path
    with pytest.raises(UsageError, match="the weights of a build for onnx cannot be changed"):
        Onnx(opset=17).open_adapted(path, changed[""])


def test_a_sum_beyond_the_type_is_named(made: Made) -> None:
    changed = replaced(made.bundle, "unet", "half", (made.lora, 1e7))
    first = next(iter(changed[""].values()))
    with pytest.raises(WeightsError, match="no longer finite in FLOAT16"):
        first.numpy()


def test_every_initializer_has_an_origin(made: Made) -> None:
    for stage in ("optimized", "deep", "ort_cpu", "half"):
        path = Bundle.open(made.bundle).stage("unet", stage).path
        model = modelfile.load(path)
        for one in companions.family(model):
            table = json.loads(one.metadata_props[origins.ORIGINS_KEY])["weights"]
            assert table.keys() == {v.name for v in modelfile.initializers(one)}
        checkpoint = modelfile.load(path.with_name("model.onnx"))
        raw = {value.name for value in modelfile.initializers(checkpoint)}
        known = origins.known(model)
        assert known is not None
        named = {leaf.name for t in known.tables for o in t.values() for leaf in origins.leaves(o)}
        assert named <= raw
        assert len(named) > 0.9 * len(raw)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """Source, fused source, bundle and adapter of an XL pipeline."""
    root = tmp_path_factory.mktemp("xl")
    source, bundle = copy_of("sdxl", tmp_path_factory)
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    lora = lora_files.write(pipeline, root / "style.safetensors")
    lora_files.fuse(StableDiffusionXLPipeline, source, root / "fused", [(lora, SCALE)])
    adapted = ["text_encoder", "text_encoder_2", "unet"]
    api.optimize(bundle, "@fast", components=[*adapted, "vae_decoder"])
    api.optimize(bundle, "@fast_fp16", stage="half", components=adapted)
    return source, root / "fused", bundle, lora


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_xl_equals_pytorch(xl: tuple[Path, Path, Path, Path], component: str) -> None:
    _, fused, bundle, lora = xl
    model = families.reference(fused, component)
    feeds = families.feeds_of(component, (9, 13), 1, states=40, **families.ADDED)
    for stage, at in (("model", FP32), ("optimized", FP32), ("half", FP16)):
        session = lora_files.opened(bundle, component, stage, [(lora, SCALE)])
        families.check(session, model, feeds, at)


def test_xl_images_equal_pytorch(xl: tuple[Path, Path, Path, Path]) -> None:
    _, fused, bundle, lora = xl
    ours = sdopt.load_pipeline(bundle, loras=[(lora, SCALE)])
    theirs = StableDiffusionXLPipeline.from_pretrained(fused, add_watermarker=False)
    options: dict[str, Any] = {"width": 104, "height": 72, "prompt_2": "c b"}
    found = [families.latents(one, "ab a cab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_an_adapter_for_xl_is_not_for_1(made: Made, xl: tuple[Path, Path, Path, Path]) -> None:
    with pytest.raises(WeightsError, match="match") as caught:
        sdopt.load_pipeline(made.bundle, loras=[xl[3]])
    assert "made for SDXL" in str(caught.value)
