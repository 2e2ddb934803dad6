"""The three models of the surgery matrix: SD1.5's structure, tiny, seeded; and their inputs."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from tests.surgery.parameters import parameter


@contextmanager
def quiet() -> Iterator[None]:
    """torch 2.13's exporters warn about themselves, and log that torchvision is missing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _UNet(torch.nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            cross_attention_dim=24,
            attention_head_dim=4,
            block_out_channels=(16, 32, 64, 64),
            norm_num_groups=8,
        )
        self.unet.set_attn_processor(_processor(attention))

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Text(torch.nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=128,
            num_attention_heads=4,
            num_hidden_layers=3,
            max_position_embeddings=16,
            eos_token_id=2,
            hidden_act="quick_gelu",
        )
        config._attn_implementation = "sdpa" if attention == "sdpa" else "eager"
        self.encoder = CLIPTextModel(config)

    def forward(self, input_ids: Any) -> Any:
        return self.encoder(input_ids, return_dict=False)


class _Decoder(torch.nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=2,
            norm_num_groups=8,
        )
        self.vae.set_attn_processor(_processor(attention))
        del self.vae.encoder, self.vae.quant_conv

    def forward(self, latent_sample: Any) -> Any:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def _processor(attention: str) -> Any:
    return AttnProcessor2_0() if attention == "sdpa" else AttnProcessor()


INPUTS = {
    "unet": ["sample", "timestep", "encoder_hidden_states"],
    "text_encoder": ["input_ids"],
    "vae_decoder": ["latent_sample"],
}
OUTPUTS = {
    "unet": ["out_sample"],
    "text_encoder": ["last_hidden_state", "pooler_output"],
    "vae_decoder": ["sample"],
}
AXES: dict[str, list[dict[int, str]]] = {
    "unet": [{0: "batch", 2: "height", 3: "width"}, {}, {0: "batch", 1: "tokens"}],
    "text_encoder": [{0: "batch", 1: "tokens"}],
    "vae_decoder": [{0: "batch", 2: "height", 3: "width"}],
}
_OUT_AXES: dict[str, list[dict[int, str]]] = {
    "unet": [AXES["unet"][0]],
    "text_encoder": [{0: "batch", 1: "tokens"}, {0: "batch"}],
    "vae_decoder": [{0: "batch", 2: "out_height", 3: "out_width"}],
}


def dynamic_axes(model: str) -> dict[str, dict[int, str]]:
    """What torch's older exporter is told: the free axes of inputs and outputs."""
    found = dict(zip(INPUTS[model], AXES[model], strict=True))
    found.update(zip(OUTPUTS[model], _OUT_AXES[model], strict=True))
    return {name: axes for name, axes in found.items() if axes}


@functools.cache
def module(model: str, attention: str, dtype: str) -> torch.nn.Module:
    """A model with that attention (``sdpa`` or ``eager``), in ``fp32`` or ``fp16``."""
    made: dict[str, Any] = {"unet": _UNet, "text_encoder": _Text, "vae_decoder": _Decoder}
    with torch.random.fork_rng(), torch.no_grad(), quiet():
        one: torch.nn.Module = made[model](attention).eval().requires_grad_(False)
        for name, weight in one.named_parameters():
            drawn = parameter(name, tuple(weight.shape), np.dtype(np.float32))
            weight.copy_(torch.from_numpy(drawn))
        return one.half() if dtype == "fp16" else one


def parameters(model: str, dtype: str) -> dict[str, np.ndarray]:
    """A model's parameters by name."""
    named = module(model, "eager", dtype).named_parameters()
    return {name: weight.numpy() for name, weight in named}


def arguments(model: str, dtype: str) -> tuple[torch.Tensor, ...]:
    """What the models are traced with; batch 2: torch.export takes an axis of 1 for fixed."""
    generator = torch.Generator().manual_seed(1)
    kind = torch.float16 if dtype == "fp16" else torch.float32
    if model == "unet":
        sample = torch.randn(2, 4, 16, 16, generator=generator).to(kind)
        states = torch.randn(2, 7, 24, generator=generator).to(kind)
        return sample, torch.tensor(500.0, dtype=kind), states
    if model == "vae_decoder":
        return (torch.randn(2, 4, 6, 6, generator=generator).to(kind),)
    return (torch.randint(3, 64, (2, 16), generator=generator),)
