"""Which of diffusers' pipelines stands before a bundle: a table from its index's class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_INPAINT = "StableDiffusionInpaintPipeline"


@dataclass(frozen=True)
class Runner:
    """What runs a bundle.

    Attributes:
        text_to_image: diffusers' class for prompts alone, or empty.
        image_to_image: the one for a prompt and an image.
        mask: whether that one also wants a mask.
        negative: whether it takes a negative prompt.
    """

    text_to_image: str
    image_to_image: str
    mask: bool = False
    negative: bool = True

    def class_name(self, image_to_image: bool) -> str:
        """The class for one of the two tasks; where there is only one, that."""
        return self.image_to_image if image_to_image or self.mask else self.text_to_image


RUNNERS: Mapping[str, Runner] = {
    **dict.fromkeys(_DIFFUSION, Runner(*_DIFFUSION)),
    **dict.fromkeys(_CONSISTENCY, Runner(*_CONSISTENCY, negative=False)),
    _INPAINT: Runner("", _INPAINT, mask=True),
}
"""The class that ``model_index.json`` names to what runs it."""
