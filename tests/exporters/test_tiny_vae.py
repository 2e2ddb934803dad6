"""AutoencoderTiny in the place of a pipeline's VAE: both halves and whole images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

import sdopt
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.compare import compare
from sdopt.exporters import DiffusersSource
from sdopt.runtime.generate import generate
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP16, FP32, distance

MODEL = "sd1-tiny-vae"
IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""


@pytest.fixture(scope="module")
def bundle(both: tuple[Path, Path]) -> Path:
    path = both[1]
    api.optimize(path, "@fast")
    api.optimize(path, "@fast_fp16", stage="fp16", components=["vae_encoder", "vae_decoder"])
    return path


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_both_halves_equal_pytorch(source: Path, bundle: Path, component: str) -> None:
    model = families.reference(source, component)
    for stage, at in (("model", FP32), ("optimized", FP32), ("fp16", FP16)):
        session = Ort().open(Bundle.open(bundle).stage(component, stage).path)
        for seed, size in enumerate([(8, 8), (9, 13), (5, 3)]):
            families.check(session, model, families.feeds_of(component, size, seed), at)


def test_the_encoder_gives_latents_and_no_distribution(bundle: Path) -> None:
    graph = Bundle.open(bundle).stage("vae_encoder", "model").load().graph
    (given,) = graph.outputs
    assert given.name == "latent_sample"
    assert given.shape is not None
    assert given.shape[1] == 4


@pytest.mark.parametrize("image_to_image", [False, True])
def test_images_equal_pytorch(source: Path, bundle: Path, image_to_image: bool) -> None:
    cls: Any = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    options: dict[str, Any] = {"width": 104, "height": 72}
    if image_to_image:
        values = np.random.default_rng(0).integers(0, 256, (72, 104, 3), np.uint8)
        options = {"image": Image.fromarray(values), "strength": 0.7}
    ours = sdopt.load_pipeline(bundle, image_to_image=image_to_image)
    theirs = cls.from_pretrained(source, safety_checker=None)
    assert type(theirs.vae) is AutoencoderTiny
    found = [families.latents(one, "ab a", output_type="pt", **options) for one in (ours, theirs)]
    assert found[0].shape == (1, 3, 72, 104)
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_run_and_compare_know_it(source: Path, bundle: Path) -> None:
    (one,) = generate(bundle, ["ab"], steps=2, width=64, height=72)
    assert one.image.size == (64, 72)
    for component in ("vae_encoder", "vae_decoder"):
        assert compare(str(source), f"{bundle}@optimized", components=[component]).passed


def test_it_may_be_supplied(source: Path, tmp_path: Path) -> None:
    """In the place of a pipeline's own; the bundle's index then names its class."""
    plain = source.parent / "tokenizers" / "plain"
    given = DiffusersSource(plain, {"vae": source / "vae"})
    index = next(file for file in given.shared_files() if file.path == "model_index.json")
    assert json.loads(str(index.text))["vae"] == ["diffusers", "AutoencoderTiny"]
    assert [port.name for port in given.export("vae_encoder").model.graph.outputs] == [
        "latent_sample"
    ]
