"""The networks, built from their configuration without weights and wrapped for tracing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from sdopt.errors import SourceError
from sdopt.exporters import residuals
from sdopt.exporters.controlnet import ControlNet
from sdopt.exporters.network import Config, Network
from sdopt.exporters.ports import Component
from sdopt.exporters.sd3 import TextEncoder3, Transformer
from sdopt.passes.base import Role


class TextEncoder(Network):
    """CLIPTextModel: ``input_ids [B, S]`` to the last hidden state, the pooled one, and all."""

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        parsed = _text_config(config)
        self.model = CLIPTextModel(parsed)
        self.config = parsed.to_dict()
        self.every = False

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[B, S]`` to ``[B, S, E]``, ``[B, E]``, and the states around every layer if asked."""
        found = self.model(input_ids=input_ids, output_hidden_states=self.every, return_dict=True)
        return found.last_hidden_state, found.pooler_output, *(found.hidden_states or ())


class TextEncoder2(Network):
    """CLIPTextModelWithProjection: XL's second text encoder, the refiner's one, two of SD3's."""

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        parsed = _text_config(config)
        self.model = CLIPTextModelWithProjection(parsed)
        self.config = parsed.to_dict()

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[B, S]`` to the projection ``[B, P]``, ``[B, S, E]``, and that around every layer."""
        found = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        return found.text_embeds, found.last_hidden_state, *found.hidden_states


def _text_config(config: Config) -> CLIPTextConfig:
    parsed = CLIPTextConfig.from_dict(dict(config))
    parsed._attn_implementation = "sdpa"
    return parsed


class Unet(Network):
    """UNet2DConditionModel: noisy latent, timestep and prompt to the predicted noise."""

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        wanted = config.get(residuals.WANTED)
        own = {key: value for key, value in config.items() if key != residuals.WANTED}
        self.model = UNet2DConditionModel.from_config(own)
        self.config = {**self.model.config, residuals.WANTED: wanted}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        down_block_additional_residuals: list[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, C, H, W]``, a scalar and ``[B, S, E]`` to ``[B, 4, H, W]``.

        Where the network takes them, ``text_embeds`` is ``[B, P]``, ``time_ids`` ``[B, 6]`` or
        ``[B, 5]``, ``timestep_cond`` ``[B, G]`` the embedded scale of guidance, and the residuals
        ``[B, C, H, W]`` of each level are a ControlNet's.
        """
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            return_dict=False,
        )
        result: torch.Tensor = output[0]
        return result


def _autoencoder(config: Config) -> tuple[Any, Config]:
    """The whole autoencoder, of the class that its configuration names, and its configuration."""
    name = "AutoencoderTiny" if config.get("_class_name") == "AutoencoderTiny" else "AutoencoderKL"
    classes: Mapping[str, Any] = {
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderTiny": AutoencoderTiny,
    }
    model = classes[name].from_config(dict(config))
    return model, {**model.config, "_class_name": name}


class VaeEncoder(Network):
    """The encoder half of AutoencoderKL, up to the moments, or of AutoencoderTiny."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, self.config = _autoencoder(config)
        self.encoder = model.encoder
        self.quant_conv = getattr(model, "quant_conv", None) or torch.nn.Identity()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """``[B, 3, 8h, 8w]`` to mean and log-variance ``[B, 8, h, w]``; tiny: ``[B, 4, h, w]``."""
        result: torch.Tensor = self.quant_conv(self.encoder(sample))
        return result


class VaeDecoder(Network):
    """The decoder half of AutoencoderKL or AutoencoderTiny."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, self.config = _autoencoder(config)
        self.post_quant_conv = getattr(model, "post_quant_conv", None) or torch.nn.Identity()
        self.decoder = model.decoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """``[B, 4, h, w]`` to ``[B, 3, 8h, 8w]``."""
        result: torch.Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return result


TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}

_NETWORKS: Mapping[tuple[str, Role], Callable[[Config], Network]] = {
    ("CLIPTextModel", Role.TEXT_ENCODER): TextEncoder,
    ("CLIPTextModelWithProjection", Role.TEXT_ENCODER): TextEncoder2,
    ("T5EncoderModel", Role.TEXT_ENCODER): TextEncoder3,
    ("ControlNetModel", Role.CONTROLNET): ControlNet,
    ("UNet2DConditionModel", Role.DENOISER): Unet,
    ("SD3Transformer2DModel", Role.DENOISER): Transformer,
    ("AutoencoderKL", Role.VAE_ENCODER): VaeEncoder,
    ("AutoencoderKL", Role.VAE_DECODER): VaeDecoder,
}


def build(component: Component, config: Config, dtype: ir.DataType) -> Network:
    """The component's network with parameters of ``dtype``, none of which is allocated.

    Raises:
        SourceError: the configuration is not one that the class can be built from.
    """
    # Under FakeTensorMode Module.to cannot swap its parameters (torch 2.13), so the dtype is set
    # while they are made.
    before = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[dtype])
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    try:
        with mode:
            network = _NETWORKS[component.class_name, component.role](config)
            if isinstance(network, TextEncoder):
                network.every = any(port.each for port in component.outputs)
    except Exception as error:  # constructors and their validators raise anything
        raise SourceError(
            f"{component.class_name} cannot be built from its configuration",
            where=f"{component.folder}/config.json",
            why=next(iter(str(error).strip().splitlines()), repr(error)),
            hint="save the pipeline again with the diffusers and transformers installed here",
        ) from error
    finally:
        torch.set_default_dtype(before)
    network.mode = mode
    return network.eval().requires_grad_(False)
