"""UNets of Stable Diffusion with more input channels or more inputs, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL import Image

import sdopt
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.exporters import DiffusersSource
from sdopt.runtime.generate import generate
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP32, distance
from tests.exporters.made import NOISE, copy_of

IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""


def made(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline's folder and its bundle, optimized."""
    source, bundle = copy_of(name, factory)
    api.optimize(bundle, "@fast")
    return source, bundle


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (72, 104, 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def inpaint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made("sd1-inpaint", tmp_path_factory)


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made("sd1-lcm", tmp_path_factory)


def check_unet(source: Path, bundle: Path, **dims: int) -> None:
    model = families.reference(source, "unet")
    for stage in ("model", "optimized"):
        session = Ort().open(Bundle.open(bundle).stage("unet", stage).path)
        for seed, size in enumerate([(8, 8), (9, 13), (5, 3)]):
            families.check(session, model, families.feeds_of("unet", size, seed, **dims), FP32)


def test_a_unet_of_nine_channels(inpaint: tuple[Path, Path]) -> None:
    check_unet(*inpaint, channels=9)


def test_inpainting(inpaint: tuple[Path, Path]) -> None:
    source, bundle = inpaint
    ours = sdopt.load_pipeline(bundle)
    assert type(ours) is StableDiffusionInpaintPipeline
    theirs = StableDiffusionInpaintPipeline.from_pretrained(source, safety_checker=None)
    mask = Image.fromarray(np.eye(72, 104, dtype=np.uint8) * 255)
    options = {"image": picture(0), "mask_image": mask, "width": 104, "height": 72}
    found = [families.latents(one, "ab a", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_run_inpaints(inpaint: tuple[Path, Path]) -> None:
    source, bundle = inpaint
    theirs = StableDiffusionInpaintPipeline.from_pretrained(source, safety_checker=None)
    mask = Image.fromarray(np.eye(72, 104, dtype=np.uint8) * 255)
    want = families.inpainted(theirs, picture(0), mask, 1.0)
    (got,) = generate(bundle, ["ab"], image=picture(0), mask=mask, steps=4, seed=3)
    assert np.abs(np.asarray(got.image, float) - want).max() <= 1


def test_run_says_that_it_has_no_mask(inpaint: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="wants a mask") as caught:
        list(generate(inpaint[1], ["a"]))
    assert "--mask FILE" in str(caught.value)


def test_a_unet_with_the_scale_of_guidance(consistency: tuple[Path, Path]) -> None:
    inputs = Bundle.open(consistency[1]).stage("unet", "optimized").load().graph.inputs
    names = ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    assert [value.name for value in inputs] == names
    check_unet(*consistency, timestep_cond=32)


@pytest.mark.parametrize("image_to_image", [False, True])
def test_latent_consistency(consistency: tuple[Path, Path], image_to_image: bool) -> None:
    source, bundle = consistency
    cls: Any = LatentConsistencyModelPipeline
    options: dict[str, Any] = {"width": 104, "height": 72}
    if image_to_image:
        cls = LatentConsistencyModelImg2ImgPipeline
        options = {"image": picture(1), "strength": 0.7}
    ours = sdopt.load_pipeline(bundle, image_to_image=image_to_image)
    assert type(ours) is cls
    theirs = cls.from_pretrained(source, safety_checker=None)
    found = [families.latents(one, "ab a", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_a_negative_prompt_where_there_is_none(consistency: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no negative prompt"):
        list(generate(consistency[1], ["a"], negative="b"))
    (one,) = generate(consistency[1], ["a"], steps=2, width=64, height=72)
    assert one.image.size == (64, 72)


def test_eight_channels_are_taken_too(tmp_path: Path) -> None:
    cls = StableDiffusionInstructPix2PixPipeline
    families.sd1(cls, tmp_path / "source", tmp_path / "tokenizer", NOISE(), in_channels=8)
    assert "unet" in DiffusersSource(tmp_path / "source").component_names()
