"""The published architectures that random checkpoints are made of, as data.

Sizes are those of the ``config.json`` files of the published models; what is not named is the
default of the class, as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A folder with weights: the library and class it is of, and the class's options."""

    library: str
    class_name: str
    config: Config


@dataclass(frozen=True)
class Architecture:
    """A diffusers pipeline; ``tokenizers`` maps a folder to the token that it pads with."""

    pipeline: str
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str]
    scheduler: Config
    index: Config = field(default_factory=dict)


END = "<|endoftext|>"
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PNDM = {"_class_name": "PNDMScheduler", **_NOISE, "skip_prk_steps": True}
_UNCHECKED = {
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
    "requires_safety_checker": False,
}


def _unet(**config: Any) -> Part:
    return Part("diffusers", "UNet2DConditionModel", config)


def _vae(**config: Any) -> Part:
    given = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "force_upcast": False,
    }
    return Part("diffusers", "AutoencoderKL", given | config)


def _clip(width: int, layers: int, heads: int, **config: Any) -> Part:
    projected = config.pop("projected", False)
    given = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
    }
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return Part("transformers", name, given | config)


_BIG_G = _clip(1280, 32, 20, hidden_act="gelu", projection_dim=1280, projected=True)

ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(
        "StableDiffusionPipeline",
        {
            "text_encoder": _clip(768, 12, 12),
            "unet": _unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "vae": _vae(sample_size=512, scaling_factor=0.18215),
        },
        {"tokenizer": END},
        _PNDM,
        _UNCHECKED,
    ),
    "sd21": Architecture(
        "StableDiffusionPipeline",
        {
            "text_encoder": _clip(1024, 23, 16, hidden_act="gelu", projection_dim=512),
            "unet": _unet(
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
                upcast_attention=True,
            ),
            "vae": _vae(sample_size=768, scaling_factor=0.18215),
        },
        {"tokenizer": "!"},
        {
            "_class_name": "DDIMScheduler",
            **_NOISE,
            "clip_sample": False,
            "prediction_type": "v_prediction",
        },
        _UNCHECKED,
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "text_encoder": _clip(768, 12, 12, projection_dim=768),
            "text_encoder_2": _BIG_G,
            "unet": _unet(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "vae": _vae(sample_size=1024, scaling_factor=0.13025),
        },
        {"tokenizer": END, "tokenizer_2": "!"},
        {"_class_name": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "leading"},
        {"force_zeros_for_empty_prompt": True},
    ),
    "sd35-large": Architecture(
        "StableDiffusion3Pipeline",
        {
            "text_encoder": _clip(768, 12, 12, projection_dim=768, projected=True),
            "text_encoder_2": _BIG_G,
            "text_encoder_3": Part(
                "transformers",
                "T5EncoderModel",
                {
                    "vocab_size": 32128,
                    "d_model": 4096,
                    "d_kv": 64,
                    "d_ff": 10240,
                    "num_layers": 24,
                    "num_heads": 64,
                    "feed_forward_proj": "gated-gelu",
                    "tie_word_embeddings": False,
                },
            ),
            "transformer": Part(
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 38,
                    "attention_head_dim": 64,
                    "num_attention_heads": 38,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 2432,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 192,
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": _vae(
                sample_size=1024,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        },
        {"tokenizer": END, "tokenizer_2": "!", "tokenizer_3": "<pad>"},
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    ),
    # The blocks of 1.5 at a size that tests can run.
    "tiny": Architecture(
        "StableDiffusionPipeline",
        {
            "text_encoder": _clip(32, 2, 2, vocab_size=514, intermediate_size=64),
            "unet": _unet(
                sample_size=16,
                cross_attention_dim=32,
                attention_head_dim=2,
                block_out_channels=(16, 32, 32, 32),
                norm_num_groups=8,
            ),
            "vae": _vae(
                sample_size=128,
                block_out_channels=(8, 16, 16, 16),
                norm_num_groups=4,
                scaling_factor=0.18215,
            ),
        },
        {"tokenizer": END},
        _PNDM,
        _UNCHECKED,
    ),
}
