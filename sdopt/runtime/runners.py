"""Which of diffusers' pipelines stands before a bundle: a table from its index's class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdopt import reading
from sdopt.bundle import Bundle
from sdopt.errors import BundleError

INDEX = "model_index.json"

_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_XL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
_SD3 = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
_CONTROL = (
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
_XL_CONTROL = (
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)
_INPAINT, _XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"

_UNCHECKED = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


@dataclass(frozen=True)
class Task:
    """What is given beside the prompt: a start image, a mask on it, a ControlNet's hint."""

    image: bool = False
    mask: bool = False
    control: bool = False


@dataclass(frozen=True)
class Runner:
    """What runs a bundle.

    Attributes:
        text_to_image: diffusers' class for prompts alone, or empty.
        image_to_image: the one for a prompt and an image, or empty.
        mask: whether every task is one with a mask.
        inpaint: the one for a prompt, an image and a mask, or empty.
        control: the three in the same order for a ControlNet's hint beside those, or none.
        negative: whether it takes a negative prompt.
        encoders: the text encoders, each with a tokenizer of the same ending.
        denoiser: the component that denoises, by the pipelines' name.
        given: what the pipelines are made with beside models, tokenizers and the scheduler.
        kept: what they are made with as ``model_index.json`` says, where they know it.
    """

    text_to_image: str
    image_to_image: str
    mask: bool = False
    negative: bool = True
    encoders: tuple[str, ...] = ("text_encoder",)
    denoiser: str = "unet"
    given: Mapping[str, Any] = field(default_factory=lambda: _UNCHECKED)
    kept: tuple[str, ...] = ()
    inpaint: str = ""
    control: tuple[str, ...] = ()

    def class_name(self, task: Task) -> str:
        """The class for a task; where there is only one, that; empty where there is none."""
        mask = task.mask or self.mask
        plain = (self.text_to_image, self.image_to_image, self.inpaint)
        names = (self.control or ("", "", "")) if task.control else plain
        return names[2 if mask else 1 if task.image else 0]


_PAIR = ("text_encoder", "text_encoder_2")
_THREE = (*_PAIR, "text_encoder_3")
_KEPT = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
# Watermarks would make an image depend on whether a package for them is installed.
_PLAIN = {"add_watermarker": False}

_XL_RUNNER = Runner(
    *_XL, encoders=_PAIR, given=_PLAIN, kept=_KEPT, inpaint=_XL_INPAINT, control=_XL_CONTROL
)

RUNNERS: Mapping[str, Runner] = {
    **dict.fromkeys(
        (*_DIFFUSION, *_CONTROL[:2]), Runner(*_DIFFUSION, inpaint=_INPAINT, control=_CONTROL)
    ),
    **dict.fromkeys(_CONSISTENCY, Runner(*_CONSISTENCY, negative=False)),
    **dict.fromkeys(
        (_INPAINT, _CONTROL[2]), Runner("", "", mask=True, inpaint=_INPAINT, control=_CONTROL)
    ),
    **dict.fromkeys((*_XL, *_XL_CONTROL[:2]), _XL_RUNNER),
    **dict.fromkeys(
        (_XL_INPAINT, _XL_CONTROL[2]),
        replace(_XL_RUNNER, text_to_image="", image_to_image="", mask=True),
    ),
    **dict.fromkeys(_SD3, Runner(*_SD3, encoders=_THREE, denoiser="transformer", given={})),
}
"""The class that ``model_index.json`` names to what runs it."""


def runner_of(bundle: Bundle) -> Runner:
    """What runs the bundle, by the class that its index names.

    Raises:
        BundleError: there is no index, or nothing runs that class.
    """
    name = str(index_of(bundle).get("_class_name"))
    if name not in RUNNERS:
        raise BundleError(
            f"sdopt cannot run a {name} yet",
            where=str(bundle.path / INDEX),
            hint=f"it runs {', '.join(RUNNERS)}; other tools read the ONNX files as they are",
        )
    return RUNNERS[name]


def index_of(bundle: Bundle) -> dict[str, Any]:
    """The bundle's ``model_index.json``.

    Raises:
        BundleError: it cannot be read.
    """
    return read(bundle, INDEX, "which pipeline this is")


def read(bundle: Bundle, name: str, what: str) -> dict[str, Any]:
    """A JSON file of the bundle, which says ``what``.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle.path / name
    try:
        return reading.table(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"this bundle has no readable {name}",
            where=str(path),
            why=f"it says {what} ({error})",
            hint="export again from a whole diffusers folder: sdopt export SOURCE -o BUNDLE",
        ) from error
