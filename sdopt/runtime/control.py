"""A session in the place of a ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput

from sdopt.runtime.components import compute, config_of, refuse, timestep_for
from sdopt.session import Session

_DOWN, _MID = "down_block_res_samples.", "mid_block_res_sample"


class ControlNet(ControlNetModel):
    """A session in the place of ``ControlNetModel``, which pipelines look for by its type."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        super(ControlNetModel, self).__init__()  # no layers: the graph has them
        self._session = session
        self._count = sum(name.startswith(_DOWN) for name in session.outputs)
        self._internal_dict = config_of(ControlNetModel, config)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The residuals of one denoising step, times ``conditioning_scale``.

        ``sample`` is ``[B, 4, H, W]``, ``controlnet_cond`` ``[B, 3, 8H, 8W]`` in 0 to 1.

        Raises:
            UsageError: asked for what the graph does not give (``guess_mode``).
        """
        refuse("controlnet", {"guess_mode": guess_mode, **others})
        found = compute(
            self._session,
            sample=sample,
            timestep=timestep_for(self._session, timestep, sample.shape[0]),
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=controlnet_cond,
            conditioning_scale=torch.tensor(float(conditioning_scale)),
            **(added_cond_kwargs or {}),
        )
        down = tuple(found[f"{_DOWN}{index}"] for index in range(self._count))
        mid = found[_MID]
        if not return_dict:
            return down, mid
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=mid)  # type: ignore[arg-type]
