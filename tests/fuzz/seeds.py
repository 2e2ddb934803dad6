"""Valid files of every kind, small and made by code: what mutations start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

from sdopt import api
from sdopt.bundle import RAW, Bundle
from sdopt.manifest import ComponentEntry, StageRecord
from tests.adversarial import TRAPS
from tests.fuzz.mutations import packed
from tests.passes.denoiser import denoiser

DATA_FILE = "weights.bin"
DATA = bytes(range(256)) * 16
"""The external data beside every fuzzed graph."""

_LONG = ("a_chain_of_ten_thousand", "a_chain_of_casts_and_scales_before_a_softmax")


@cache
def graphs() -> tuple[bytes, ...]:
    """ONNX files: the traps, a denoiser, and both with a weight outside the file."""
    models = [make().model for name, make in TRAPS.builders.items() if name not in _LONG]
    models += [ir.to_proto(denoiser()), _external(ir.to_proto(denoiser()))]
    small = [one for one in models if one.ByteSize() < 32_000]
    return tuple(one.SerializeToString(deterministic=True) for one in small)


def _external(model: onnx.ModelProto) -> onnx.ModelProto:
    offset = 0
    for tensor in model.graph.initializer:
        count = len(tensor.raw_data)
        if tensor.data_type == TensorProto.FLOAT and count and offset + count <= len(DATA):
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA_FILE), ("offset", offset), ("length", count)):
                tensor.external_data.add(key=key, value=str(value))
            offset += count
    return model


def bundle(root: Path) -> Bundle:
    """The small denoiser with companions as the optimized stage."""
    made = Bundle.create(root, "toy", "sd1", {"unet": ComponentEntry("unet", "denoiser")}, "0")
    record = StageRecord("unet", "denoiser", RAW, "", "f" * 8, "toy", "sd1", "float32", "k")
    with made.lock():
        made.commit(denoiser(), record)
        made.write_manifest()
    (root / "unet" / "config.json").write_text(json.dumps(UNET))
    api.optimize(root, "clean,hoist,deep_cache=3")
    return made


UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}


def tensors(shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> bytes:
    """A safetensors file of zeros of those names and shapes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    return packed(
        {**table, **{n: {"dtype": "F32", "shape": list(shape)} for n, shape in shapes.items()}}
    )


@cache
def adapters() -> tuple[bytes, ...]:
    """LoRA files in every spelling for the denoiser's matrices ``w_q [8, 8]``, ``k_in``."""
    factors = {"down": (2, 8), "up": (8, 2)}
    kohya = {f"lora_unet_w_q.lora_{part}.weight": shape for part, shape in factors.items()}
    mid = {
        "lora_unet_k_in.lora_down.weight": (2, 4, 1, 1),
        "lora_unet_k_in.lora_mid.weight": (2, 2, 3, 3),
        "lora_unet_k_in.lora_up.weight": (8, 2, 1, 1),
    }
    peft = {"unet.w_q.lora_A.weight": (2, 8), "unet.w_q.lora_B.weight": (8, 2)}
    settings = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"w_.": 2}, "unet.use_rslora": True}
    old = {f"mid.attn1.processor.to_q_lora.{part}.weight": s for part, s in factors.items()}
    return (
        tensors({**kohya, "lora_unet_w_q.alpha": ()}),
        tensors(mid),
        tensors(peft, lora_adapter_metadata=json.dumps(settings)),
        tensors({**kohya, **old}),
    )


@cache
def checkpoints() -> tuple[bytes, ...]:
    """Single files with latent-diffusion's names, of 1.x and XL, whose shapes are tiny."""
    unet = {
        "input_blocks.0.0.weight": (8, 4, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 16),
        "input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 16),
        "out.2.weight": (4, 8, 3, 3),
    }
    vae = {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
        "decoder.conv_in.weight": (8, 4, 3, 3),
        "decoder.conv_out.weight": (3, 8, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
    }
    text = {
        "embeddings.token_embedding.weight": (50, 16),
        "embeddings.position_embedding.weight": (77, 16),
        "encoder.layers.0.mlp.fc1.weight": (32, 16),
    }
    openclip = {
        "token_embedding.weight": (50, 16),
        "positional_embedding": (77, 16),
        "transformer.resblocks.0.mlp.c_fc.weight": (32, 16),
        "text_projection": (16, 16),
    }
    hints = {"configs": {"unet": {"attention_head_dim": 2}}, "files": {"scheduler/scheduler_config.json": '{"_class_name": "DDIMScheduler"}', "tokenizer/vocab.json": "{}"}}  # fmt: skip
    one = _prefixed("model.diffusion_model.", unet)
    one |= _prefixed("first_stage_model.", vae)
    own = _prefixed("cond_stage_model.transformer.text_model.", text)
    two = {"model.diffusion_model.label_emb.0.0.weight": (8, 1288)}
    pair = _prefixed("conditioner.embedders.0.transformer.text_model.", text)
    pair |= _prefixed("conditioner.embedders.1.model.", openclip)
    return (
        tensors(one | own, sdopt=json.dumps(hints)),
        tensors(one | _prefixed("cond_stage_model.model.", openclip)),
        tensors(one | two | pair, **{"modelspec.prediction_type": "v"}),
        tensors({"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}),
    )


def _prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}
