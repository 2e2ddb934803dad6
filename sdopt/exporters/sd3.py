"""The networks of Stable Diffusion 3 that no other family has: its transformer and T5."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers.activations import NewGELUActivation
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel, T5LayerNorm

from sdopt.exporters.network import Config, Network


class TextEncoder3(Network):
    """T5EncoderModel, the third text encoder of Stable Diffusion 3.

    In half precision the sum that runs through the layers and the last product of each
    feed-forward are in float32, as transformers has it: T5-XXL leaves float16's range there.
    """

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        parsed = T5Config.from_dict(dict(config))
        parsed._attn_implementation = "sdpa"
        self.model = T5EncoderModel(parsed)
        self.config = parsed.to_dict()
        self.wide = torch.get_default_dtype() == torch.float16
        for module in self.model.modules():
            if isinstance(module, T5LayerNorm):
                _as_one_node(module, module.variance_epsilon)
            if isinstance(module, NewGELUActivation):
                _replace_forward(module, functools.partial(F.gelu, approximate="tanh"))
            last = getattr(module, "wo", None)
            if self.wide and isinstance(last, torch.nn.Linear):
                _replace_forward(last, functools.partial(_wide_linear, last))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[B, S]`` to the last hidden state ``[B, S, E]``."""
        x, bias = self.model.shared(input_ids), None
        x = x.float() if self.wide else x
        # Layer by layer, as the stack would make a mask that hides nothing.
        for block in self.model.encoder.block:
            x, bias = block(x, attention_mask=None, position_bias=bias)[:2]
        result: torch.Tensor = self.model.encoder.final_layer_norm(x)
        return result


class Transformer(Network):
    """SD3Transformer2DModel: noisy latent, prompt and timestep to the predicted velocity."""

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = SD3Transformer2DModel.from_config(dict(config))
        self.config = dict(self.model.config)
        # Made in float32 whatever the weights are in; a checkpoint has it in its own dtype.
        embed = self.model.pos_embed
        embed.pos_embed = embed.pos_embed.to(torch.get_default_dtype())
        for module in self.model.modules():
            if isinstance(module, RMSNorm):
                _as_one_node(module, module.eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
    ) -> torch.Tensor:
        """``[B, C, H, W]``, ``[B, S, E]``, ``[B, P]`` and ``[B]`` to ``[B, C, H, W]``."""
        result: torch.Tensor = self.model(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            return_dict=False,
        )[0]
        return result


def _as_one_node(norm: RMSNorm | T5LayerNorm, epsilon: float) -> None:
    """Have an RMS norm traced as what it is, in place of the six operators it is written in."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor | None = norm.weight
        if weight is None or weight.dtype == x.dtype:
            return F.rms_norm(x, [x.shape[-1]], weight, epsilon)
        wide = F.rms_norm(x, [x.shape[-1]], weight.to(x.dtype), epsilon)
        return wide.to(weight.dtype)

    _replace_forward(norm, forward)


def _replace_forward(module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    module.__dict__["forward"] = forward


def _wide_linear(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), linear.weight.float())
