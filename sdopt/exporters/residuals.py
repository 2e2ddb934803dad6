"""What a ControlNet gives and its UNet adds: a map per skip connection, one in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdopt.errors import SourceError

WANTED = "controlnet_residuals"
"""The key of a UNet's configuration that says that its graph takes residuals."""

Dims = tuple[str | int, ...]


def down(config: Mapping[str, Any]) -> list[tuple[str, Dims]]:
    """Suffix of the name and dims of each residual on the way down: 12 for SD 1.x, 9 for XL.

    They come in the order in which the UNet makes the maps that they are added to: the first
    convolution, then each level's layers and its downsampler.
    """
    found = _maps(config)[:-1]
    return [(f".{index}", dims) for index, dims in enumerate(found)]


def mid(config: Mapping[str, Any]) -> list[tuple[str, Dims]]:
    """The one residual behind the middle block, at the lowest resolution."""
    return [("", _maps(config)[-1])]


EACH: Mapping[str, Callable[[Mapping[str, Any]], list[tuple[str, Dims]]]] = {
    "down_residuals": down,
    "mid_residual": mid,
}
"""What a port's ``each`` may say beside the key of a number of layers."""


def _maps(config: Mapping[str, Any]) -> list[Dims]:
    """The dims of every residual, the middle one last.

    Raises:
        SourceError: the configuration does not say how many levels and layers there are.
    """
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block")
    if not isinstance(widths, list | tuple) or not isinstance(layers, int | list | tuple):
        raise SourceError(
            "the configuration does not say what residuals a ControlNet gives",
            where="config.json",
            why=f"block_out_channels is {widths!r}, layers_per_block is {layers!r}",
        )
    each = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    found = [_dims(widths[0], 1)]
    for level, (width, count) in enumerate(zip(widths, each, strict=True)):
        found += [_dims(width, 2**level)] * count
        if level < len(widths) - 1:
            found.append(_dims(width, 2 ** (level + 1)))
    return [*found, _dims(widths[-1], 2 ** (len(widths) - 1))]


def _dims(channels: int, divisor: int) -> Dims:
    sides = [side if divisor == 1 else f"{side}_div_{divisor}" for side in ("height", "width")]
    return ("batch_size", int(channels), *sides)
