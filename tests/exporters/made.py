"""Tiny pipelines of every family and their exports, made once for a whole run of the tests."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import AutoencoderTiny, DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from sdopt import api
from tests.exporters import families, tiny

DIGITS = Path(__file__).parents[2] / "examples" / "digits"

Make = Callable[[Path, Path], None]
"""Writes a pipeline to a folder that is not there yet, given one for its tokenizers."""

NOISE = partial(
    DDIMScheduler,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def _sd1(name: str, scheduler: Callable[[], Any] = NOISE, **options: Any) -> Make:
    def make(folder: Path, scratch: Path) -> None:
        families.sd1(getattr(diffusers, name), folder, scratch, scheduler(), **options)

    return make


def _controlled(make: Make) -> Make:
    """The same with a ControlNet beside it, in ``control`` next to the folder."""

    def made(folder: Path, scratch: Path) -> None:
        make(folder, scratch)
        families.controlnet(folder.parent / "control", folder)

    return made


def tiny_vae(folder: Path, scratch: Path) -> None:
    """1.x with an AutoencoderTiny for its VAE."""
    plain = scratch / "plain"
    families.sd1(StableDiffusionPipeline, plain, scratch / "tokenizer", NOISE())
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    pipeline = StableDiffusionPipeline.from_pretrained(
        plain, vae=tiny._scramble(vae, 5), safety_checker=None
    )
    families.save(pipeline, folder)


MODELS: Mapping[str, tuple[str, Make]] = {
    "sd1": ("Stable Diffusion 1.x", tiny.save),
    "sd1-inpaint": (
        "1.x for inpainting, 9 channels",
        _sd1("StableDiffusionInpaintPipeline", in_channels=9),
    ),
    "sd1-lcm": (
        "Latent consistency model",
        _sd1(
            "LatentConsistencyModelPipeline",
            partial(LCMScheduler, beta_schedule="scaled_linear"),
            time_cond_proj_dim=32,
        ),
    ),
    "sd1-tiny-vae": ("1.x with the tiny VAE (TAESD)", tiny_vae),
    "sd1-control": ("1.x with a ControlNet", _controlled(_sd1("StableDiffusionPipeline"))),
    "sd2": ("Stable Diffusion 2.x, v prediction", families.sd2),
    "sdxl": ("Stable Diffusion XL base", families.sdxl),
    "sdxl-control": ("XL with a ControlNet", _controlled(families.sdxl)),
    "sdxl-refiner": ("Stable Diffusion XL refiner", families.refiner),
    "sd3": (
        "Stable Diffusion 3",
        partial(families.sd3, dual_attention_layers=(), qk_norm=None),
    ),
    "sd35": ("Stable Diffusion 3.5", families.sd3),
}
"""The title of each, and how it is made."""

ALSO: Mapping[str, Make] = {
    "sd1-ddim": _sd1(
        "StableDiffusionPipeline",
        partial(DDIMScheduler, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    ),
}
"""What several test files draw with, of a family that is among the others."""


def export(name: str, source: Path, bundle: Path, scratch: Path) -> None:
    """Write a model to ``source`` and its graphs to ``bundle``."""
    make = ALSO[name] if name in ALSO else MODELS[name][1]
    make(source, scratch)
    control = source.parent / "control"
    api.export(source, bundle, supplied={"controlnet": control} if control.is_dir() else None)


def once(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a pipeline and its bundle as exported; for all tests, to look at only."""

    def make(folder: Path) -> None:
        export(name, folder / "source", folder / "bundle", folder / "tokenizers")

    folder = shared(name, factory, make)
    return folder / "source", folder / "bundle"


def copy_of(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, the bundle as a copy that may be optimized and changed."""
    source, bundle = once(name, factory)
    copy = factory.mktemp(name) / "bundle"
    shutil.copytree(bundle, copy)
    return source, copy


def copy_of_digits(factory: pytest.TempPathFactory) -> Path:
    """A copy of the digits model's bundle, exported in fp32 and optimized with ``@fast``."""

    def make(folder: Path) -> None:
        api.export(DIGITS, folder / "bundle", dtype="fp32")
        api.optimize(folder / "bundle", "@fast")

    copy = factory.mktemp("digits") / "bundle"
    shutil.copytree(shared("digits", factory, make) / "bundle", copy)
    return copy


def shared(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills the first time that a test of a run asks for it by name.

    Tracing takes seconds, so the processes that share a run of the tests share these too.
    """
    root = factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "families"
    root.mkdir(exist_ok=True)
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").is_file():
            # What a failure left half made would fail the next one for another reason.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder
