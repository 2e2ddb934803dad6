"""Which family a diffusers folder is of, and what in it cannot be exported: from its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import SourceError
from sdopt.exporters.components import FAMILIES, Component, supported
from sdopt.passes.base import Role

_PLAIN_UNET = {
    "attention_type": "default",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
}
"""Options of UNet2DConditionModel whose inputs the table lacks, at their off value."""

_SECOND = "CLIPTextModelWithProjection"


def family_name(folder: Path, index: Mapping[str, Any]) -> str:
    """The key in ``FAMILIES``: by the index's class; without one, by what only XL has."""
    if name := index.get("_class_name"):
        return next(key for key, one in FAMILIES.items() if name in one.pipelines)
    paths = [folder / place / "config.json" for place in ("unet", "text_encoder_2", "")]
    configs = [read_json(path) for path in paths if path.is_file()]
    text_time = any(one.get("addition_embed_type") == "text_time" for one in configs)
    second = any(one.get("architectures") == [_SECOND] for one in configs)
    return "sdxl" if text_time or second else "sd"


def check_pipeline(index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a pipeline of no known family.

    Raises:
        SourceError: with those that are known.
    """
    name = index.get("_class_name")
    if not any(name in family.pipelines for family in FAMILIES.values()):
        raise SourceError(
            f"the pipeline {name} is not supported",
            where=str(folder / "model_index.json"),
            hint=supported(),
        )


def check_config(component: Component, folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a denoiser with inputs that the table lacks.

    Raises:
        SourceError: with the options that ask for them.
    """
    if component.role is not Role.DENOISER:
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
            "this UNet takes inputs that are not supported",
            where=str(folder / "config.json"),
            why="; ".join(reasons),
            hint=supported(),
        )


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
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            "a configuration file cannot be read", where=str(path), why=str(error)
        ) from error
    if not isinstance(table, dict):
        raise SourceError("a configuration file holds no table", where=str(path))
    return table
