"""The miniature model is real: measured by plain diffusers, and by sdopt on what it built."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from sdopt import api

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
sys.path.insert(0, str(DIGITS))

import digits  # noqa: E402 - lies beside the model that it describes

MODEL_FILES = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model exported in fp32, optimized and built for ONNX Runtime's CPU."""
    bundle = tmp_path_factory.mktemp("digits") / "bundle"
    api.export(DIGITS, bundle, dtype="fp32")
    api.optimize(bundle, "@fast")
    api.build(bundle, "ort")
    return bundle


def test_it_is_a_whole_pipeline_of_at_most_16_mb() -> None:
    files = [path for name in MODEL_FILES for path in [DIGITS / name, *(DIGITS / name).rglob("*")]]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 16_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3


def test_plain_diffusers_loads_it_and_it_has_the_shape_of_sd1() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(DIGITS)
    kinds = [type(module).__name__ for module in pipeline.unet.modules()]
    assert kinds.count("BasicTransformerBlock") == 16
    assert kinds.count("Attention") == 32
    assert kinds.count("GroupNorm") == 61
    assert kinds.count("Downsample2D") == 3
    assert pipeline.vae_scale_factor == 8
    assert next(pipeline.unet.parameters()).dtype in (torch.float32, torch.float16)


def test_the_classifier_reads_real_digits() -> None:
    _, accuracy = digits.train_classifier()
    assert accuracy >= 0.97


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_500_images_are_the_digits_asked_for_and_vary_as_real_ones(digits_bundle: Path) -> None:
    ran = subprocess.run(
        [sys.executable, DIGITS / "evaluate.py"], capture_output=True, text=True, check=True
    )
    torch_score = json.loads(ran.stdout.splitlines()[-1])
    assert torch_score["images"] == 500
    assert torch_score["accuracy"] >= 0.90
    assert min(torch_score["variance_ratio"]) >= 0.5

    made = list(
        api.run(
            digits_bundle,
            digits.PROMPTS,
            count=50,
            batch=50,
            steps=digits.STEPS,
            guidance=digits.GUIDANCE,
            seed=digits.SEED,
        )
    )
    assert set(made[0].stages.values()) == {"ort_cpu"}
    labels = [digits.PROMPTS.index(one.prompt) for one in made]
    classifier, _ = digits.train_classifier()
    score = digits.score([one.image for one in made], labels, classifier)
    assert score.images == 500
    assert abs(score.accuracy - torch_score["accuracy"]) <= 0.015
    assert score.least_variance_ratio >= 0.5


def test_token_merging_still_draws_digits(digits_bundle: Path) -> None:
    """Ten images each: merging moves pixels, and the classifier still reads them."""
    api.optimize(digits_bundle, "@fast,tome=5", stage="tome5")
    settings = {"steps": digits.STEPS, "guidance": digits.GUIDANCE, "batch": 10, "count": 2}
    classifier, _ = digits.train_classifier()
    right: dict[str, float] = {}
    pixels: dict[str, np.ndarray] = {}
    for stage in ("optimized", "tome5"):
        made = list(api.run(digits_bundle, digits.PROMPTS, stage=stage, **settings))
        labels = [digits.PROMPTS.index(one.prompt) for one in made]
        right[stage] = digits.score([one.image for one in made], labels, classifier).accuracy
        pixels[stage] = np.stack([np.asarray(one.image, np.float64) for one in made])
    assert np.abs(pixels["tome5"] - pixels["optimized"]).mean() > 0.1
    assert right["tome5"] >= right["optimized"] - 0.15
    assert right["tome5"] >= 0.8
