"""A random Stable-Diffusion-1.x-shaped pipeline, small enough to run hundreds of times."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = 40


def _scramble(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values everywhere, so that no zero or one that was initialised hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        parameter.data = noise * 0.3 + 1.0 if parameter.dim() < 2 else noise * scale
    return module.eval()


def unet(widths: tuple[int, ...] = (8, 16, 16, 16)) -> UNet2DConditionModel:
    return _scramble(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=widths,
            layers_per_block=2,
            attention_head_dim=2,
            cross_attention_dim=24,
            norm_num_groups=4,
        ),
        1,
    )


def vae(**options: Any) -> AutoencoderKL:
    return _scramble(
        AutoencoderKL(
            sample_size=64,
            block_out_channels=(4, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=2,
            **options,
        ),
        2,
    )


def text_encoder(eos_token_id: int = VOCABULARY - 1) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=VOCABULARY - 2,
        eos_token_id=eos_token_id,
        pad_token_id=VOCABULARY - 1,
    )
    return _scramble(CLIPTextModel(config), 3)


def tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [*"abcdefghijklmnopq", *(f"{c}</w>" for c in "abcdefghijklmnopq")]
    tokens = [*letters, "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def save(folder: Path, scratch: Path, widths: tuple[int, ...] = (8, 16, 16, 16)) -> None:
    """Write the pipeline in fp32 to ``folder``; ``widths`` are those of the UNet's levels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(scratch),
            unet=unet(widths),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)


def halve(path: Path, to: Path) -> None:
    """Write the float tensors of one safetensors file in half precision."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(state, to, metadata={"format": "pt"})


def rename(path: Path, names: dict[str, str]) -> None:
    """Rename tensors: every key of ``names`` found in a name becomes its value."""
    state = {}
    for name, tensor in load_file(path).items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})
