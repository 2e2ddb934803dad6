"""ControlNets of Stable Diffusion 1.x and XL: components and whole images against PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import sdopt
from examples.digits import single_file
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.compare import compare
from sdopt.errors import SourceError, UsageError
from sdopt.exporters import DiffusersSource, SingleFileSource, lowering, trace
from sdopt.runtime.generate import generate
from sdopt.runtime.scheduled import open_stage
from sdopt.session import Session
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP16, FP32, Tensors, distance
from tests.exporters.made import copy_of

SIZES = [(8, 8), (9, 13), (5, 3)]
IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""
DIMS: dict[str, dict[str, int]] = {"sd": {}, "sdxl": {"states": 40, **families.ADDED}}


class Made:
    """A pipeline's folder, a ControlNet's, and the bundle of both, optimized."""

    def __init__(self, family: str, factory: pytest.TempPathFactory) -> None:
        self.family = family
        name = "sdxl-control" if family == "sdxl" else "sd1-control"
        self.source, self.bundle = copy_of(name, factory)
        self.control = self.source.parent / "control"
        self.report = api.optimize(self.bundle, "@fast", require="attention=all,geglu=all")
        api.optimize(self.bundle, "@fast_fp16", stage="fp16", components=["controlnet", "unet"])

    def lowered(self, component: str) -> bool:
        """Whether an export does without torch's own decomposition, which takes long."""
        done: list[bool] = []

        def spy(program: torch.export.ExportedProgram) -> bool:
            done.append(lowering.lower(program))
            return done[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "lower", spy)
            DiffusersSource(self.source, {"controlnet": self.control}).export(component)
        return done == [True]

    def session(self, component: str, stage: str) -> Session:
        return Ort().open(Bundle.open(self.bundle).stage(component, stage).path)

    def names(self, component: str) -> list[list[str]]:
        graph = Bundle.open(self.bundle).stage(component, "optimized").load().graph
        return [[str(value.name) for value in ports] for ports in (graph.inputs, graph.outputs)]

    def pipelines(self, cls: Any, **task: Any) -> list[Any]:
        """Ours and PyTorch's."""
        ours = sdopt.load_pipeline(self.bundle, **task)
        assert type(ours) is cls
        more: dict[str, Any] = {"add_watermarker": False}
        more = more if self.family == "sdxl" else {"safety_checker": None}
        model = ControlNetModel.from_pretrained(self.control)
        return [ours, cls.from_pretrained(self.source, controlnet=model, **more)]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("sd", tmp_path_factory)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("sdxl", tmp_path_factory)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def residuals(size: tuple[int, int], batch: int) -> Tensors:
    """Random residuals at a latent's size, by the names of the UNet's inputs."""
    generator = torch.Generator().manual_seed(9)
    divisors = [1, 1, 2, 2, 4, 4, 4]
    widths = [8, 8, 8, 16, 16, 16, 16]
    tensors = [
        torch.randn(batch, width, *(-(-side // divisor) for side in size), generator=generator)
        for width, divisor in zip(widths, divisors, strict=True)
    ]
    names = [f"down_block_additional_residuals.{index}" for index in range(len(widths) - 1)]
    return dict(zip([*names, "mid_block_additional_residual"], tensors, strict=True))


def feeds_of(family: str, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    return dict(families.feeds_of("unet", size, seed, **DIMS[family]))


def hint(width: int = 104, height: int = 72) -> Image.Image:
    values = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def test_what_goes_in_and_out(made: Made) -> None:
    added = list(families.ADDED) if made.family == "sdxl" else []
    step = ["sample", "timestep", "encoder_hidden_states"]
    down = range(6)
    assert made.names("controlnet") == [
        [*step, "controlnet_cond", "conditioning_scale", *added],
        [*(f"down_block_res_samples.{i}" for i in down), "mid_block_res_sample"],
    ]
    taken = [f"down_block_additional_residuals.{i}" for i in down]
    assert made.names("unet") == [
        [*step, *added, *taken, "mid_block_additional_residual"],
        ["out_sample"],
    ]


def test_every_attention_is_fused(made: Made) -> None:
    found = families.fused(made.report)
    control = {"sd": 3, "sdxl": 5}[made.family]
    unet = {"sd": 7, "sdxl": 11}[made.family]
    assert found["controlnet"] == {"self_attention_qkv": control, "cross_attention_kv": control}
    assert found["unet"] == {"self_attention_qkv": unet, "cross_attention_kv": unet}


@pytest.mark.parametrize("stage", ["model", "optimized", "fp16"])
def test_the_controlnet_equals_pytorch(made: Made, stage: str) -> None:
    model, session = families.controlnet_reference(made.control), made.session("controlnet", stage)
    for seed, size in enumerate(SIZES):
        feeds = feeds_of(made.family, size, seed)
        generator = torch.Generator().manual_seed(seed)
        sides = (8 * size[0], 8 * size[1])
        feeds["controlnet_cond"] = torch.rand(1 + seed % 3, 3, *sides, generator=generator)
        feeds["conditioning_scale"] = torch.tensor(0.3 + seed)
        families.check(session, model, feeds, FP16 if stage == "fp16" else FP32)


@pytest.mark.parametrize("stage", ["model", "optimized", "fp16"])
def test_the_unet_equals_pytorch(made: Made, stage: str) -> None:
    model, session = families.reference(made.source, "unet"), made.session("unet", stage)
    for seed, size in enumerate(SIZES):
        feeds = feeds_of(made.family, size, seed)
        feeds |= residuals(size, feeds["sample"].shape[0])
        families.check(session, model, feeds, FP16 if stage == "fp16" else FP32)


@pytest.mark.parametrize("image_to_image", [False, True])
@pytest.mark.parametrize("stage", ["optimized", "fp16"])
def test_images_equal_pytorch(made: Made, stage: str, image_to_image: bool) -> None:
    classes: dict[tuple[str, bool], Any] = {
        ("sd", False): StableDiffusionControlNetPipeline,
        ("sd", True): StableDiffusionControlNetImg2ImgPipeline,
        ("sdxl", False): StableDiffusionXLControlNetPipeline,
        ("sdxl", True): StableDiffusionXLControlNetImg2ImgPipeline,
    }
    options: dict[str, Any] = {"image": hint(), "width": 104, "height": 72}
    if image_to_image:
        start = hint().transpose(Image.Transpose.ROTATE_180)
        options = {"image": start, "control_image": hint(), "strength": 0.7}
    options |= {"guidance_scale": 4.0, "controlnet_conditioning_scale": 0.8}
    cls = classes[made.family, image_to_image]
    both = made.pipelines(cls, stage=stage, image_to_image=image_to_image)
    found = [families.latents(one, "ab a cab", **options) for one in both]
    assert distance(found[0].numpy(), found[1]) <= (FP16 if stage == "fp16" else IMAGE)


def test_inpainting_under_control(sd: Made) -> None:
    mask = Image.fromarray(np.eye(72, 104, dtype=np.uint8) * 255)
    options = {"image": hint(), "mask_image": mask, "control_image": hint(), "width": 104}
    both = sd.pipelines(StableDiffusionControlNetInpaintPipeline, mask=True)
    found = [families.latents(one, "ab a", height=72, **options) for one in both]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_run_draws_with_and_without_control(made: Made, tmp_path: Path) -> None:
    hint().save(tmp_path / "hint.png")
    options: dict[str, Any] = {"steps": 2, "seed": 4}
    (one,) = generate(
        made.bundle, ["ab"], control=tmp_path / "hint.png", control_scale=0.5, **options
    )
    assert one.image.size == (104, 72)
    assert {"controlnet", "unet"} <= set(one.stages)
    assert one.text()["control_scale"] == "0.5"
    (plain,) = generate(made.bundle, ["ab"], width=104, height=72, **options)
    assert "controlnet" not in plain.stages
    assert "control_scale" not in plain.text()
    (off,) = generate(made.bundle, ["ab"], control=hint(), control_scale=0.0, **options)
    assert np.array_equal(np.asarray(off.image), np.asarray(plain.image))
    assert not np.array_equal(np.asarray(one.image), np.asarray(plain.image))
    (two,) = generate(made.bundle, ["ab"], image=hint(), control=hint(64, 64), **options)
    assert two.image.size == (104, 72)


def test_several_images_at_once_are_the_same(sd: Made) -> None:
    options: dict[str, Any] = {"steps": 2, "control": hint(), "count": 2}
    one = [np.asarray(made.image, float) for made in generate(sd.bundle, ["ab"], **options)]
    two = generate(sd.bundle, ["ab"], batch=2, **options)
    for alone, together in zip(one, two, strict=True):
        assert np.abs(alone - np.asarray(together.image, float)).max() <= 1


def test_without_a_controlnet_the_unet_takes_no_residuals(sd: Made, tmp_path: Path) -> None:
    api.export(sd.source, tmp_path / "plain", components=["unet"])
    graph = Bundle.open(tmp_path / "plain").stage("unet", "model").load().graph
    assert [v.name for v in graph.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    with pytest.raises(UsageError, match="no ControlNet") as caught:
        list(generate(Bundle.open(without_controlnet(sd.bundle, tmp_path)), ["a"], control=hint()))
    assert "--controlnet DIR" in str(caught.value)


def without_controlnet(bundle: Path, root: Path) -> Path:
    """The bundle without its ControlNet."""
    shutil.copytree(bundle, root / "copy", ignore=shutil.ignore_patterns("controlnet"))
    manifest = json.loads((root / "copy/manifest.json").read_text())
    del manifest["components"]["controlnet"]
    (root / "copy/manifest.json").write_text(json.dumps(manifest))
    return root / "copy"


def test_a_whole_pipeline_with_its_controlnet(sd: Made, tmp_path: Path) -> None:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        sd.source, controlnet=ControlNetModel.from_pretrained(sd.control), safety_checker=None
    )
    families.save(pipeline, tmp_path / "whole")
    source = DiffusersSource(tmp_path / "whole")
    assert (
        source.component_names()
        == DiffusersSource(sd.source, {"controlnet": sd.control}).component_names()
    )
    assert "controlnet" in source.component_names()
    taken = [str(value.name) for value in source.export("unet").model.graph.inputs]
    assert taken == sd.names("unet")[0]
    api.export(tmp_path / "whole", in_place=True, components=["controlnet"])
    assert (tmp_path / "whole/controlnet/model.onnx").is_file()
    assert not list((tmp_path / "whole/controlnet").glob("*.onnx_data"))
    plain = DiffusersSource(sd.source).fingerprint("unet")
    assert DiffusersSource(sd.source, {"controlnet": sd.control}).fingerprint("unet") != plain


def test_a_controlnet_alone(sd: Made) -> None:
    assert DiffusersSource(sd.control).component_names() == ["controlnet"]


def test_a_controlnet_of_another_model_is_named(sd: Made, tmp_path: Path) -> None:
    for key, value, words in (
        ("cross_attention_dim", 2048, "is for XL"),
        ("block_out_channels", [8, 16, 24], "residuals do not fit"),
        ("layers_per_block", 2, "residuals do not fit"),
        ("addition_embed_type", "text_time", "other inputs"),
        ("class_embed_type", "timestep", "not supported"),
    ):
        other = tmp_path / key
        shutil.copytree(sd.control, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(SourceError, match=words):
            DiffusersSource(sd.source, {"controlnet": other})


@pytest.mark.parametrize("component", ["controlnet", "unet"])
def test_neither_needs_torchs_decomposition(sd: Made, component: str) -> None:
    assert sd.lowered(component)


def test_what_is_no_controlnet_is_named(sd: Made, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a UNet2DConditionModel, not a ControlNetModel"):
        DiffusersSource(sd.source, {"controlnet": sd.source / "unet"})
    with pytest.raises(SourceError, match="no controlnet can be taken from this folder"):
        DiffusersSource(sd.source, {"controlnet": sd.source})
    with pytest.raises(UsageError, match="--in-place takes no parts from other folders"):
        api.export(sd.source, in_place=True, supplied={"controlnet": sd.control})
    index = json.loads((sd.source / "model_index.json").read_text())
    for change, words in (
        ({"controlnet": ["diffusers", "MultiControlNetModel"]}, "several ControlNets"),
        ({"_class_name": "LatentConsistencyModelPipeline"}, "takes no ControlNet"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(SourceError, match=words):
            DiffusersSource(tmp_path, {} if "controlnet" in change else {"controlnet": sd.control})


def test_guess_mode_is_refused(sd: Made) -> None:
    with pytest.raises(UsageError, match="guess_mode"):
        sdopt.load_pipeline(sd.bundle)("ab", image=hint(), guess_mode=True)


def test_passes_take_the_unet_that_adds_residuals(sd: Made) -> None:
    report = api.optimize(
        sd.bundle,
        "@fast,tome=1,hoist,deep_cache=2",
        stage="deep",
        components=["controlnet", "unet"],
        require="shallow_graph=1",
    )
    assert report.met
    done = {one.component: {p.spec: p.rewrites for p in one.passes} for one in report.components}
    assert done["unet"]["tome=1"] == {"self_attention": 1}
    assert done["controlnet"]["hoist"]["prompt_value"] > 0
    path = Bundle.open(sd.bundle).stage("unet", "deep").path
    session = open_stage(Ort(), path)
    assert list(session.inputs) == sd.names("unet")[0]
    plain = open_stage(Ort(), Bundle.open(sd.bundle).stage("unet", "optimized").path)
    feeds = feeds_of("sd", (16, 24), 1)
    feeds |= residuals((16, 24), feeds["sample"].shape[0])
    later = {**feeds, "timestep": feeds["timestep"] - 1}
    arrays = [{name: one.numpy() for name, one in each.items()} for each in (feeds, later)]
    first, shallow = (session.run(one)["out_sample"] for one in arrays)
    # Merging tokens changes some; the shallow step still gets the residuals of its level.
    want = [torch.from_numpy(plain.run(one)["out_sample"]) for one in arrays]
    assert distance(first, want[0]) < 0.05
    assert distance(shallow, want[1]) < 0.05
    without = {
        **arrays[1],
        **{name: 0 * one for name, one in arrays[1].items() if "resid" in name},
    }
    assert distance(plain.run(without)["out_sample"], want[1]) > 0.1


@pytest.mark.parametrize("passes", ["@fast,hoist", "@fast,cfg_parallel"])
def test_stages_with_other_inputs_draw_the_same(sd: Made, passes: str) -> None:
    stage = passes.rpartition(",")[2]
    api.optimize(sd.bundle, passes, stage=stage, components=["controlnet", "unet"])
    ours = sdopt.load_pipeline(sd.bundle, stage=stage)
    plain = sdopt.load_pipeline(sd.bundle, stage="optimized")
    options: dict[str, Any] = {"image": hint(), "width": 104, "height": 72}
    found = [families.latents(one, "ab a", **options) for one in (ours, plain)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_targets_take_both_graphs(made: Made, tmp_path: Path) -> None:
    both: dict[str, Any] = {"components": ["controlnet", "unet"]}
    api.build(made.bundle, "ort", **both)
    (one,) = generate(made.bundle, ["ab"], control=hint(), steps=2, seed=4)
    assert {one.stages["controlnet"], one.stages["unet"]} == {"ort_cpu"}
    for target, shapes in (
        ("atc:soc=Ascend310P3:dtype=fp16", "64x72"),
        ("tpu", "64x72,64x64"),
        ("trt:dtype=fp16", "64x64..128x128"),
    ):
        report = api.build(made.bundle, target, shapes=shapes, emit_only=True, **both)
        assert len(report.components) == 2
    pytest.importorskip("tensorrt_rtx")
    api.build(made.bundle, "trt_rtx:dtype=fp16", shapes="64x64..128x128", check=True, **both)


def test_parts_of_a_size_follow_it(sd: Made) -> None:
    passes = "fix_shapes=batch_size@2+height@9+width@13+sequence_length@77"
    api.optimize(sd.bundle, passes, stage="fixed", components=["unet"])
    graph = Bundle.open(sd.bundle).stage("unet", "fixed").load().graph
    shapes = {str(value.name): list(value.shape or ()) for value in graph.inputs}
    assert shapes["down_block_additional_residuals.2"] == [2, 8, 5, 7]
    assert shapes["mid_block_additional_residual"] == [2, 16, 3, 4]


def test_compare_knows_both(made: Made, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(made.source, whole)
    shutil.copytree(made.control, whole / "controlnet")
    for component in ("controlnet", "unet"):
        assert compare(whole, f"{made.bundle}@optimized", components=[component]).passed


def test_one_of_stable_diffusion_2(tmp_path: Path) -> None:
    families.sd2(tmp_path / "source", tmp_path / "tokenizer")
    families.controlnet(tmp_path / "control", tmp_path / "source")
    api.export(tmp_path / "control", tmp_path / "bundle")
    model = families.controlnet_reference(tmp_path / "control")
    session = Ort().open(Bundle.open(tmp_path / "bundle").stage("controlnet", "model").path)
    for seed, size in enumerate(SIZES):
        feeds = feeds_of("sd", size, seed)
        generator = torch.Generator().manual_seed(seed)
        sides = (8 * size[0], 8 * size[1])
        feeds["controlnet_cond"] = torch.rand(1 + seed % 3, 3, *sides, generator=generator)
        feeds["conditioning_scale"] = torch.tensor(0.5)
        families.check(session, model, feeds, FP32)


def original_name(name: str, config: dict[str, Any]) -> str:
    """A ControlNet's weight as lllyasviel's ControlNet calls it, without ``control_model.``."""
    hint, leaf = "controlnet_cond_embedding.", name.rpartition(".")[2]
    if name.startswith(f"{hint}conv_in."):
        return f"input_hint_block.0.{leaf}"
    if name.startswith(f"{hint}conv_out."):
        return f"input_hint_block.14.{leaf}"
    if name.startswith(f"{hint}blocks."):
        return f"input_hint_block.{2 * int(name.split('.')[2]) + 2}.{leaf}"
    if name.startswith("controlnet_down_blocks."):
        return f"zero_convs.{name.split('.')[1]}.0.{leaf}"
    if name.startswith("controlnet_mid_block."):
        return f"middle_block_out.0.{leaf}"
    return single_file.unet_name(name, config)


@pytest.mark.parametrize("names", ["diffusers", "original", "bare"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_file_is_the_folder(
    family: str, names: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its graphs, and the ranges that its weights are, give what those of the folder give."""
    made: Made = request.getfixturevalue(family)
    state = load_file(made.control / "diffusion_pytorch_model.safetensors")
    config = json.loads((made.control / "config.json").read_text())
    if names != "diffusers":
        prefix = "control_model." if names == "original" else ""
        state = {prefix + original_name(name, config): one for name, one in state.items()}
    save_file(state, tmp_path / "control.safetensors")
    whole = DiffusersSource(made.source, {"controlnet": made.control})
    alone = DiffusersSource(made.source, {"controlnet": tmp_path / "control.safetensors"})
    assert alone.component_names() == whole.component_names()
    ours, theirs = (one.export("controlnet") for one in (alone, whole))
    given = {name: value.const_value for name, value in ours.model.graph.initializers.items()}
    for name, value in theirs.model.graph.initializers.items():
        assert given[name].tobytes() == value.const_value.tobytes(), name
    assert [node.op_type for node in ours.model.graph] == [
        node.op_type for node in theirs.model.graph
    ]


def test_a_file_that_is_no_controlnet_is_named(sd: Made, tmp_path: Path) -> None:
    unet = sd.source / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(SourceError, match="holds no ControlNet"):
        DiffusersSource(sd.source, {"controlnet": unet})


def test_a_file_for_another_model_is_named(sd: Made, sdxl: Made) -> None:
    file = sdxl.control / "diffusion_pytorch_model.safetensors"
    words = "is for a model with text states of 40, and the UNet is a model with text states of 24"
    with pytest.raises(SourceError, match=words):
        DiffusersSource(sd.source, {"controlnet": file})


def test_a_single_file_takes_a_controlnet(sd: Made, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    single_file.write(sd.source, whole)
    source = SingleFileSource(whole, {"controlnet": sd.control})
    assert "controlnet" in source.component_names()
    index = next(file for file in source.shared_files() if file.path == "model_index.json")
    assert json.loads(str(index.text))["_class_name"] == "StableDiffusionControlNetPipeline"
    taken = [str(value.name) for value in source.export("unet").model.graph.inputs]
    assert "mid_block_additional_residual" in taken
    alone = SingleFileSource(whole)
    assert not any("controlnet" in note for note in alone.notes)
