"""What a file is that is no checkpoint: by its ending, its first bytes, or its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sdopt.errors import SourceError, WeightsError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_FOLDER = "give the model's diffusers folder"
_WHOLE = "give the whole model: a diffusers folder, or its single file"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors")

_NAMED: tuple[tuple[str, str, str], ...] = (
    (
        r"(^|\.)lora_(unet|te\d?|transformer)_|\.lora(_linear_layer)?\.(up|down)\.|\.lora_[AB]\.|"
        r"_lora\.(up|down)\.|\.(hada|lokr)_w",
        "a LoRA file: changes to a model, no model",
        "export the model that it was made for with it: sdopt export MODEL -o BUNDLE --lora FILE",
    ),
    (
        r"^(control_model|controlnet|controlnet_cond_embedding|input_hint_block)\.",
        "a ControlNet, which steers a model and is none",
        "export the model that it was trained on; a ControlNet goes with it as --controlnet",
    ),
    (
        r"^(\w+\.)*(double_blocks|double_stream_blocks|single_stream_modulation)\.",
        "a Flux checkpoint",
        _FOLDER,
    ),
    (r"^(\w+\.)*joint_blocks\.", "a Stable Diffusion 3 checkpoint", _FOLDER),
    (
        r"^(input_blocks|middle_block|output_blocks)\.",
        "a UNet alone, without the start of its names (model.diffusion_model.)",
        _WHOLE,
    ),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter", _WHOLE),
    (
        r"^(emb_params|clip_[lg]|string_to_param.*)$",
        "a textual inversion: a word for a model, no model",
        _WHOLE,
    ),
    (
        r"^(down_blocks|up_blocks|mid_block|time_embedding)\.",
        "one component in diffusers' names",
        "give its folder, with config.json, or the pipeline's",
    ),
    (
        r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|conv_out|mid)[._]",
        "a VAE",
        "export the model that it goes with: sdopt export MODEL -o BUNDLE --vae DIR, where DIR is "
        "the VAE as diffusers' save_pretrained wrote it",
    ),
    (
        r"^(cond_stage_model\.|conditioner\.|text_model\.|text_encoders\.|encoder\.block\.)",
        "a text encoder",
        "export the model that it goes with, and it with that: --text-encoder DIR",
    ),
)
"""Patterns of names, most telling first: what such a file is, and what to do."""

_MAGIC = (
    (b"PK\x03\x04", "a pickle (a zip archive as torch.save writes it)"),
    (b"\x80\x02", "a pickle"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"GGUF", "a GGUF file"),
    (b"\x08", "an ONNX file"),
)


def refuse_file(path: Path) -> None:
    """Refuse what is no safetensors file, by its ending or its first bytes.

    Raises:
        SourceError: saying what it is instead.
        WeightsError: it ends in ``.safetensors`` and holds something else.
    """
    if path.suffix in PICKLES:
        raise SourceError(
            "pickled weights are refused",
            where=str(path),
            why="loading a pickle runs whatever code is in it",
            hint="get the model as .safetensors, or convert it where you trust it: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
        )
    if path.suffix == ".onnx":
        raise SourceError(
            "this is an ONNX file, exported already",
            where=str(path),
            hint=f"make a bundle of it: sdopt adopt {path.name} -o BUNDLE",
        )
    if path.suffix != ".safetensors":
        raise SourceError(
            "this file is no model that can be exported",
            where=str(path),
            hint="give a .safetensors file, a diffusers folder, or a Hub id (org/name)",
        )
    if not path.is_file():
        raise SourceError("no such file", where=str(path), hint="check the path")
    with open(path, "rb") as file:
        start = file.read(32)
    for magic, what in _MAGIC:
        # A header of 8 bytes of length and JSON may begin with any byte, but then with a brace.
        if start.startswith(magic) and start[8:9] != b"{":
            raise WeightsError(
                f"this is {what}", where=str(path), hint="download the .safetensors file itself"
            )


def refuse_names(names: Iterable[str], path: Path) -> None:
    """Raise for a safetensors file whose tensors are of no single-file checkpoint.

    Raises:
        SourceError: saying what it is, where the names tell.
    """
    known = list(names)
    if _SHARD.search(path.name):
        raise SourceError(
            "this is one shard of a model",
            where=str(path),
            hint="give the folder that all shards and their index lie in",
        )
    for pattern, what, hint in _NAMED:
        if any(re.search(pattern, name) for name in known):
            raise SourceError(f"this is {what}", where=str(path), hint=hint)
    shown = ", ".join(known[:3]) or "nothing"
    raise SourceError(
        "this is no checkpoint of a known family",
        where=str(path),
        why=f"it holds {shown}" + (", ..." if len(known) > 3 else ""),
        hint="single files of Stable Diffusion 1.x, 2.x and XL are known; " + _FOLDER,
    )
