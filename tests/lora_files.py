"""LoRA files for tiny pipelines, and diffusers itself to merge them (``fuse_lora``)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdopt.bundle import Bundle
from sdopt.runtime.adapting import adapt
from sdopt.runtime.scheduled import open_stage
from sdopt.session import Session
from sdopt.targets.ort import Ort

LAYERS = {
    "unet": r"(to_[qkv]|to_out\.0|proj_in|ff\.net\.0\.proj|conv1|time_emb_proj)",
    "text_encoder": r"([qkv]_proj|out_proj|fc1)",
    "text_encoder_2": r"(q_proj|v_proj|fc2)",
}
"""Of each component the ends of the names of the modules that a file adapts."""


def write(pipeline: Any, file: Path, seed: int = 0, only: Sequence[str] = tuple(LAYERS)) -> Path:
    """A file in diffusers' names for the components ``only``, random, of rank 3."""
    tensors: dict[str, torch.Tensor] = {}
    for component in only:
        if getattr(pipeline, component, None) is not None:
            for name, down, up in _factors(getattr(pipeline, component), component, seed):
                tensors[f"{component}.{name}.lora_A.weight"] = down
                tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors, file)
    return file


def write_kohya(pipeline: Any, file: Path, seed: int = 0) -> Path:
    """A file in kohya's names for attentions of UNet and text encoder, with an alpha of 2."""
    tensors: dict[str, torch.Tensor] = {}
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        for name, down, up in _factors(getattr(pipeline, component), component, seed):
            if re.search(r"attn", name):
                path = name if component == "unet" else f"text_model.{_short(name)}"
                key = prefix + path.replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = down
                tensors[f"{key}.lora_up.weight"] = up
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    return file


def _short(name: str) -> str:
    return name.removeprefix("text_model.")


def _factors(model: Any, component: str, seed: int) -> list[tuple[str, Any, Any]]:
    found = []
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not re.search(rf"(^|\.){LAYERS[component]}$", name) or weight is None:
            continue
        shape, ones = weight.shape, [1] * (weight.dim() - 2)
        down = torch.randn(3, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
        up = torch.randn(shape[0], 3, *ones, generator=generator) * 0.5
        found.append((name, down, up))
    return found


def fuse(cls: Any, source: Path, folder: Path, loras: Sequence[tuple[Path, float]]) -> Path:
    """The pipeline of ``source`` with adapters merged by diffusers, saved in ``folder``."""
    pipeline = cls.from_pretrained(source)
    for file, scale in loras:
        pipeline.load_lora_weights(file)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def opened(bundle: Path, component: str, stage: str, loras: Sequence[Any] = ()) -> Session:
    """A component's stage with adapters, on ONNX Runtime's CPU."""
    known = Bundle.open(bundle)
    found = known.stage(component, stage)
    adapted = adapt(known, {component: found}, loras)
    return open_stage(Ort(threads=1), found.path, replaced=adapted.replaced.get(component))
