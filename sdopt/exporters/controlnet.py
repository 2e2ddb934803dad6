"""ControlNet, wrapped for tracing."""

from __future__ import annotations

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel

from sdopt.exporters.network import Config, Network


class ControlNet(Network):
    """ControlNetModel: the UNet's inputs and a hint image to what the UNet adds to its skips."""

    prefix = "model."

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = ControlNetModel.from_config(dict(config))
        self.config = dict(self.model.config)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The residuals on the way down, then the middle one, all times the scale.

        ``sample`` is ``[B, 4, H, W]``, ``encoder_hidden_states`` ``[B, S, E]``, the hint
        ``controlnet_cond`` ``[B, 3, 8H, 8W]`` in 0 to 1, ``conditioning_scale`` a scalar; of XL
        also ``text_embeds`` ``[B, P]`` and ``time_ids`` ``[B, 6]``.
        """
        down, mid = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            conditioning_scale,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        return *down, mid
