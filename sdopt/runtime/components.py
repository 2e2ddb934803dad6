"""Sessions that look like diffusers' and transformers' models to a diffusers pipeline.

All of them speak float32 to the pipeline, so that schedulers compute in it whatever the graphs
are in; a session casts where its graph is in half precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig, T5Config
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from sdopt.errors import BundleError, UsageError
from sdopt.session import Session
from sdopt.shapes import number_of

_STATES = "hidden_states."
_DOWN, _MID = "down_block_additional_residuals.", "mid_block_additional_residual"


class OnHost:
    """What a pipeline asks of any of its models."""

    dtype = torch.float32
    device = torch.device("cpu")

    def modules(self) -> Iterator[torch.nn.Module]:
        """None: diffusers looks among them for what moves weights between devices."""
        return iter(())


class TextEncoder(OnHost):
    """A session in the place of CLIP's text models, with a projection or without, or of T5's."""

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        self._session = session
        cls = T5Config if config.get("model_type") == "t5" else CLIPTextConfig
        self.config = cls(**config)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **others: Any,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        """``input_ids`` ``[B, S]`` to ``last_hidden_state`` ``[B, S, E]`` and what is pooled.

        That is ``pooler_output`` ``[B, E]`` or ``text_embeds`` ``[B, P]``; ``hidden_states`` are
        ``[B, S, E]`` before the first layer and after each.

        Raises:
            UsageError: asked for what the graph does not give.
        """
        refuse("text encoder", {"attention_mask": attention_mask, **others})
        states = [name for name in self._session.outputs if name.startswith(_STATES)]
        if not states:
            refuse("text encoder", {"output_hidden_states": output_hidden_states})
        found = compute(self._session, input_ids=input_ids)
        given: dict[str, Any] = {"last_hidden_state": found["last_hidden_state"]}
        if output_hidden_states:
            given["hidden_states"] = tuple(found[f"{_STATES}{i}"] for i in range(len(states)))
        if "text_embeds" in found:
            return CLIPTextModelOutput(text_embeds=found["text_embeds"], **given)
        return BaseModelOutputWithPooling(pooler_output=found.get("pooler_output"), **given)


class Unet(OnHost):
    """A session in the place of ``UNet2DConditionModel``."""

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        self._session = session
        self.config = config_of(UNet2DConditionModel, config)
        # XL's pipelines look up here how wide the embedding of sizes and prompt is.
        width = self.config["projection_class_embeddings_input_dim"]
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """One denoising step: ``sample`` ``[B, C, H, W]`` to the predicted noise.

        ``timestep_cond`` is ``[B, G]``, the embedded scale of guidance, for a latent consistency
        model; ``added_cond_kwargs`` are XL's ``text_embeds`` ``[B, P]`` and ``time_ids``
        ``[B, 6]``, or ``[B, 5]`` for its refiner; the residuals are a ControlNet's.
        """
        refuse("unet", others)
        given = {
            "sample": sample,
            "timestep": timestep_for(self._session, timestep, sample.shape[0]),
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
            **(added_cond_kwargs or {}),
            **residual_feeds(
                self._session,
                sample,
                down_block_additional_residuals,
                mid_block_additional_residual,
            ),
        }
        feeds = {name: tensor for name, tensor in given.items() if tensor is not None}
        out = compute(self._session, **feeds)["out_sample"]
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class Vae(OnHost):
    """One or two sessions in the place of ``AutoencoderKL`` or ``AutoencoderTiny``."""

    def __init__(self, decoder: Session, encoder: Session | None, config: dict[str, Any]) -> None:
        self._decoder = decoder
        self._encoder = encoder
        tiny = config.get("_class_name") == "AutoencoderTiny"
        self.config = config_of(AutoencoderTiny if tiny else AutoencoderKL, config)

    def to(self, *_: object, **__: object) -> Vae:
        """Itself: XL's pipelines move a VAE to float32, in which all of this speaks already."""
        return self

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: object = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents ``[B, 4, H, W]`` to an image ``[B, 3, 8H, 8W]`` in -1 to 1."""
        image = compute(self._decoder, latent_sample=z)["sample"]
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> (
        AutoencoderKLOutput
        | AutoencoderTinyOutput
        | tuple[DiagonalGaussianDistribution | torch.Tensor]
    ):
        """An image ``[B, 3, H, W]`` in -1 to 1 to the distribution of its latents, or to them.

        Raises:
            UsageError: the pipeline was loaded without the encoder.
        """
        if self._encoder is None:
            raise UsageError(
                "this pipeline was loaded without the VAE's encoder",
                hint="load_pipeline(BUNDLE, image_to_image=True)",
            )
        given = compute(self._encoder, sample=x)
        if "latent_sample" in given:
            latents = given["latent_sample"]
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        found = DiagonalGaussianDistribution(given["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)


def timestep_for(session: Session, timestep: torch.Tensor | float, batch: int) -> torch.Tensor:
    """The timestep in the rank and kind that the graph takes it in.

    Raises:
        UsageError: it lies between two whole ones, and the graph takes those.
    """
    port = session.inputs["timestep"]
    time = torch.as_tensor(timestep).reshape(-1).to(torch.float64)
    if port.dtype.kind == "i":
        if not torch.equal(time, time.round()):
            raise UsageError(
                "this scheduler steps between the trained timesteps",
                why=f"the graph takes whole timesteps ({port.dtype})",
                hint="choose another scheduler (ddim), or export with a float timestep",
            )
        time = time.to(torch.int64)
    return time[0] if not port.dims else time.expand(batch)


def residual_feeds(
    session: Session,
    sample: torch.Tensor,
    down: Sequence[torch.Tensor] | None,
    mid: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What a UNet's session takes of a ControlNet; zeros, which add nothing, where none ran.

    ``sample`` is the step's latent ``[B, C, H, W]``, which gives the sides of the residuals.
    """
    if down is not None and mid is not None:
        return {**{f"{_DOWN}{index}": one for index, one in enumerate(down)}, _MID: mid}
    batch, _, height, width = sample.shape
    known = {"batch_size": batch, "height": height, "width": width}
    return {
        name: torch.zeros(
            [dim if isinstance(dim, int) else number_of(dim, known) for dim in port.dims]
        )
        for name, port in session.inputs.items()
        if name.startswith(_DOWN) or name == _MID
    }


def compute(session: Session, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a session on tensors; what comes back is float32.

    Raises:
        BundleError: the graph has other inputs than the component's.
    """
    if session.inputs.keys() != tensors.keys():
        raise BundleError(
            f"a graph of this bundle takes {', '.join(session.inputs)}",
            why=f"a pipeline gives it {', '.join(tensors)}",
            hint="export it again, or rename its inputs",
        )
    feeds = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    for name, array in feeds.items():
        if session.inputs[name].dtype.kind == "i":
            feeds[name] = array.astype(np.int64)
    return {name: torch.from_numpy(out).float() for name, out in session.run(feeds).items()}


def config_of(cls: Any, given: dict[str, Any]) -> Any:
    """A model's configuration: what older files leave out has the class's default."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    frozen: Any = FrozenDict
    return frozen({**defaults, **given})


def refuse(component: str, given: dict[str, Any]) -> None:
    """Refuse what a pipeline asks of a model beyond its graph's inputs.

    Raises:
        UsageError: naming the options.
    """
    used = [
        name
        for name, value in given.items()
        if value is not None and value is not False and name != "return_dict"
    ]
    if used:
        raise UsageError(
            f"the exported {component} has no {', '.join(used)}",
            why="a graph has only the inputs and outputs that it was exported with",
            hint="run the pipeline without this option",
        )
