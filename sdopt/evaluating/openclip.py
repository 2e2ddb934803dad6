"""OpenCLIP's files as transformers' CLIPModel, which needs neither open_clip nor torchvision.

OpenCLIP (https://github.com/mlfoundations/open_clip) writes ``open_clip_config.json`` beside one
file of weights. Both towers are CLIP's own under other names; q, k and v are one matrix there, and
projections stand the other way round.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.errors import UsageError
from sdopt.exporters.clip_vocabulary import clip_tokenizer

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, by OpenAI."""

_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_SKIPPED = {"attn_mask", "logit_bias"}
_EOS_IS_THE_HIGHEST = 2
"""transformers takes this id for: the end is the token of the highest number, as OpenCLIP does."""


@dataclass(frozen=True)
class Model:
    """A CLIP to score with: transformers' model and tokenizer, and preprocessor_config.json."""

    model: Any
    tokenizer: Any
    preprocessing: Mapping[str, Any]


def is_folder(folder: Path) -> bool:
    """Whether it holds OpenCLIP's configuration and weights."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def files(folder: Path) -> list[Path]:
    """What decides the model: its configuration, and the weights that ``load`` takes."""
    weights = next(path for path in map(folder.joinpath, WEIGHTS) if path.is_file())
    return [folder / CONFIG, weights]


def load(folder: Path) -> Model:
    """The model with its weights.

    Raises:
        UsageError: a model that is not CLIP's two transformers (a ResNet, another text encoder),
            or weights that do not fit the configuration.
    """
    from transformers import CLIPConfig, CLIPModel

    config, weights = files(folder)
    data = json.loads(config.read_text("utf-8"))
    model_config, preprocess = data["model_cfg"], data.get("preprocess_cfg", {})
    _check(model_config, preprocess, str(config))
    model = CLIPModel(CLIPConfig(**_configuration(model_config)))
    renamed = convert(_read(weights), str(weights))
    try:
        found = model.load_state_dict(renamed, strict=False)
    except RuntimeError as error:
        raise _unfit(weights, str(error)) from error
    missing = [name for name in found.missing_keys if not name.endswith("position_ids")]
    if missing or found.unexpected_keys:
        raise _unfit(weights, f"missing {missing[:3]}, not known {found.unexpected_keys[:3]}")
    more = {"image_mean": preprocess.get("mean", MEAN), "image_std": preprocess.get("std", STD)}
    return Model(model, _tokenizer(folder, model_config["text_cfg"]), more)


def convert(weights: Mapping[str, Any], where: str) -> dict[str, Any]:
    """OpenCLIP's tensors under transformers' names.

    Raises:
        UsageError: a tensor that CLIP does not have.
    """
    made: dict[str, Any] = {}
    for name, tensor in weights.items():
        if name in _SKIPPED:
            continue
        visual = name.startswith("visual.")
        tower, rest = (
            ("vision_model", name.removeprefix("visual.")) if visual else ("text_model", name)
        )
        if rest.startswith("transformer.resblocks."):
            _, _, number, part = rest.split(".", 3)
            for key, value in _block(part, tensor):
                made[f"{tower}.encoder.layers.{number}.{key}"] = value
        elif name == "logit_scale":
            made[name] = tensor
        elif rest in _PROJECTIONS:
            made[_PROJECTIONS[rest]] = tensor.T.contiguous()
        elif rest in _PLAIN:
            made[f"{tower}.{_PLAIN[rest][visual]}"] = tensor
        else:
            raise UsageError(
                f"CLIP has no weight {name}",
                where=where,
                why="of OpenCLIP's models, those of CLIP's own form are known",
                hint="give a CLIPModel of transformers, or --scorer FILE.py:FUNCTION",
            )
    return made


_PLAIN = {
    "token_embedding.weight": ("embeddings.token_embedding.weight", ""),
    "positional_embedding": (
        "embeddings.position_embedding.weight",
        "embeddings.position_embedding.weight",
    ),
    "ln_final.weight": ("final_layer_norm.weight", ""),
    "ln_final.bias": ("final_layer_norm.bias", ""),
    "class_embedding": ("", "embeddings.class_embedding"),
    "conv1.weight": ("", "embeddings.patch_embedding.weight"),
    "ln_pre.weight": ("", "pre_layrnorm.weight"),
    "ln_pre.bias": ("", "pre_layrnorm.bias"),
    "ln_post.weight": ("", "post_layernorm.weight"),
    "ln_post.bias": ("", "post_layernorm.bias"),
}
"""The text tower's name in transformers, and the image tower's."""

_PROJECTIONS = {"proj": "visual_projection.weight", "text_projection": "text_projection.weight"}

_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _block(part: str, tensor: Any) -> list[tuple[str, Any]]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        names = [f"self_attn.{one}_proj.{kind}" for one in "qkv"]
        return list(zip(names, tensor.chunk(3), strict=True))
    module, _, kind = part.rpartition(".")
    return [(f"{_IN_A_BLOCK.get(module, module)}.{kind}", tensor)]


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"

    def tower(one: Mapping[str, Any], heads: int) -> dict[str, Any]:
        return {
            "hidden_size": one["width"],
            "intermediate_size": int(one["width"] * one.get("mlp_ratio", 4.0)),
            "num_hidden_layers": one["layers"],
            "num_attention_heads": heads,
            "hidden_act": act,
            "projection_dim": config["embed_dim"],
        }

    return {
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **tower(vision, vision["width"] // vision.get("head_width", 64)),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **tower(text, text["heads"]),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": _EOS_IS_THE_HIGHEST,
        },
    }


def _check(config: Mapping[str, Any], preprocess: Mapping[str, Any], where: str) -> None:
    odd = sorted({*config} - _TOP)
    odd += sorted({*config["vision_cfg"]} - _VISION) + sorted({*config["text_cfg"]} - _TEXT)
    if not isinstance(config["vision_cfg"].get("layers"), int):
        odd.append("layers")
    usual = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}
    odd += [key for key, value in usual.items() if preprocess.get(key, value) != value]
    if odd:
        raise UsageError(
            "this OpenCLIP model is not of CLIP's own form",
            where=where,
            why=f"it is configured by {', '.join(odd)}",
            hint="give a CLIPModel of transformers, or --scorer FILE.py:FUNCTION",
        )


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    import torch

    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _tokenizer(folder: Path, text: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        for file in clip_tokenizer("tokenizer", pad_with_zero=True):
            path = Path(scratch) / file.path
            path.parent.mkdir(exist_ok=True)
            path.write_text(file.text or "", "utf-8")
        return CLIPTokenizer.from_pretrained(Path(scratch) / "tokenizer", local_files_only=True)


def _unfit(weights: Path, why: str) -> UsageError:
    return UsageError(f"the weights do not fit {CONFIG}", where=str(weights), why=why)
