"""Stable Diffusion XL, base and refiner: components and whole images against PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import sdopt
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.runtime.generate import generate
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP16, FP32, distance
from tests.exporters.made import copy_of

SIZES = [(8, 8), (9, 13), (5, 3)]
MODEL = "sdxl"
IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""
COMPONENTS = ["text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder"]


@pytest.fixture(scope="module")
def bundle(both: tuple[Path, Path]) -> Path:
    path = both[1]
    report = api.optimize(path, "@fast", require="attention=all,geglu=all")
    assert report.met
    assert families.fused(report) == {
        "text_encoder": {"self_attention_qkv": 2},
        "text_encoder_2": {"self_attention_qkv": 3},
        "unet": {"self_attention_qkv": 11, "cross_attention_kv": 11},
        "vae_encoder": {"self_attention_qkv": 1},
        "vae_decoder": {"self_attention_qkv": 1},
    }
    api.optimize(path, "@fast_fp16", stage="fp16")
    return path


def names(bundle: Path, component: str) -> list[list[str]]:
    graph = Bundle.open(bundle).stage(component, "optimized").load().graph
    return [[str(value.name) for value in ports] for ports in (graph.inputs, graph.outputs)]


def test_names_are_those_of_optimum(bundle: Path) -> None:
    assert Bundle.open(bundle).manifest.family == "sdxl"
    states = [f"hidden_states.{i}" for i in range(4)]
    text = ["last_hidden_state", "pooler_output", *states[:3]]
    assert names(bundle, "text_encoder") == [["input_ids"], text]
    text = ["text_embeds", "last_hidden_state", *states]
    assert names(bundle, "text_encoder_2") == [["input_ids"], text]
    given = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert names(bundle, "unet") == [given, ["out_sample"]]


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_equal_pytorch(source: Path, bundle: Path, component: str) -> None:
    model = families.reference(source, component)
    for stage, at in (("model", FP32), ("optimized", FP32), ("fp16", FP16)):
        session = Ort().open(Bundle.open(bundle).stage(component, stage).path)
        for seed, size in enumerate(SIZES):
            feeds = families.feeds_of(component, size, seed, states=40, **families.ADDED)
            families.check(session, model, feeds, at)


@pytest.mark.parametrize("image_to_image", [False, True])
@pytest.mark.parametrize("stage", ["optimized", "fp16"])
def test_images_equal_pytorch(
    source: Path, bundle: Path, stage: str, image_to_image: bool
) -> None:
    cls: Any = StableDiffusionXLImg2ImgPipeline if image_to_image else StableDiffusionXLPipeline
    ours = sdopt.load_pipeline(bundle, stage=stage, image_to_image=image_to_image)
    theirs = cls.from_pretrained(source, add_watermarker=False)
    assert type(ours) is cls
    options: dict[str, Any] = {"width": 104, "height": 72}
    if image_to_image:
        options = {"image": picture(), "strength": 0.7}
    options |= {"negative_prompt": "q", "prompt_2": "c b", "guidance_scale": 4.0}
    found = [families.latents(one, "ab a cab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= (FP16 if stage == "fp16" else IMAGE)


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (72, 104, 3), np.uint8)
    return Image.fromarray(values)


def test_run_draws(bundle: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "negative": "q", "seed": 4}
    (one,) = generate(bundle, ["ab"], width=72, height=104, **options)
    assert one.image.size == (72, 104)
    assert set(one.stages) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    (other,) = generate(bundle, ["ab"], image=picture(), **options)
    assert other.image.size == (104, 72)


def test_inpainting_equals_pytorch(source: Path, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    index = tmp_path / "copy/model_index.json"
    name = "StableDiffusionXLInpaintPipeline"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    ours = sdopt.load_pipeline(tmp_path / "copy")
    assert type(ours) is StableDiffusionXLInpaintPipeline
    theirs = StableDiffusionXLInpaintPipeline.from_pretrained(source, add_watermarker=False)
    mask = Image.fromarray(np.eye(72, 104, dtype=np.uint8) * 255)
    options = {"image": picture(), "mask_image": mask, "width": 104, "height": 72}
    found = [families.latents(one, "ab a", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_run_inpaints_and_an_empty_negative_is_none(source: Path, bundle: Path) -> None:
    theirs = StableDiffusionXLInpaintPipeline.from_pretrained(source, add_watermarker=False)
    mask = Image.fromarray(np.eye(72, 104, dtype=np.uint8) * 255)
    want = families.inpainted(theirs, picture(), mask, 0.9)
    options: dict[str, Any] = {"image": picture(), "mask": mask, "strength": 0.9, "steps": 4}
    (got,) = generate(bundle, ["ab"], seed=3, **options)
    assert np.abs(np.asarray(got.image, float) - want).max() <= 1


def test_the_first_encoder_skips_layers(source: Path, bundle: Path) -> None:
    ours = sdopt.load_pipeline(bundle)
    theirs = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
    options: dict[str, Any] = {"width": 64, "height": 64, "clip_skip": 0}
    found = [families.latents(one, "ab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_trt_rtx_takes_every_graph(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = api.build(bundle, "trt_rtx:dtype=fp16", shapes="64x64..128x128", check=True)
    assert {one.component for one in report.components} == set(COMPONENTS)


def test_compare_takes_the_checkpoint(source: Path, bundle: Path) -> None:
    found = api.compare(str(source), f"{bundle}@optimized")
    assert {one.component: one.verdict for one in found.components} == dict.fromkeys(
        COMPONENTS, "same"
    )


def test_a_missing_second_encoder_is_named(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy/tokenizer_2").rename(tmp_path / "away")
    with pytest.raises(BundleError, match="no tokenizer_2 that can be loaded"):
        sdopt.load_pipeline(tmp_path / "copy")
    manifest = tmp_path / "copy/manifest.json"
    table = json.loads(manifest.read_text())
    del table["components"]["text_encoder_2"]
    manifest.write_text(json.dumps(table))
    with pytest.raises(BundleError, match="has no text_encoder_2"):
        sdopt.load_pipeline(tmp_path / "copy")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source, bundle = copy_of("sdxl-refiner", tmp_path_factory)
    api.optimize(bundle, "@fast")
    return source, bundle


def test_the_refiner_takes_a_score(refiner: tuple[Path, Path]) -> None:
    source, bundle = refiner
    manifest = Bundle.open(bundle).manifest
    assert manifest.family == "sdxl_refiner"
    assert set(manifest.components) == set(COMPONENTS) - {"text_encoder"}
    session = Ort().open(Bundle.open(bundle).stage("unet", "optimized").path)
    assert session.inputs["time_ids"].dims[1] == 5
    model = families.reference(source, "unet")
    feeds = families.feeds_of("unet", (9, 13), 1, states=16, text_embeds=16, time_ids=5)
    families.check(session, model, feeds, FP32)


def test_refined_images_equal_pytorch(refiner: tuple[Path, Path]) -> None:
    source, bundle = refiner
    ours = sdopt.load_pipeline(bundle, image_to_image=True)
    theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(source, add_watermarker=False)
    options: dict[str, Any] = {"image": picture(), "strength": 0.7, "negative_prompt": "q"}
    options |= {"aesthetic_score": 7.0, "negative_aesthetic_score": 2.0}
    found = [families.latents(one, "ab a cab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE
    (one,) = generate(bundle, ["ab"], image=picture(), steps=2)
    assert one.image.size == (104, 72)


def test_a_refiner_needs_an_image(refiner: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="refines an image"):
        list(generate(refiner[1], ["ab"]))
