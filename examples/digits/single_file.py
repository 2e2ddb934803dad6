"""Write a Stable Diffusion pipeline's folder as one file with the names of the original code.

    python examples/digits/single_file.py -o digits.safetensors
    sdopt export digits.safetensors -o bundle

Beside the weights the file carries, in its metadata, what a shape does not say (heads, groups,
scales, the schedule) and the tokenizer, so that nothing else is needed to use it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
METADATA = "sdopt"
"""The key under which `sdopt export` looks for configurations and files."""

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(name: str, config: dict[str, Any]) -> str:
    """The original name of a parameter of `UNet2DConditionModel`."""
    layers = config["layers_per_block"] + 1
    module, _, leaf = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{leaf}"
    if match := re.match(r"mid_block\.(\w+\.\d)\.(.*)", name):
        return f"middle_block.{_MIDDLE[match[1]]}.{_inner(match[2])}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        raise KeyError(name)
    way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * layers}.0.op.{leaf}"
    if kind == "upsamplers":
        crossed = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{level * layers + layers - 1}.{1 + crossed}.conv.{leaf}"
    place = level * layers + index + (way == "down")
    block = "input_blocks" if way == "down" else "output_blocks"
    return f"{block}.{place}.{int(kind == 'attentions')}.{_inner(rest)}"


def _inner(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return f"{_RESNET.get(head, head)}{dot}{tail}"


def vae_name(name: str, config: dict[str, Any]) -> str:
    """The original name of a parameter of `AutoencoderKL`."""
    last = len(config["block_out_channels"]) - 1
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(\w+)", name):
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    name = name.replace(".resnets.", ".block.")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", name)


def openclip(state: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """A CLIP text encoder's parameters as OpenCLIP lays them out: q, k and v in one tensor."""
    layers: dict[str, Tensors] = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif name == "text_projection.weight":
            yield "text_projection", tensor.T.contiguous()
        elif name.startswith("final_layer_norm"):
            yield name.replace("final_layer_norm", "ln_final"), tensor
        elif name == "embeddings.position_embedding.weight":
            yield "positional_embedding", tensor
        else:
            yield name.removeprefix("embeddings."), tensor
    for index, layer in layers.items():
        root = f"transformer.resblocks.{index}"
        for kind in ("weight", "bias"):
            parts = [layer[f"self_attn.{one}_proj.{kind}"] for one in "qkv"]
            yield f"{root}.attn.in_proj_{kind}", torch.cat(parts)
        for old, new in _OPENCLIP.items():
            for kind in ("weight", "bias"):
                yield f"{root}.{new}.{kind}", layer[f"{old}.{kind}"]


def original(weights: dict[str, Tensors], configs: dict[str, dict[str, Any]]) -> Tensors:
    """Every weight of a pipeline under its original name; both are given by folder."""
    state: Tensors = {}
    for name, tensor in weights.get("unet", {}).items():
        state[f"model.diffusion_model.{unet_name(name, configs['unet'])}"] = tensor
    for name, tensor in weights.get("vae", {}).items():
        place = vae_name(name, configs["vae"])
        kernel = "attn_1" in place and tensor.dim() == 2  # 1x1 in the original
        state[f"first_stage_model.{place}"] = tensor[:, :, None, None] if kernel else tensor
    pair = "text_encoder_2" in weights
    for part in ("text_encoder", "text_encoder_2"):
        if part in weights:
            number = int(part == "text_encoder_2" and "text_encoder" in weights)
            root = f"conditioner.embedders.{number}" if pair else "cond_stage_model"
            if part == "text_encoder_2" or configs[part]["hidden_act"] == "gelu":
                state |= {f"{root}.model.{n}": t for n, t in openclip(weights[part])}
            else:
                root = f"{root}.transformer.text_model."
                names = {n: n.removeprefix("text_model.") for n in weights[part]}
                state |= {root + names[n]: t for n, t in weights[part].items()}
    return state


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def metadata(folder: Path) -> dict[str, Any]:
    """What the shapes do not say, by folder, and the texts of tokenizers and schedule."""
    configs = {
        part: {key: value for key, value in config.items() if not key.startswith("_")}
        for part, config in _configs(folder).items()
    }
    files = {
        f"{part}/{path.name}": path.read_text(encoding="utf-8")
        for part in ("scheduler", "tokenizer", "tokenizer_2")
        for path in sorted((folder / part).glob("*"))
    }
    return {"configs": configs, "files": files}


def write(folder: Path, path: Path, **changes: Any) -> None:
    """Write a pipeline's folder as one file; `changes` replace parts of its metadata."""
    known = json.dumps({**metadata(folder), **changes}, ensure_ascii=False)
    configs = _configs(folder)
    weights = {part: _load(folder / part) for part in configs}
    state = {name: tensor.contiguous() for name, tensor in original(weights, configs).items()}
    save_file(state, path, metadata={"format": "pt", METADATA: known})


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        part: _read(folder / part / "config.json")
        for part in PARTS
        if (folder / part / "config.json").is_file()
    }


def _read(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _load(folder: Path) -> Tensors:
    (path,) = folder.glob("*.safetensors")
    state: Tensors = load_file(path)
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    parser.add_argument("-o", "--output", type=Path, default=Path("digits.safetensors"))
    given = parser.parse_args()
    write(given.folder, given.output)
    print(given.output)
