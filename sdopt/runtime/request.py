"""What ``generate`` was asked for, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdopt.runtime.runners import Runner


@dataclass(frozen=True)
class Request:
    """The options of one run; ``image`` and ``strength`` are None for text-to-image."""

    negative: str
    steps: int
    guidance: float
    width: int
    height: int
    strength: float | None = None
    image: Image | None = None

    def starting_from(self, image: Image, strength: float) -> Request:
        """The same from a start image, resized to the size by the filter that diffusers uses."""
        from PIL import Image as Pillow

        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Pillow.Resampling.LANCZOS)
        return dataclasses.replace(self, image=image, strength=strength)


def check_numbers(prompts: Sequence[str], steps: int, seed: int, count: int, batch: int) -> None:
    """Refuse prompts and numbers that cannot be.

    Raises:
        UsageError: naming the one.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is a list of texts", hint="generate(bundle, [prompt])")
    if not prompts:
        raise UsageError("no prompt to draw", hint='--prompt "..."')
    for name, number in (("steps", steps), ("count", count), ("batch", batch)):
        if number < 1:
            raise UsageError(f"{name} must be 1 or more, not {number}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed must be 0 or more and below 2**63, not {seed}")


def check_runner(runner: Runner, negative: str, where: str) -> None:
    """Refuse a bundle that wants more than a prompt and an image, and what it has no input for.

    Raises:
        UsageError: an inpainting model, or a negative prompt to a model without one.
    """
    if runner.mask:
        raise UsageError(
            "this bundle is for inpainting, and wants a mask beside the image",
            where=where,
            hint="from Python: sdopt.load_pipeline(BUNDLE)(prompt, image=..., mask_image=...)",
        )
    if negative and not runner.negative:
        raise UsageError(
            "this model takes no negative prompt",
            where=where,
            why=f"{runner.text_to_image} runs it, which has none",
            hint="leave --negative out",
        )


def _check_strength(strength: float, steps: int) -> None:
    if not 0 < strength <= 1:
        raise UsageError(
            f"strength must be above 0 and up to 1, not {strength}",
            why="1 forgets the start image, 0 would give it back",
        )
    if int(steps * strength) < 1:
        raise UsageError(
            f"{steps} steps at strength {strength} leave nothing to do",
            hint="raise --steps or --strength",
        )


def image_size(
    width: int | None,
    height: int | None,
    image: Image | None,
    vae: Mapping[str, Any],
    denoiser: Mapping[str, Any],
) -> tuple[int, int]:
    """Width and height in pixels: asked for, else the start image's, else the model's own.

    Raises:
        UsageError: no multiple of the VAE's factor and the denoiser's patch; names the nearest.
    """
    levels = vae.get("block_out_channels", (1, 2, 3, 4))
    smallest = 2 ** (len(levels) - 1)
    factor = smallest * int(denoiser.get("patch_size") or 1)
    native = denoiser.get("sample_size") or 64
    own_height, own_width = native if isinstance(native, list) else (native, native)
    if image is not None:
        default_width, default_height = image.size
    else:
        default_width, default_height = own_width * smallest, own_height * smallest
    sizes = {"width": width or default_width, "height": height or default_height}
    for name, size in sizes.items():
        if size < factor or size % factor:
            below = max(factor, size - size % factor)
            near = f"{below} or {below + factor}" if size > factor else f"{factor}"
            raise UsageError(
                f"the {name} must be a multiple of {factor} pixels, not {size}",
                hint=f"the nearest: {near} (--{name})",
            )
    return sizes["width"], sizes["height"]


def start_image(image: str | Path | Image, strength: float, steps: int) -> Image:
    """The start image of image-to-image as RGB.

    Raises:
        UsageError: no image there, or a strength that leaves nothing to do.
    """
    _check_strength(strength, steps)
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(
            "images need pillow", why=str(error), hint='pip install "sdopt[ort]"'
        ) from error
    if isinstance(image, Pillow.Image):
        return image.convert("RGB")
    try:
        return Pillow.open(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UsageError("this file is no image that pillow reads", where=str(image)) from error
    except OSError as error:
        raise UsageError(
            "the start image cannot be read", where=str(image), why=error.strerror or str(error)
        ) from error
