"""Tiny random pipelines of the families beyond Stable Diffusion 1.x, and how they are compared."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sdopt.report import Report
from sdopt.session import Session
from tests.exporters import tiny

Tensors = Mapping[str, torch.Tensor]

ADDED = {"text_embeds": 16, "time_ids": 6}
"""What XL's UNet takes beside the others, and how wide it is in the tiny one."""

FP32, FP16 = 5e-6, 5e-3
"""The greatest relative L2 distance from PyTorch, by dtype."""


def distance(got: np.ndarray, want: torch.Tensor) -> float:
    """Relative L2 distance from what PyTorch computes."""
    reference = want.double().numpy()
    assert got.shape == reference.shape
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def reference(folder: Path, component: str) -> Callable[[Tensors], Tensors]:
    """A component of a pipeline's folder in PyTorch: the graph's inputs to its outputs."""
    if component == "unet":
        model = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        return lambda feeds: {"out_sample": _unet(model, dict(feeds))}
    if component.startswith("vae"):
        config = AutoencoderKL.load_config(folder / "vae")
        if config["_class_name"] == "AutoencoderTiny":
            return _tiny_vae(AutoencoderTiny.from_pretrained(folder / "vae").eval(), component)
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        if component == "vae_decoder":
            return lambda feeds: {"sample": vae.decode(feeds["latent_sample"]).sample}
        return lambda feeds: {
            "latent_parameters": vae.encode(feeds["sample"]).latent_dist.parameters
        }
    if component == "transformer":
        transformer = SD3Transformer2DModel.from_pretrained(folder / component).eval()
        return lambda feeds: {"out_hidden_states": transformer(**feeds).sample}
    if component == "text_encoder_3":
        third = T5EncoderModel.from_pretrained(folder / component).eval()
        return lambda feeds: {"last_hidden_state": third(feeds["input_ids"]).last_hidden_state}
    config = json.loads((folder / component / "config.json").read_text())
    text = getattr(transformers, config["architectures"][0]).from_pretrained(folder / component)
    text.eval()
    every = (folder / "text_encoder_2").is_dir()
    return lambda feeds: _text(text(feeds["input_ids"], output_hidden_states=every))


def _unet(model: UNet2DConditionModel, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {name: feeds.pop(name) for name in ADDED if name in feeds}
    given: dict[str, Any] = {name: one for name, one in feeds.items() if "." not in name}
    if down := [one for name, one in feeds.items() if "." in name]:
        given["down_block_additional_residuals"] = down
    result: torch.Tensor = model(**given, added_cond_kwargs=added).sample
    return result


def controlnet_reference(folder: Path) -> Callable[[Tensors], Tensors]:
    """A ControlNet's folder in PyTorch: the graph's inputs to its outputs."""
    model = ControlNetModel.from_pretrained(folder).eval()

    def run(feeds: Tensors) -> Tensors:
        added = {name: one for name, one in feeds.items() if name in ADDED}
        given = {name: one for name, one in feeds.items() if name not in ADDED}
        down, mid = model(**given, added_cond_kwargs=added, return_dict=False)
        found = {f"down_block_res_samples.{i}": one for i, one in enumerate(down)}
        return {**found, "mid_block_res_sample": mid}

    return run


def _tiny_vae(vae: AutoencoderTiny, component: str) -> Callable[[Tensors], Tensors]:
    if component == "vae_decoder":
        return lambda feeds: {"sample": vae.decode(feeds["latent_sample"]).sample}
    return lambda feeds: {"latent_sample": vae.encode(feeds["sample"]).latents}


def _text(found: Any) -> Tensors:
    pooled = "text_embeds" if "text_embeds" in found else "pooler_output"
    states = found.hidden_states or ()
    return {
        "last_hidden_state": found.last_hidden_state,
        pooled: found[pooled],
        **{f"hidden_states.{i}": state for i, state in enumerate(states)},
    }


def check(
    session: Session, model: Callable[[Tensors], Tensors], feeds: Tensors, at: float
) -> None:
    """Compare every output of a session with PyTorch's, relative L2 at most ``at``."""
    with torch.no_grad():
        want = model(feeds)
    got = session.run({name: tensor.numpy() for name, tensor in feeds.items()})
    assert got.keys() == want.keys()
    far = {name: distance(got[name].astype(np.float32), want[name]) for name in want}
    assert max(far.values()) <= at, far


def latents(pipeline: Any, prompt: str, **options: Any) -> torch.Tensor:
    """What a pipeline draws in four steps from seed 3, before the VAE decodes it."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    given = {"num_inference_steps": 4, "output_type": "latent", **options}
    result: torch.Tensor = pipeline(prompt, generator=generator, **given).images
    return result


def inpainted(pipeline: Any, image: Any, mask: Any, strength: float) -> np.ndarray:
    """What an inpainting pipeline of diffusers makes of an image in four steps from seed 3."""
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        "ab",
        image=image,
        mask_image=mask,
        strength=strength,
        width=image.width,
        height=image.height,
        num_inference_steps=4,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    )
    return np.asarray(found.images[0], float)


def fused(report: Report) -> dict[str, Mapping[str, int]]:
    """What ``fuse_qkv`` did to each component."""
    return {
        one.component: next(each.rewrites for each in one.passes if each.spec == "fuse_qkv")
        for one in report.components
    }


def feeds_of(component: str, size: tuple[int, int], seed: int, **dims: int) -> Tensors:
    """Random inputs of a component at a latent of ``size``; ``dims`` are extra inputs' widths."""
    generator = torch.Generator().manual_seed(seed)
    batch, (height, width) = 1 + seed % 3, size

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    if component == "vae_encoder":
        return {"sample": noise(3, 8 * height, 8 * width)}
    if component == "vae_decoder":
        return {"latent_sample": noise(dims.get("channels", 4), height, width)}
    if component == "transformer":
        return {
            "hidden_states": noise(dims["channels"], 2 * height, 2 * width),
            "encoder_hidden_states": noise(1 + 19 * seed, dims["states"]),
            "pooled_projections": noise(dims["pooled"]),
            "timestep": torch.full((batch,), float(seed * 977 % 1000) + 0.5),
        }
    if component != "unet":
        ids = torch.randint(0, tiny.VOCABULARY - 2, (batch, 3 + 19 * seed), generator=generator)
        ids[:, 1 + seed] = tiny.VOCABULARY - 1
        return {"input_ids": ids}
    more = {name: noise(width) for name, width in dims.items() if name not in _UNET}
    if "time_ids" in more:  # sizes in pixels
        more["time_ids"] = (more["time_ids"].abs() * 800).round()
    return {
        "sample": noise(dims.get("channels", 4), height, width),
        "timestep": torch.tensor(float(seed * 977 % 1000)),
        "encoder_hidden_states": noise(1 + 19 * seed, dims.get("states", 24)),
        **more,
    }


_UNET = ("channels", "states")


def unet(**options: Any) -> UNet2DConditionModel:
    """A random UNet of three levels; ``options`` are those of diffusers."""
    given: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
    }
    return tiny._scramble(UNet2DConditionModel(**(given | options)), 1)


def controlnet(folder: Path, source: Path) -> None:
    """Write a random ControlNet for the UNet of the pipeline in ``source``."""
    model = UNet2DConditionModel.from_pretrained(source / "unet")
    made = ControlNetModel.from_unet(
        model, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    save(tiny._scramble(made, 7), folder)


def text_config(**options: Any) -> CLIPTextConfig:
    """The configuration of a small text encoder for the tiny tokenizer."""
    given: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 77,
        "bos_token_id": tiny.VOCABULARY - 2,
        "eos_token_id": tiny.VOCABULARY - 1,
        "pad_token_id": 0,
    }
    return CLIPTextConfig(**(given | options))


def sd2(folder: Path, scratch: Path) -> None:
    """Write a pipeline shaped as Stable Diffusion 2.x at 768 pixels is.

    Its text encoder has one layer less than it was trained with and no mark of that, heads are a
    list of counts, projections are linear, attention is upcast and the UNet predicts v.
    """
    encoder = CLIPTextModel(text_config(hidden_act="gelu", num_hidden_layers=3, projection_dim=12))
    options = {
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "sample_size": 96,
    }
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        steps_offset=1,
    )
    save(
        StableDiffusionPipeline(
            unet=unet(**options),
            scheduler=scheduler,
            text_encoder=tiny._scramble(encoder, 3),
            **_parts(scratch),
        ),
        folder,
    )


def sd1(cls: Any, folder: Path, scratch: Path, scheduler: Any, **options: Any) -> None:
    """Write a pipeline of class ``cls`` shaped as 1.x; ``options`` are those of its UNet."""
    encoder = tiny._scramble(CLIPTextModel(text_config(hidden_act="quick_gelu")), 3)
    parts = _parts(scratch)
    save(cls(unet=unet(**options), scheduler=scheduler, text_encoder=encoder, **parts), folder)


def sdxl(folder: Path, scratch: Path) -> None:
    """Write a pipeline shaped as Stable Diffusion XL's base."""
    first = CLIPTextModel(text_config(hidden_act="quick_gelu"))
    parts = {
        "text_encoder": tiny._scramble(first, 3),
        "tokenizer": tiny.tokenizer(scratch / "1"),
        **_xl_parts(scratch),
    }
    save(StableDiffusionXLPipeline(unet=_xl_unet(40, 6), **parts), folder)


def refiner(folder: Path, scratch: Path) -> None:
    """Write a pipeline shaped as Stable Diffusion XL's refiner: one encoder, five numbers."""
    parts = {"text_encoder": None, "tokenizer": None, **_xl_parts(scratch)}
    unet = _xl_unet(16, 5)
    save(
        StableDiffusionXLImg2ImgPipeline(unet=unet, requires_aesthetics_score=True, **parts),
        folder,
    )


def sd3(folder: Path, scratch: Path, *, third: bool = True, **options: Any) -> None:
    """Write a pipeline shaped as Stable Diffusion 3.5; ``options`` are its transformer's."""
    given: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 28,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    transformer = SD3Transformer2DModel(**(given | options))
    first = text_config(hidden_act="quick_gelu", projection_dim=12)
    second = text_config(hidden_act="gelu", hidden_size=16, num_attention_heads=2)
    second.num_hidden_layers, second.projection_dim = 3, 16
    save(
        StableDiffusion3Pipeline(
            transformer=tiny._scramble(transformer, 1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny.vae(latent_channels=16, use_quant_conv=False, shift_factor=0.06),
            text_encoder=tiny._scramble(CLIPTextModelWithProjection(first), 3),
            tokenizer=tiny.tokenizer(scratch / "1"),
            text_encoder_2=tiny._scramble(CLIPTextModelWithProjection(second), 4),
            tokenizer_2=tiny.tokenizer(scratch / "2"),
            text_encoder_3=tiny._scramble(T5EncoderModel(t5_config()), 5) if third else None,
            tokenizer_3=t5_tokenizer() if third else None,
        ),
        folder,
    )


def t5_config() -> T5Config:
    """The configuration of a small T5 with the parts that v1.1's XXL has."""
    return T5Config(
        vocab_size=64,
        d_model=48,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of single letters, with T5's own special tokens."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters += [(letter, -3.0) for letter in "abcdefghijklmnopq"]
    return T5TokenizerFast(vocab=letters, extra_ids=0)


def _xl_parts(scratch: Path) -> dict[str, Any]:
    second = text_config(hidden_act="gelu", hidden_size=16, num_attention_heads=2)
    second.num_hidden_layers, second.projection_dim = 3, 16
    return {
        "vae": tiny.vae(),
        "text_encoder_2": tiny._scramble(CLIPTextModelWithProjection(second), 4),
        "tokenizer_2": tiny.tokenizer(scratch / "2"),
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        "add_watermarker": False,
    }


def _xl_unet(states: int, numbers: int) -> UNet2DConditionModel:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=states,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 8 * numbers,
    )


def _parts(scratch: Path) -> dict[str, Any]:
    return {
        "vae": tiny.vae(),
        "tokenizer": tiny.tokenizer(scratch),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def save(pipeline: Any, folder: Path) -> None:
    """``save_pretrained`` as safetensors, without what diffusers says about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder, safe_serialization=True)
