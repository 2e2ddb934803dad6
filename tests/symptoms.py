"""Small models, each with one trouble that docs/troubleshooting.md is about."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnx_ir as ir
import torch
from diffusers.models.attention_processor import AttnProcessor
from onnx import TensorProto, helper

from examples.digits import single_file
from sdopt import api, modelfile
from sdopt.bundle import Bundle
from tests.exporters import made
from tests.exporters.test_single_file import rewrite
from tests.passes import adopted

PIPELINES = {
    "sd15": ("sd1", ("text_encoder", "unet", "vae_decoder")),
    "sd35": ("sd35", ("transformer",)),
}
"""The pipelines of the page: which of ``tests.exporters.made``, and what is exported of it."""
LATENT = 16
"""Sides of the latent that the foreign graphs are traced at, which halve evenly."""
WIDE = (16384, 40960)
"""The shape of a weight of 2.7 GB in float32."""


def make(folder: Path) -> None:
    """Put every model of the page into a folder: empty, or with some of the pipelines there."""
    for name, (family, components) in PIPELINES.items():
        if (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory() as scratch, adopted.quiet():
            made.MODELS[family][1](folder / name, Path(scratch) / "tokenizers")
        api.export(folder / name, folder / f"{name}-bundle", components=components)
    old_vae_decoder(folder)
    unet_of_one_size(folder)
    unet_fused_too_early(folder)
    one_file_above_2_gb(folder)
    wide(folder)
    checkpoint_without_text_encoder(folder)
    weights_with_nan(folder)
    shutil.copytree(folder / "sd15-bundle", folder / "tuned")
    attention = "decoder.mid_block.attentions.0"
    overflow(
        Bundle.open(folder / "tuned"),
        "vae_decoder",
        {f"{attention}.to_q.weight": 1e3, f"{attention}.to_k.weight": 1e3},
    )
    overflow(
        Bundle.open(folder / "sd35-bundle"),
        "transformer",
        {"transformer_blocks.2.ff.net.2.weight": 1e5},
    )


def old_vae_decoder(folder: Path) -> None:
    """A VAE's decoder of opset 11, where a group norm is an InstanceNormalization."""
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "sd15/vae").eval()
    vae.set_attn_processor(AttnProcessor())
    example = (torch.zeros(1, 4, 8, 8),)
    data = adopted.jit(adopted.Decoder(vae), example, ["latent_sample"], "sample", opset=11)
    (folder / "vae_decoder.onnx").write_bytes(data)


def _unet(folder: Path) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "sd15/unet").eval()


def _traced(unet: diffusers.UNet2DConditionModel) -> bytes:
    """The UNet as torch's older exporter writes it at one size, its axes called dynamic."""
    generator = torch.Generator().manual_seed(0)
    sides = (1, 4, LATENT, LATENT)
    arguments = (
        torch.randn(sides, generator=generator),
        torch.tensor(5.0),
        torch.randn((1, 7, unet.config.cross_attention_dim), generator=generator),
    )
    return adopted.jit(adopted.Positional(unet), arguments, adopted.INPUTS, "out_sample")


def unet_of_one_size(folder: Path) -> None:
    """A UNet that was traced where every halving is even."""
    (folder / "unet.onnx").write_bytes(_traced(_unet(folder)))


class FusedTooEarly:
    """An attention processor whose q, k and v are one tensor, made when the module is.

    The tensor is neither a parameter nor a buffer, so loading a checkpoint passes it by.
    """

    def __init__(self, attention: Any) -> None:
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_w = torch.cat([one.weight for one in parts]).detach().T.contiguous()

    def __call__(self, attention: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Self-attention of ``[B, S, E]``."""
        batch, length, _ = hidden_states.shape
        split = [
            one.view(batch, length, attention.heads, -1).transpose(1, 2)
            for one in torch.matmul(hidden_states, self.qkv_w).chunk(3, dim=-1)
        ]
        found = torch.nn.functional.scaled_dot_product_attention(*split)
        return attention.to_out[0](found.transpose(1, 2).flatten(2))


def unet_fused_too_early(folder: Path) -> None:
    """The same UNet with q, k and v fused before its checkpoint was loaded."""
    trained = _unet(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = diffusers.UNet2DConditionModel.from_config(trained.config).eval()
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(FusedTooEarly(module))
    unet.load_state_dict(trained.state_dict())
    (folder / "unet-fused.onnx").write_bytes(_traced(unet.requires_grad_(False)))


def _linear(weight: TensorProto) -> onnx.ModelProto:
    """``y = Identity(x) @ weight``, of a version that is newer than most runtimes."""
    rows, columns = WIDE
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["x"], ["same"], "same"),
            helper.make_node("MatMul", ["same", "weight"], ["y"], "project"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=14)


def one_file_above_2_gb(folder: Path) -> None:
    """What a tool leaves that writes a graph and 2.7 GB of weights into one file: holes here."""
    path = folder / "one-file.onnx"
    path.write_bytes(b"\x08\x0e")  # ir_version: 14
    with open(path, "r+b") as file:
        file.truncate(4 * WIDE[0] * WIDE[1])


def wide(folder: Path) -> None:
    """The same weights beside the graph, which says a version that is too new; holes too."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=WIDE)
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="wide.onnx_data")
    (folder / "wide.onnx").write_bytes(_linear(weight).SerializeToString())
    with open(folder / "wide.onnx_data", "wb") as file:
        file.truncate(4 * WIDE[0] * WIDE[1])


def checkpoint_without_text_encoder(folder: Path) -> None:
    """A single file with the original names that holds the UNet and the VAE."""

    def drop(state: dict[str, torch.Tensor]) -> None:
        for name in [one for one in state if one.startswith("cond_stage_model.")]:
            del state[name]

    whole = folder / "whole.safetensors"
    single_file.write(folder / "sd15", whole)
    rewrite(whole, folder / "checkpoint.safetensors", drop)
    whole.unlink()


def weights_with_nan(folder: Path) -> None:
    """A decoder one of whose weights was broken on its way here."""
    model = modelfile.load(folder / "sd15-bundle/vae_decoder/model.onnx")
    value = model.graph.initializers["decoder.conv_in.weight"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array.flat[:3] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    target = folder / "broken" / "vae_decoder.onnx"
    target.parent.mkdir()
    modelfile.save(model, target)


def overflow(bundle: Bundle, component: str, factors: Mapping[str, float]) -> None:
    """Let a raw stage be one whose named weights are so many times larger, and still finite."""
    raw = bundle.stage(component, "model")
    model = raw.load()
    for name, factor in factors.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        grown = value.const_value.numpy() * np.float32(factor)
        assert np.abs(grown).max() < 65504, "the weight itself must fit"
        value.const_value = ir.tensor(grown, name=name)
    with bundle.lock():
        bundle.commit(model, raw.record)
