"""``--shapes`` and ``--batch``: sizes of images, and what they make of a graph's dynamic axes.

Sizes are HEIGHTxWIDTH in pixels everywhere. A graph says its axes by name (``height``,
``latent_width``, ``batch_size``); this module is the only place that knows what the names mean.
In a diffusion model ``height`` counts latents; in a graph about which nothing is known, pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sdopt.errors import UsageError

PIXELS_PER_LATENT = 8
"""The VAE of every family that sdopt exports halves an image three times."""

_PART = re.compile(r"(\w+)_div_(\d+)")

TOKENS = 77
"""The length of a prompt in CLIP's text encoders."""


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Extent(NamedTuple):
    """The least, the usual and the greatest size of one axis, or of all axes of one input."""

    low: int
    usual: int
    high: int

    @property
    def fixed(self) -> bool:
        """Whether there is only one size."""
        return self.low == self.high


@dataclass(frozen=True)
class Sizes:
    """One optimisation profile: images from ``low`` to ``high``, best at ``usual``."""

    low: Size
    usual: Size
    high: Size

    @property
    def fixed(self) -> bool:
        """Whether it is one size."""
        return self.low == self.high

    def __str__(self) -> str:
        return str(self.low) if self.fixed else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Request:
    """What a build is to serve.

    Attributes:
        sizes: one profile each.
        batch: images at once, from least to greatest.
        dims: least and greatest size of axes that an image's size does not decide, by name.
        asked: whether someone asked for these sizes; those that nobody asked for are a diffusion
            model's own, and decide nothing of a graph that is none.
    """

    sizes: tuple[Sizes, ...] = (Sizes(Size(512, 512), Size(512, 512), Size(512, 512)),)
    batch: tuple[int, int] = (1, 1)
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    asked: bool = True

    def profiles(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        *,
        doubled: bool,
        pixels: bool = False,
        where: str = "",
    ) -> list[dict[str, list[Extent]]]:
        """The extents of every axis of every input, one mapping per profile.

        Args:
            inputs: by name, per axis a number or the name of a dynamic axis.
            doubled: whether the graph computes both halves of classifier-free guidance: its batch
                then goes up to twice the images, and is usually that.
            pixels: whether ``height`` and ``width`` count pixels, not latents.
            where: the component, for errors.

        Raises:
            UsageError: a dynamic axis that neither the sizes nor ``dims`` say anything about.
        """
        return [
            {
                name: [
                    self._extent(axis, sizes, doubled, pixels, f"{where}: {name}") for axis in axes
                ]
                for name, axes in inputs.items()
            }
            for sizes in self.sizes
        ]

    def _extent(
        self, axis: int | str, sizes: Sizes, doubled: bool, pixels: bool, where: str
    ) -> Extent:
        if isinstance(axis, int):
            return Extent(axis, axis, axis)
        if axis in self.dims:
            low, high = self.dims[axis]
            return Extent(low, high, high)
        if axis in ("batch", "batch_size"):
            low, high = self.batch
            return Extent(low, 2 * low, 2 * high) if doubled else Extent(low, low, high)
        if axis == "sequence_length":
            return Extent(TOKENS, TOKENS, TOKENS)
        if (whole := _PART.fullmatch(axis)) is not None:
            parts = self._extent(whole[1], sizes, doubled, pixels, where)
            return Extent(*(-(-one // int(whole[2])) for one in parts))
        side = re.fullmatch(r"(sample_|latent_)?(height|width)", axis)
        if side is None:
            raise UsageError(
                f"nothing says how large the axis {axis!r} is",
                where=where,
                hint=f"say it: --dim {axis}=1..16",
            )
        if pixels and not self.asked:
            raise UsageError(
                f"nothing says how large the axis {axis!r} is",
                where=where,
                hint="say it in pixels: --shapes 640x640, or --shapes 320x320..1280x1280",
            )
        divisor = _divisor(side[1], pixels)
        return Extent(
            *(getattr(size, side[2]) // divisor for size in (sizes.low, sizes.usual, sizes.high))
        )


def _divisor(prefix: str | None, pixels: bool) -> int:
    """How many pixels one step is along an axis of that prefix (``latent_``)."""
    in_pixels = prefix == "sample_" or (pixels and not prefix)
    return 1 if in_pixels else PIXELS_PER_LATENT


def number_of(axis: str, known: Mapping[str, int]) -> int:
    """The number that an axis has where its own, or that of what it is a part of, is known.

    ``height_div_4`` is ``height`` divided by 4, rounded up: what two halving convolutions leave.

    Raises:
        KeyError: neither is known.
    """
    whole = _PART.fullmatch(axis)
    if axis in known or whole is None:
        return known[axis]
    return -(-known[whole[1]] // int(whole[2]))


def axis_numbers(
    size: Size, batch: int, dims: Mapping[str, int], *, pixels: bool = False
) -> dict[str, int]:
    """The number that each dynamic axis has for images of one size, and its batch, by name.

    The names are those that ``Request`` reads, ``pixels`` is what it is there; ``dims`` adds to
    them.
    """
    found = {"batch": batch, "batch_size": batch, "sequence_length": TOKENS}
    for prefix in ("", "latent_", "sample_"):
        divisor = _divisor(prefix, pixels)
        found[f"{prefix}height"] = size.height // divisor
        found[f"{prefix}width"] = size.width // divisor
    for side in ("height", "width"):
        for part in (2, 4, 8):
            name = f"{side}_div_{part}"
            found[name] = number_of(name, found)
    return found | dict(dims)


def parse_sizes(
    text: str, usual: Size | None = None, multiple: int = PIXELS_PER_LATENT
) -> tuple[Sizes, ...]:
    """``512x512,768x768`` or ``256x256..1024x1024`` as profiles.

    A range is best at ``usual`` where that lies in it, else at its high end.

    Raises:
        UsageError: text that is no size, a side that is no multiple of ``multiple`` pixels, low
            above high, or one profile twice.
    """
    found = [_sizes(part.strip(), usual, multiple) for part in text.split(",")]
    repeated = {str(one) for one in found if found.count(one) > 1}
    if repeated:
        raise UsageError(
            f"{', '.join(sorted(repeated))} is there twice",
            where=text,
            hint="name each size once",
        )
    return tuple(found)


def parse_batch(text: str, option: str = "--batch") -> tuple[int, int]:
    """``2`` or ``1..4`` as least and greatest.

    Raises:
        UsageError: no such numbers, or the least above the greatest.
    """
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{option} cannot be {text!r}", hint=f"{option} 1, or {option} 1..4")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise UsageError(
            f"{option} {text}: the least is above the greatest", hint=f"{option} {high}..{low}"
        )
    return low, high


def parse_dim(text: str) -> tuple[str, tuple[int, int]]:
    """``tokens=16..77`` as the name of an axis and its least and greatest size.

    Raises:
        UsageError: text that does not read so.
    """
    name, equals, numbers = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--dim cannot be {text!r}", hint="--dim NAME=LOW..HIGH")
    return name.strip(), parse_batch(numbers, f"--dim {name.strip()}=")


def _sizes(text: str, usual: Size | None, multiple: int) -> Sizes:
    low_text, dots, high_text = text.partition("..")
    low = _size(low_text, text, multiple)
    high = _size(high_text, text, multiple) if dots else low
    if low.height > high.height or low.width > high.width:
        raise UsageError(
            f"the size {low} is above {high}", where=text, hint="write a range as LOW..HIGH"
        )
    inside = usual is not None and all(
        a <= b <= c for a, b, c in zip(low, usual, high, strict=True)
    )
    return Sizes(low, usual if inside and usual is not None else high, high)


def _size(text: str, whole: str, multiple: int) -> Size:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if match is None:
        raise UsageError(
            f"{text.strip()!r} is no size",
            where=whole,
            hint="HEIGHTxWIDTH in pixels: --shapes 512x512,768x768 or 256x256..1024x1024",
        )
    size = Size(int(match[1]), int(match[2]))
    if any(side < multiple or side % multiple for side in size):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise UsageError(
            f"{size} is no size of an image here",
            where=whole,
            why=f"sides are multiples of {multiple} pixels",
            hint=f"the nearest is {near}",
        )
    return size
