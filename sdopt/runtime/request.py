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
    """The options of one run; ``image`` and ``strength`` are None for text-to-image.

    ``mask`` is white where the image is to be drawn anew; ``control`` is a ControlNet's hint.
    """

    negative: str
    steps: int
    guidance: float
    width: int
    height: int
    strength: float | None = None
    image: Image | None = None
    mask: Image | None = None
    control: Image | None = None
    control_scale: float | None = None

    def starting_from(self, image: Image, strength: float, mask: Image | None = None) -> Request:
        """The same from a start image, resized to the size by the filter that diffusers uses."""
        from PIL import Image as Pillow

        size = (self.width, self.height)
        if mask is not None and mask.size != size:
            mask = mask.resize(size, Pillow.Resampling.NEAREST)
        return dataclasses.replace(self, image=self._sized(image), strength=strength, mask=mask)

    def controlled_by(self, hint: Image, scale: float) -> Request:
        """The same with a ControlNet's hint, resized likewise."""
        return dataclasses.replace(self, control=self._sized(hint), control_scale=scale)

    def _sized(self, image: Image) -> Image:
        from PIL import Image as Pillow

        size = (self.width, self.height)
        return image if image.size == size else image.resize(size, Pillow.Resampling.LANCZOS)

    def for_pipeline(self, count: int) -> dict[str, Any]:
        """What diffusers' pipelines may take of sizes and images, for ``count`` images at once."""
        size = {"width": self.width, "height": self.height}
        more: dict[str, Any] = {}
        if self.image is not None:
            more = {"image": [self.image] * count, "strength": self.strength}
        if self.mask is not None:
            more["mask_image"] = self.mask
        if self.control is not None:
            more["controlnet_conditioning_scale"] = self.control_scale
            more["image" if self.image is None else "control_image"] = self.control
        return more | size


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
    """Refuse what a bundle's pipeline has no input for.

    Raises:
        UsageError: a negative prompt to a model without one.
    """
    if negative and not runner.negative:
        raise UsageError(
            "this model takes no negative prompt",
            where=where,
            why=f"{runner.text_to_image} runs it, which has none",
            hint="leave --negative out",
        )


def check_mask(runner: Runner, image: object, mask: object, where: str) -> None:
    """Refuse a mask without an image, and an inpainting bundle without a mask.

    Raises:
        UsageError: saying which one is missing.
    """
    if mask is not None and image is None:
        raise UsageError(
            "there is a mask and no image that it lies on",
            where=where,
            hint="--image FILE --mask FILE, both of one size",
        )
    if runner.mask and mask is None:
        raise UsageError(
            "this bundle is for inpainting, and wants a mask beside the image",
            where=where,
            hint="--image FILE --mask FILE: white is drawn anew",
        )


def check_control(known: bool, control: object, scale: float, where: str) -> None:
    """Refuse a control image to a bundle without a ControlNet, and a scale that cannot be.

    Raises:
        UsageError: naming it.
    """
    if control is not None and not known:
        raise UsageError(
            "this bundle has no ControlNet",
            where=where,
            hint="export it with one: sdopt export SOURCE -o BUNDLE --controlnet DIR",
        )
    if not 0 <= scale < float("inf"):
        raise UsageError(f"the scale of control must be 0 or more, not {scale}")


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
    return read_image(image, "the start image")


def mask_image(mask: str | Path | Image, image: Image) -> Image:
    """The mask as grey: white where the image is drawn anew, black where it stays.

    Raises:
        UsageError: no image there, or of another size than ``image``.
    """
    found = read_image(mask, "the mask", "L")
    if found.size != image.size:
        raise UsageError(
            "the mask and the image have different sizes",
            where="" if isinstance(mask, _pillow().Image) else str(mask),
            why=f"the mask is {found.width}x{found.height}, "
            f"the image {image.width}x{image.height} pixels (width x height)",
            hint="make the mask on the image",
        )
    return found


def read_image(image: str | Path | Image, what: str, mode: str = "RGB") -> Image:
    """An image file, or an image, in one of pillow's modes.

    Raises:
        UsageError: no image there; ``what`` is named in it.
    """
    pillow = _pillow()
    try:
        found: Image = image if isinstance(image, pillow.Image) else pillow.open(image)
        return found.convert(mode)
    except pillow.UnidentifiedImageError as error:
        raise UsageError("this file is no image that pillow reads", where=str(image)) from error
    except OSError as error:
        raise UsageError(
            f"{what} cannot be read", where=str(image), why=error.strerror or str(error)
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image as Pillow
    except ImportError as error:
        raise MissingDependencyError(
            "images need pillow", why=str(error), hint='pip install "sdopt[ort]"'
        ) from error
    return Pillow
