"""What no weight's shape says of the published families: heads, groups, scales, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NOISE: Mapping[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}

PNDM: Mapping[str, Any] = {
    **_NOISE,
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
DDIM: Mapping[str, Any] = {
    **_NOISE,
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
EULER: Mapping[str, Any] = {
    **_NOISE,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
}
LCM: Mapping[str, Any] = {
    **_NOISE,
    "_class_name": "LCMScheduler",
    "clip_sample": False,
    "original_inference_steps": 50,
}


@dataclass(frozen=True)
class Published:
    """One family as its authors published it.

    Attributes:
        title: its name to people.
        key: its key in ``FAMILIES``.
        pipelines: UNet's input channels to the class of pipeline.
        unet: configuration beyond the shapes.
        vae: the same of the VAE.
        text: the same of the text encoders.
        act: the activation of the first text encoder.
        scheduler: of the pipeline.
        head_width: of the UNet's attentions; 0 where the number of heads is 8 throughout.
        pipeline: more of ``model_index.json``.
    """

    title: str
    key: str
    pipelines: Mapping[int, str]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    act: str = "gelu"
    unet: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=lambda: _TOKENS)
    head_width: int = 64
    pipeline: Mapping[str, Any] = field(default_factory=dict)


_PLAIN = {
    4: "StableDiffusionPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}
_CHECKER = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
_VAE = {"scaling_factor": 0.18215, "sample_size": 512}
_XL_VAE = {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
_XL_UNET = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
_XL = "StableDiffusionXLPipeline"
_XL_INPAINT = "StableDiffusionXLInpaintPipeline"

PUBLISHED: Mapping[str, Published] = {
    "sd1": Published(
        "Stable Diffusion 1.x",
        "sd",
        _PLAIN,
        _VAE,
        PNDM,
        act="quick_gelu",
        unet={"sample_size": 64},
        head_width=0,
        pipeline=_CHECKER,
    ),
    "sd2": Published(
        "Stable Diffusion 2.x",
        "sd",
        _PLAIN,
        {**_VAE, "sample_size": 768},
        DDIM,
        # 2.1 leaves the range of half precision in its attentions otherwise.
        unet={"sample_size": 96, "upcast_attention": True},
        pipeline=_CHECKER,
    ),
    "sdxl": Published(
        "Stable Diffusion XL",
        "sdxl",
        {4: _XL, 9: _XL_INPAINT},
        _XL_VAE,
        EULER,
        act="quick_gelu",
        unet={**_XL_UNET, "sample_size": 128},
        pipeline={"force_zeros_for_empty_prompt": True},
    ),
    "sdxl_refiner": Published(
        "Stable Diffusion XL's refiner",
        "sdxl",
        {4: "StableDiffusionXLImg2ImgPipeline"},
        _XL_VAE,
        EULER,
        unet={**_XL_UNET, "sample_size": 128},
        pipeline={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
}
"""By the family's name in a bundle's manifest."""
