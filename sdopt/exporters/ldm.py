"""Configurations out of a checkpoint in the names of latent-diffusion: from names and shapes.

What shapes do not say comes from the family (``published.py``) or from the file's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdopt.errors import SourceError
from sdopt.exporters.published import PUBLISHED, Published

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
TEXTS = {
    "cond_stage_model.transformer.": ("sd1", "text_encoder"),
    "cond_stage_model.model.": ("sd2", "text_encoder"),
    "conditioner.embedders.0.transformer.": ("sdxl", "text_encoder"),
    "conditioner.embedders.1.model.": ("sdxl", "text_encoder_2"),
    "conditioner.embedders.0.model.": ("sdxl_refiner", "text_encoder_2"),
}
"""Where the text encoders lie: prefix to family and component. ``model.`` is OpenCLIP's."""

TIME_COND = "time_embed.cond_proj.weight"
"""A latent consistency model's projection of the scale of guidance."""


def inside(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The entries below ``prefix``, without it."""
    return {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}


def size(shapes: Shapes, name: str, axis: int) -> int:
    """The size of one axis of a tensor.

    Raises:
        SourceError: the file lacks the tensor, or it has fewer axes.
    """
    shape = shapes.get(name)
    if shape is None or len(shape) <= axis:
        raise SourceError(
            "this file lacks a part of what its other names promise",
            where=name,
            why="there is no such tensor" if shape is None else f"its shape is {list(shape)}",
            hint="download the file again, or give the model's diffusers folder",
        )
    return shape[axis]


def family_of(shapes: Shapes, hints: Mapping[str, Any]) -> str:
    """``sd1``, ``sd2``, ``sdxl`` or ``sdxl_refiner``: by the UNet alone, as encoders may lack."""
    unet = inside(shapes, UNET)
    if "label_emb.0.0.weight" in unet:
        numbers = 5 * hints.get("addition_time_embed_dim", 256)
        alone = size(unet, "label_emb.0.0.weight", 1) - numbers == _context(unet)
        return "sdxl_refiner" if alone else "sdxl"
    openclip = bool(inside(shapes, "cond_stage_model.model."))
    return "sd2" if openclip or _linear(unet) else "sd1"


def unet_config(
    shapes: Shapes, family: str, hints: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The configuration of UNet2DConditionModel; ``hints`` replace what is found.

    Raises:
        SourceError: the names are not of such a network.
    """
    unet, known = inside(shapes, UNET), PUBLISHED[family]
    levels = _levels(unet, where)
    widths = [width for width, _ in levels]
    middle = _depth(unet, "middle_block.1.")
    # A level without attention says nothing of its depth; the last one's is also the middle's.
    depths: list[int] = [
        max(found) or (middle if i == len(levels) - 1 else 1)
        for i, (_, found) in enumerate(levels)
    ]
    crossed = [any(found) for _, found in levels]
    used = {depth for depth, is_crossed in zip(depths, crossed, strict=True) if is_crossed}
    down = [f"{'CrossAttnDown' if one else 'Down'}Block2D" for one in crossed]
    up = [f"{'CrossAttnUp' if one else 'Up'}Block2D" for one in reversed(crossed)]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": size(unet, "input_blocks.0.0.weight", 1),
        "out_channels": size(unet, "out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0][1]),
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": depths if len({*used, middle}) > 1 else middle,
        "cross_attention_dim": _context(unet),
        "use_linear_projection": _linear(unet),
        "attention_head_dim": (
            [width // known.head_width for width in widths] if known.head_width else 8
        ),
        **known.unet,
    }
    if "label_emb.0.0.weight" in unet:
        config["projection_class_embeddings_input_dim"] = size(unet, "label_emb.0.0.weight", 1)
    if TIME_COND in unet:
        config["time_cond_proj_dim"] = size(unet, TIME_COND, 1)
    return {**config, **hints}


def vae_config(shapes: Shapes, known: Published, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of AutoencoderKL out of names without their prefix."""
    blocks = _numbers(shapes, r"encoder\.down\.(\d+)\.block\.")
    layers = _numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [size(shapes, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(blocks)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": size(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        **known.vae,
        **hints,
    }


def text_config(
    shapes: Shapes, component: str, known: Published, hints: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of a CLIP text encoder out of names without their prefix.

    Stable Diffusion 2 takes the states before OpenCLIP's last layer: where the file holds the
    whole tower, with its projection, the last layer is left out.
    """
    second = component == "text_encoder_2"
    if "positional_embedding" in shapes:
        layers = _numbers(shapes, r"transformer\.resblocks\.(\d+)\.")
        names = ("token_embedding.weight", "positional_embedding")
        inner = size(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0)
        projected = size({"text_projection": (0, 512), **shapes}, "text_projection", 1)
        layers -= "text_projection" in shapes and not second
    else:
        root = "text_model." if any(n.startswith("text_model.") for n in shapes) else ""
        layers = _numbers(shapes, rf"{re.escape(root)}encoder\.layers\.(\d+)\.")
        start = f"{root}embeddings."
        names = (f"{start}token_embedding.weight", f"{start}position_embedding.weight")
        inner = size(shapes, f"{root}encoder.layers.0.mlp.fc1.weight", 0)
        projected = size(shapes, names[0], 1)
    vocabulary, width = (size(shapes, names[0], axis) for axis in (0, 1))
    return {
        "architectures": ["CLIPTextModelWithProjection" if second else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if second else known.act,
        "hidden_size": width,
        "intermediate_size": inner,
        "max_position_embeddings": size(shapes, names[1], 0),
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "projection_dim": projected,
        "vocab_size": vocabulary,
        **known.text,
        **hints,
    }


def _levels(unet: Shapes, where: str) -> list[tuple[int, list[int]]]:
    """Each level's width and the depths of the transformers after its residual blocks."""
    levels: list[tuple[int, list[int]]] = [(0, [])]
    for index in range(1, _numbers(unet, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{index}.0.op.weight" in unet:
            levels.append((0, []))
            continue
        name = f"input_blocks.{index}.0.in_layers.2.weight"
        if name not in unet:
            levels = []
            break
        depths = [*levels[-1][1], _depth(unet, f"input_blocks.{index}.1.")]
        levels[-1] = (size(unet, name, 0), depths)
    first, last = "input_blocks.0.0.weight", "out.2.weight"
    if not levels or not levels[-1][1] or first not in unet or last not in unet:
        raise SourceError(
            "the denoiser in this file is not Stable Diffusion's UNet",
            where=where,
            why=f"{UNET}* are other names, such as {next(iter(unet))}",
            hint="give the model's diffusers folder",
        )
    return levels


def _depth(unet: Shapes, prefix: str) -> int:
    """How many transformer blocks follow each other below ``prefix``; 0 without attention."""
    return _numbers(unet, rf"{re.escape(prefix)}transformer_blocks\.(\d+)\.")


def _numbers(shapes: Shapes, pattern: str) -> int:
    """How many layers a name counts: one more than the highest number."""
    found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    count = max(found, default=-1) + 1
    if len(found) < count:
        raise SourceError(
            "the numbers of this file's layers have a gap",
            where=next(iter(shapes)),
            why=f"{len(found)} of {count} layers are there",
            hint="download the file again, or give the model's diffusers folder",
        )
    return count


def _context(unet: Shapes) -> int | None:
    """The width of the states that cross-attention reads."""
    ends = ".transformer_blocks.0.attn2.to_k.weight"
    return next((size(unet, name, 1) for name in unet if name.endswith(ends)), None)


def _linear(unet: Shapes) -> bool:
    """Whether a linear layer leads into each transformer, as from 2.x on, not a 1x1 kernel."""
    return any(len(shape) == 2 for name, shape in unet.items() if name.endswith(".proj_in.weight"))
