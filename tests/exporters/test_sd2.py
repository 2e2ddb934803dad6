"""Stable Diffusion 2.x: every component and whole images against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.report import Report
from sdopt.runtime.pipeline import load_pipeline
from sdopt.session import Session
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP16, FP32, distance

SIZES = [(8, 8), (9, 13), (13, 23), (5, 3)]
PROMPT, NEGATIVE = "ab a cab", "q"
MODEL = "sd2"
IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""


@pytest.fixture(scope="module")
def bundle(both: tuple[Path, Path]) -> Path:
    return both[1]


@pytest.fixture(scope="module")
def optimized(bundle: Path) -> Report:
    return api.optimize(bundle, "@fast", require="attention=all,geglu=all")


@pytest.fixture(scope="module", params=["model", "optimized", "fp16"])
def stage(request: pytest.FixtureRequest, bundle: Path, optimized: Report) -> str:
    name: str = request.param
    if name == "fp16":
        api.optimize(bundle, "@fast_fp16", stage="fp16")
    return name


def opened(bundle: Path, component: str, stage: str) -> tuple[Session, float]:
    path = Bundle.open(bundle).stage(component, stage).path
    return Ort().open(path), FP16 if stage == "fp16" else FP32


def test_the_family_is_told(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.family == "sd2"
    assert set(manifest.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_components_equal_pytorch(source: Path, bundle: Path, stage: str, component: str) -> None:
    session, at = opened(bundle, component, stage)
    model = families.reference(source, component)
    for seed, size in enumerate(SIZES):
        families.check(session, model, families.feeds_of(component, size, seed), at)


def test_every_attention_is_fused(optimized: Report) -> None:
    assert optimized.met
    assert families.fused(optimized) == {
        "text_encoder": {"self_attention_qkv": 3},
        "unet": {"self_attention_qkv": 7, "cross_attention_kv": 7},
        "vae_encoder": {"self_attention_qkv": 1},
        "vae_decoder": {"self_attention_qkv": 1},
    }


@pytest.mark.parametrize("image_to_image", [False, True])
def test_images_equal_pytorch(
    source: Path, bundle: Path, stage: str, image_to_image: bool
) -> None:
    cls: Any = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    ours = load_pipeline(bundle, stage=stage, image_to_image=image_to_image)
    theirs = cls.from_pretrained(source, safety_checker=None, requires_safety_checker=False)
    assert type(ours) is cls
    assert ours.scheduler.config.prediction_type == "v_prediction"
    options: dict[str, Any] = {"width": 104, "height": 72}
    if image_to_image:
        pixels = np.random.default_rng(0).integers(0, 256, (72, 104, 3), np.uint8)
        options = {"image": Image.fromarray(pixels), "strength": 0.7}

    options["negative_prompt"] = NEGATIVE
    found = [families.latents(one, PROMPT, **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= (FP16 if stage == "fp16" else IMAGE)
