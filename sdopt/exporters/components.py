"""The components of a pipeline as a data table: where they lie, what goes in and what comes out.

Names of components, inputs, outputs and symbolic dimensions are those of Hugging Face optimum, so
that its pipelines run on a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sdopt.errors import SourceError
from sdopt.passes.base import Role

Kind = Literal["weights", "float32", "int64"]
"""A port's dtype; ``weights`` is whatever dtype the component is exported in."""

SAMPLE_SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "sequence_length": 11,
    "height": 13,
    "width": 23,
    "latent_height": 13,
    "latent_width": 23,
    "sample_height": 107,
    "sample_width": 189,
}
"""The dynamic dimensions and the sizes they are traced at.

All odd: at a latent that is no multiple of 8, diffusers passes every skip's size to its
upsamplers, so the traced graph is right at every size.
"""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: its name in the graph.
        dims: per axis a dynamic dimension (a key of ``SAMPLE_SIZES``) or the key of the
            component's configuration that holds the size, or one of ``_COMPUTED``; empty for a
            scalar.
        kind: its dtype.
        needs: what the configuration must say for the port to be there: ``key`` is not null, or
            ``key=value``; empty for a port that always is.
        each: the key of a number of layers: then there is one port before the first and one after
            each, ``name.0`` and so on.
    """

    name: str
    dims: tuple[str, ...]
    kind: Kind = "weights"
    needs: str = ""
    each: str = ""

    def of(self, config: Mapping[str, Any]) -> tuple[Port, ...]:
        """The ports that this entry of the table means for a configuration: none, one, several.

        Raises:
            SourceError: the configuration does not say how many layers there are.
        """
        key, _, value = self.needs.partition("=")
        found = config.get(key)
        if key and (found != value if value else found is None):
            return ()
        if not self.each:
            return (self,)
        count = _size(config, self.each) + 1
        return tuple(replace(self, name=f"{self.name}.{i}", each="") for i in range(count))

    def dynamic_axes(self) -> dict[int, str]:
        """Axis to symbolic name, for the dynamic axes."""
        return {axis: dim for axis, dim in enumerate(self.dims) if dim in SAMPLE_SIZES}

    def sample_shape(self, config: Mapping[str, Any]) -> list[int]:
        """The shape that the port is traced at.

        Raises:
            SourceError: the configuration does not say a size that the port needs.
        """
        return [SAMPLE_SIZES.get(dim) or _size(config, dim) for dim in self.dims]


@dataclass(frozen=True)
class Component:
    """One graph of a bundle and the folder of the pipeline that it is made from.

    Attributes:
        name: its folder in a bundle.
        folder: its folder in a diffusers pipeline.
        role: what it is for.
        class_name: the class of diffusers or transformers that it is built from.
        inputs: in order.
        outputs: in order.
    """

    name: str
    folder: str
    role: Role
    class_name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def of(self, config: Mapping[str, Any]) -> Component:
        """The component with the ports that a configuration gives it.

        Raises:
            SourceError: the configuration does not say how many layers there are.
        """
        inputs = tuple(port for entry in self.inputs for port in entry.of(config))
        outputs = tuple(port for entry in self.outputs for port in entry.of(config))
        return replace(self, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class Family:
    """Models that diffusers runs by the same pipelines.

    Attributes:
        title: its name to people.
        pipelines: diffusers' classes.
        components: in the order in which they run.
    """

    title: str
    pipelines: tuple[str, ...]
    components: tuple[Component, ...]


_TEXT_TIME = "addition_embed_type=text_time"
_TOKENS = ("batch_size", "sequence_length")
_STATES = (*_TOKENS, "hidden_size")

_TEXT_ENCODER = Component(
    "text_encoder",
    "text_encoder",
    Role.TEXT_ENCODER,
    "CLIPTextModel",
    (Port("input_ids", _TOKENS, "int64"),),
    (
        Port("last_hidden_state", _STATES),
        Port("pooler_output", ("batch_size", "hidden_size")),
    ),
)
_EACH_STATE = Port("hidden_states", _STATES, each="num_hidden_layers")
_TEXT_ENCODER_XL = replace(_TEXT_ENCODER, outputs=(*_TEXT_ENCODER.outputs, _EACH_STATE))
_TEXT_ENCODER_2 = Component(
    "text_encoder_2",
    "text_encoder_2",
    Role.TEXT_ENCODER,
    "CLIPTextModelWithProjection",
    (Port("input_ids", _TOKENS, "int64"),),
    (
        Port("text_embeds", ("batch_size", "projection_dim")),
        Port("last_hidden_state", _STATES),
        _EACH_STATE,
    ),
)
_UNET = Component(
    "unet",
    "unet",
    Role.DENOISER,
    "UNet2DConditionModel",
    (
        Port("sample", ("batch_size", "in_channels", "height", "width")),
        # Always float32: half precision cannot tell the timesteps above 2048 apart.
        Port("timestep", (), "float32"),
        Port("encoder_hidden_states", (*_TOKENS, "cross_attention_dim")),
        # Stable Diffusion XL: the projected prompt, and sizes in pixels, in float32 as half
        # precision has no odd numbers above 2048.
        Port("text_embeds", ("batch_size", "text_embeds"), needs=_TEXT_TIME),
        Port("time_ids", ("batch_size", "time_ids"), "float32", needs=_TEXT_TIME),
        # Latent consistency models take the scale of guidance so.
        Port("timestep_cond", ("batch_size", "time_cond_proj_dim"), needs="time_cond_proj_dim"),
    ),
    (Port("out_sample", ("batch_size", "out_channels", "height", "width")),),
)
_VAE_ENCODER = Component(
    "vae_encoder",
    "vae",
    Role.VAE_ENCODER,
    "AutoencoderKL",
    (Port("sample", ("batch_size", "in_channels", "sample_height", "sample_width")),),
    (
        # Mean and log-variance, so twice latent_channels.
        Port(
            "latent_parameters",
            ("batch_size", "2*latent_channels", "latent_height", "latent_width"),
        ),
    ),
)
_VAE_DECODER = Component(
    "vae_decoder",
    "vae",
    Role.VAE_DECODER,
    "AutoencoderKL",
    (Port("latent_sample", ("batch_size", "latent_channels", "latent_height", "latent_width")),),
    (Port("sample", ("batch_size", "out_channels", "sample_height", "sample_width")),),
)

FAMILIES: Mapping[str, Family] = {
    "sd": Family(
        "Stable Diffusion 1.x and 2.x",
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionInstructPix2PixPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
        ),
        (_TEXT_ENCODER, _UNET, _VAE_ENCODER, _VAE_DECODER),
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        (_TEXT_ENCODER_XL, _TEXT_ENCODER_2, _UNET, _VAE_ENCODER, _VAE_DECODER),
    ),
}
"""What can be exported; 1.x and 2.x share classes and ports, XL's base and refiner as well."""

COMPONENTS: Mapping[str, Component] = {
    component.name: component
    for family in reversed(tuple(FAMILIES.values()))
    for component in family.components
}
"""Every component by its name; where families differ in its ports, it has the first one's."""


TOKENIZERS = ("tokenizer", "tokenizer_2")
SHARED = ("scheduler", *TOKENIZERS)
"""Folders of a pipeline that a bundle takes as they are."""


def supported() -> str:
    """What can be exported, for a hint."""
    return "supported are " + "; ".join(
        f"{one.title} ({', '.join(one.pipelines)})" for one in FAMILIES.values()
    )


def _time_ids(config: Mapping[str, Any]) -> int:
    """How many numbers XL's ``time_ids`` are: 6 sizes, or the refiner's 4 and a score.

    The refiner is the UNet whose one text encoder gives both the states and the embedding, of
    one width (1280; the base's states are both encoders', 2048).
    """
    embedded = _size(config, "projection_class_embeddings_input_dim")
    five = embedded - 5 * _size(config, "addition_time_embed_dim")
    return 5 if five == _size(config, "cross_attention_dim") else 6


def _text_embeds(config: Mapping[str, Any]) -> int:
    """The width of XL's ``text_embeds``: what is left of the added embedding."""
    embedded = _size(config, "projection_class_embeddings_input_dim")
    return embedded - _time_ids(config) * _size(config, "addition_time_embed_dim")


_COMPUTED: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "2*latent_channels": lambda config: 2 * _size(config, "latent_channels"),
    "time_ids": _time_ids,
    "text_embeds": _text_embeds,
}
"""Sizes that a configuration holds under no key of their own."""


def _size(config: Mapping[str, Any], key: str) -> int:
    value = _COMPUTED[key](config) if key in _COMPUTED else config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(
            f"the configuration's {key} is {value!r}, a positive whole number is needed",
            where="config.json",
            hint=supported(),
        )
    return value
