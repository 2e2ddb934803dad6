"""What stands before a denoiser's session: a UNet, or a transformer that looks like diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from sdopt.runtime.components import OnHost, Unet, compute, config_of, refuse, timestep_for
from sdopt.session import Session


class Transformer(OnHost):
    """A session in the place of ``SD3Transformer2DModel``."""

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        self._session = session
        self.config = config_of(SD3Transformer2DModel, config)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One denoising step: latents ``[B, C, H, W]`` to the velocity, of the same shape.

        ``encoder_hidden_states`` is ``[B, S, E]``, ``pooled_projections`` ``[B, P]`` and
        ``timestep`` ``[B]``.
        """
        refuse("transformer", others)
        out = compute(
            self._session,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep_for(self._session, timestep, hidden_states.shape[0]),
        )["out_hidden_states"]
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


DENOISERS: Mapping[str, Callable[[Session, dict[str, Any]], Unet | Transformer]] = {
    "unet": Unet,
    "transformer": Transformer,
}
"""What stands before a denoiser's session, by the component's name."""
