"""A ControlNet in one safetensors file, with its own code's names or diffusers', as a component.

Such a file has no configuration. A ControlNet is the encoder of the UNet that it was trained
beside, so that UNet's configuration says all but how the hint is embedded, and shapes say that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import SourceError
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.safetensors_header import read_header

_OF_THE_UNET = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("use_linear_projection", "upcast_attention", "resnet_time_scale_shift"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
"""The options that ControlNetModel shares with its UNet (``ControlNetModel.from_unet``)."""

_HINT = "controlnet_cond_embedding."


def read(path: Path, unet: Mapping[str, Any]) -> tuple[dict[str, Any], Checkpoint]:
    """Configuration and weights of the ControlNet in a file, beside a UNet's configuration.

    Raises:
        SourceError: the file holds no ControlNet.
        WeightsError: it is corrupted or truncated.
    """
    from sdopt.exporters.ldm_weights import convert  # imports torch and diffusers

    entries, header = read_header(path)
    config = {name: unet[name] for name in _OF_THE_UNET if name in unet}
    config.setdefault("layers_per_block", 2)
    names = [name for name in entries if _HINT in name or "input_hint_block." in name]
    if not names:
        raise SourceError(
            "this file holds no ControlNet",
            where=str(path),
            why="it has no weights that embed a hint",
            hint="--controlnet takes a ControlNet's folder, or one with weights of "
            "control_model.* or controlnet_*",
        )
    checkpoint = convert(Checkpoint(entries, {path: header}), "controlnet", config)
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    widths = [shapes[f"{_HINT}conv_in.weight"][0]]
    while (name := f"{_HINT}blocks.{2 * len(widths) - 1}.weight") in shapes:
        widths.append(shapes[name][0])
    states = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(states) == 1:  # where it is not the UNet's, it was trained beside another
        config["cross_attention_dim"] = states.pop()
    config |= {
        "_class_name": "ControlNetModel",
        "conditioning_channels": shapes[f"{_HINT}conv_in.weight"][1],
        "conditioning_embedding_out_channels": widths,
    }
    return config, checkpoint
