"""Which of diffusers' pipelines stands before a bundle: a table from its index's class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_XL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
_SD3 = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
_INPAINT, _XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"

_UNCHECKED = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


@dataclass(frozen=True)
class Runner:
    """What runs a bundle.

    Attributes:
        text_to_image: diffusers' class for prompts alone, or empty.
        image_to_image: the one for a prompt and an image.
        mask: whether that one also wants a mask.
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

    def class_name(self, image_to_image: bool) -> str:
        """The class for one of the two tasks; where there is only one, that."""
        return self.image_to_image if image_to_image or self.mask else self.text_to_image


_PAIR = ("text_encoder", "text_encoder_2")
_THREE = (*_PAIR, "text_encoder_3")
_KEPT = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
# Watermarks would make an image depend on whether a package for them is installed.
_PLAIN = {"add_watermarker": False}

RUNNERS: Mapping[str, Runner] = {
    **dict.fromkeys(_DIFFUSION, Runner(*_DIFFUSION)),
    **dict.fromkeys(_CONSISTENCY, Runner(*_CONSISTENCY, negative=False)),
    _INPAINT: Runner("", _INPAINT, mask=True),
    **dict.fromkeys(_XL, Runner(*_XL, encoders=_PAIR, given=_PLAIN, kept=_KEPT)),
    **dict.fromkeys(_SD3, Runner(*_SD3, encoders=_THREE, denoiser="transformer", given={})),
    _XL_INPAINT: Runner("", _XL_INPAINT, mask=True, encoders=_PAIR, given=_PLAIN, kept=_KEPT),
}
"""The class that ``model_index.json`` names to what runs it."""
