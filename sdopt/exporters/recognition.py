"""Which family a diffusers folder is of, and what in it cannot be exported: from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt import reading
from sdopt.errors import SourceError
from sdopt.exporters import residuals
from sdopt.exporters.components import FAMILIES, supported
from sdopt.exporters.ports import Component
from sdopt.passes.base import Role

_PLAIN_UNET = {
    "attention_type": "default",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
}
"""Options of UNet2DConditionModel whose inputs the table lacks, at their off value."""

_SECOND = "CLIPTextModelWithProjection"
_ONLY_SD3 = ("SD3Transformer2DModel", "T5EncoderModel")


def family_name(folder: Path, index: Mapping[str, Any]) -> str:
    """The key in ``FAMILIES``: by the index's class; without one, by what only some have."""
    if name := index.get("_class_name"):
        return next(key for key, one in FAMILIES.items() if name in one.pipelines)
    places = ("unet", "transformer", "text_encoder_2", "text_encoder_3", "")
    paths = [folder / place / "config.json" for place in places]
    configs = [read_json(path) for path in paths if path.is_file()]
    if any(class_of(one) in _ONLY_SD3 for one in configs):
        return "sd3"
    text_time = any(one.get("addition_embed_type") == "text_time" for one in configs)
    second = any(class_of(one) == _SECOND for one in configs)
    return "sdxl" if text_time or second else "sd"


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a configuration was saved from, as diffusers or transformers name it."""
    names = config.get("architectures")
    first = next(iter(names), None) if isinstance(names, list) else None
    name = config.get("_class_name") or first
    return name if isinstance(name, str) else None


def check_pipeline(index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a pipeline of no known family.

    Raises:
        SourceError: with those that are known.
    """
    name = index.get("_class_name")
    if listed(index, "controlnet") and index["controlnet"][-1] == "MultiControlNetModel":
        raise SourceError(
            "several ControlNets in one pipeline are not supported",
            where=str(folder / "model_index.json"),
            hint="export the pipeline without them, and with one: --controlnet DIR",
        )
    if not any(name in family.pipelines for family in FAMILIES.values()):
        raise SourceError(
            f"the pipeline {name} is not supported",
            where=str(folder / "model_index.json"),
            hint=supported(),
        )


_CONTROLLED = {
    f"{family}{task}": f"{family}ControlNet{task}"
    for family in ("StableDiffusion", "StableDiffusionXL")
    for task in ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
}
"""The pipeline to the one that also takes a ControlNet."""


def controlled(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A pipeline's index with a ControlNet in it.

    Raises:
        SourceError: diffusers has no pipeline for the two.
    """
    name = str(index.get("_class_name"))
    known = _CONTROLLED.get(name, name if name in _CONTROLLED.values() else None)
    if known is None:
        raise SourceError(
            f"a {name} takes no ControlNet",
            where=str(folder / "model_index.json"),
            hint=f"those that do: {', '.join(_CONTROLLED)}",
        )
    return {**index, "_class_name": known, "controlnet": ["diffusers", "ControlNetModel"]}


def check_config(component: Component, folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a denoiser or a ControlNet with inputs that the table lacks.

    Raises:
        SourceError: with the options that ask for them.
    """
    if component.role not in (Role.DENOISER, Role.CONTROLNET):
        return
    reasons = [
        f"{key} is {config[key]!r}"
        for key, off in _PLAIN_UNET.items()
        if config.get(key, off) != off
    ]
    if (added := config.get("addition_embed_type")) not in (None, "text_time"):
        reasons.append(f"addition_embed_type is {added!r}")
    if not isinstance(config.get("cross_attention_dim", 1280), int):
        reasons.append("cross_attention_dim is no single number")
    if reasons:
        raise SourceError(
            f"this {'UNet' if component.role is Role.DENOISER else 'ControlNet'} takes inputs "
            "that are not supported",
            where=str(folder / "config.json"),
            why="; ".join(reasons),
            hint=supported(),
        )


def check_controlnet(folder: Path, config: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Refuse a ControlNet that was trained beside another UNet.

    Raises:
        SourceError: naming what it is for, where their text states differ, or what else does.
    """
    ours, theirs = (one.get("cross_attention_dim", 1280) for one in (unet, config))
    if ours != theirs:
        raise SourceError(
            f"this ControlNet is for {_of_width(theirs)}, and the UNet is {_of_width(ours)}",
            where=str(folder),
            why=f"its cross_attention_dim is {theirs}, the UNet's {ours}",
            hint="take a ControlNet that was trained for this model",
        )
    if residuals.down(config) != residuals.down(unet):
        raise SourceError(
            "this ControlNet's residuals do not fit the UNet",
            where=str(folder),
            why=f"its levels are {_levels(config)}, the UNet's {_levels(unet)}",
            hint="take a ControlNet that was trained for this model",
        )
    if config.get("addition_embed_type") != unet.get("addition_embed_type"):
        raise SourceError(
            "this ControlNet takes other inputs than the UNet",
            where=str(folder),
            why=f"its addition_embed_type is {config.get('addition_embed_type')}, "
            f"the UNet's {unet.get('addition_embed_type')}",
            hint="take a ControlNet that was trained for this model",
        )


_OF_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "XL"}


def _of_width(width: object) -> str:
    known = _OF_WIDTH.get(width) if isinstance(width, int) else None
    return known or f"a model with text states of {width}"


def _levels(config: Mapping[str, Any]) -> str:
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    return f"{'+'.join(map(str, widths))} with {layers} layers each"


def listed(index: Mapping[str, Any], name: str) -> bool:
    """Whether a pipeline's index names a class for its part ``name``."""
    entry = index.get(name)
    return isinstance(entry, list) and any(entry)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        SourceError: it cannot be read or holds something else.
    """
    try:
        return reading.table(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            "a configuration file cannot be read", where=str(path), why=str(error)
        ) from error
