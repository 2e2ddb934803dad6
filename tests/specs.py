"""A few specs of every pass in the registry, for what must hold of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sdopt import registry

ADAPTER = "adapter.safetensors"
"""A file for the block of these tests, written beside each."""

EXAMPLES = {
    "deep_cache": ["deep_cache=3", "deep_cache=0:steps=1+2+4", "deep_cache=2:cut=1:step=sigma"],
    "hoist": ["hoist", "hoist:prompt=context+pooled:step=sigma"],
    "tome": ["tome=1", "tome=5:ratio=0.25", "tome=2:seed=3"],
    "lora": [f"lora={ADAPTER}", f"lora={ADAPTER}:scale=0.5"],
    "cast_bf16": ["cast_bf16", "cast_bf16:keep=io+LayerNormalization+mid_block.*"],
    "cast_fp16": ["cast_fp16", "cast_fp16:keep=io+LayerNormalization+mid_block.*"],
    "graphsurgeon": ["graphsurgeon=tests.passes.gs_scripts.tidy"],
    "quantize": ["quantize=w8", "quantize=w4:block=16:ends=true", "quantize=w8:keep=Conv+mid.*"],
    "flash_attention": ["flash_attention=ort", "flash_attention=trt:form=decomposed"],
    "fix_shapes": ["fix_shapes=B@2+S@16", "fix_shapes=nothing@1"],
    "lower_ascend": ["lower_ascend", "lower_ascend:timestep=keep"],
    "lower_opset": ["lower_opset=20", "lower_opset=11"],
    "fuse_shared_linears": ["fuse_shared_linears", "fuse_shared_linears:least=2"],
    "quick_gelu": ["quick_gelu", "quick_gelu:kernel=ascend"],
    "pad_align": ["pad_align", "pad_align:mode=crop", "pad_align:mode=pad"],
}
"""Specs to try per pass; those that are not listed have no options to vary."""

NAMES = sorted(registry.table("passes"))
SPECS = [text for name in NAMES for text in EXAMPLES.get(name, [name])]


def write_adapter(folder: Path) -> None:
    """The file that lora's examples name; it fits projections called wq, wk, wv and wo."""
    factors = {
        f"w{one}.lora_{kind}.weight": s
        for one in "qkvo"
        for kind, s in (("down", (4, 32)), ("up", (32, 4)))
    }
    rng = np.random.default_rng(1)
    tensors = {f"lora_unet_{n}": rng.standard_normal(s) for n, s in factors.items()}
    save_file(tensors, folder / ADAPTER)
