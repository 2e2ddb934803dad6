"""The components of a pipeline as a data table: where they lie, what goes in and what comes out.

Names of components, inputs, outputs and symbolic dimensions are those of Hugging Face optimum, so
that its pipelines run on a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sdopt.exporters import residuals
from sdopt.exporters.ports import Component, Port
from sdopt.passes.base import Role


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
_STEP = (
    Port("sample", ("batch_size", "in_channels", "height", "width")),
    # Always float32: half precision cannot tell the timesteps above 2048 apart.
    Port("timestep", (), "float32"),
    Port("encoder_hidden_states", (*_TOKENS, "cross_attention_dim")),
)
_ADDED = (
    # Stable Diffusion XL: the projected prompt, and sizes in pixels, in float32 as half
    # precision has no odd numbers above 2048.
    Port("text_embeds", ("batch_size", "text_embeds"), needs=_TEXT_TIME),
    Port("time_ids", ("batch_size", "time_ids"), "float32", needs=_TEXT_TIME),
)
_CONTROLNET = Component(
    "controlnet",
    "controlnet",
    Role.CONTROLNET,
    "ControlNetModel",
    (
        *_STEP,
        Port(
            "controlnet_cond",
            ("batch_size", "conditioning_channels", "sample_height", "sample_width"),
        ),
        Port("conditioning_scale", (), "float32"),
        *_ADDED,
    ),
    (
        Port("down_block_res_samples", (), each="down_residuals"),
        Port("mid_block_res_sample", (), each="mid_residual"),
    ),
    optional=True,
)
_UNET = Component(
    "unet",
    "unet",
    Role.DENOISER,
    "UNet2DConditionModel",
    (
        *_STEP,
        *_ADDED,
        # Latent consistency models take the scale of guidance so.
        Port("timestep_cond", ("batch_size", "time_cond_proj_dim"), needs="time_cond_proj_dim"),
        # In a pipeline with a ControlNet: its outputs, in its order, called as diffusers does.
        Port("down_block_additional_residuals", (), needs=residuals.WANTED, each="down_residuals"),
        Port("mid_block_additional_residual", (), needs=residuals.WANTED, each="mid_residual"),
    ),
    (Port("out_sample", ("batch_size", "out_channels", "height", "width")),),
)
_TEXT_ENCODER_SD3 = replace(_TEXT_ENCODER_2, name="text_encoder", folder="text_encoder")
_TEXT_ENCODER_3 = Component(
    "text_encoder_3",
    "text_encoder_3",
    Role.TEXT_ENCODER,
    "T5EncoderModel",
    (Port("input_ids", _TOKENS, "int64"),),
    (Port("last_hidden_state", (*_TOKENS, "d_model")),),
)
_TRANSFORMER = Component(
    "transformer",
    "transformer",
    Role.DENOISER,
    "SD3Transformer2DModel",
    (
        Port("hidden_states", ("batch_size", "in_channels", "height", "width")),
        Port("encoder_hidden_states", (*_TOKENS, "joint_attention_dim")),
        Port("pooled_projections", ("batch_size", "pooled_projection_dim")),
        Port("timestep", ("batch_size",), "float32"),
    ),
    (Port("out_hidden_states", ("batch_size", "out_channels", "height", "width")),),
)
_LATENT = ("batch_size", "latent_channels", "latent_height", "latent_width")
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
            needs="_class_name=AutoencoderKL",
        ),
        # The tiny one gives the latents themselves.
        Port("latent_sample", _LATENT, needs="_class_name=AutoencoderTiny"),
    ),
    ("AutoencoderTiny",),
)
_VAE_DECODER = Component(
    "vae_decoder",
    "vae",
    Role.VAE_DECODER,
    "AutoencoderKL",
    (Port("latent_sample", _LATENT),),
    (Port("sample", ("batch_size", "out_channels", "sample_height", "sample_width")),),
    ("AutoencoderTiny",),
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
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        ),
        (_TEXT_ENCODER, _CONTROLNET, _UNET, _VAE_ENCODER, _VAE_DECODER),
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
        ),
        (_TEXT_ENCODER_XL, _TEXT_ENCODER_2, _CONTROLNET, _UNET, _VAE_ENCODER, _VAE_DECODER),
    ),
    "sd3": Family(
        "Stable Diffusion 3 and 3.5",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        (
            _TEXT_ENCODER_SD3,
            _TEXT_ENCODER_2,
            _TEXT_ENCODER_3,
            _TRANSFORMER,
            _VAE_ENCODER,
            _VAE_DECODER,
        ),
    ),
}
"""What can be exported; 1.x and 2.x share classes and ports, XL's base and refiner as well."""

COMPONENTS: Mapping[str, Component] = {
    component.name: component
    for family in reversed(tuple(FAMILIES.values()))
    for component in family.components
}
"""Every component by its name; where families differ in its ports, it has the first one's."""


TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SHARED = ("scheduler", *TOKENIZERS)
"""Folders of a pipeline that a bundle takes as they are."""


def supported() -> str:
    """What can be exported, for a hint."""
    return "supported are " + "; ".join(
        f"{one.title} ({', '.join(one.pipelines)})" for one in FAMILIES.values()
    )
