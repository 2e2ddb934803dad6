"""Writes a diffusers folder with the architecture of Stable Diffusion 1.5 and random weights.

No published weights are needed to measure time and memory. The weights are drawn by name from a
seed and streamed into safetensors one block at a time, so the 4 GB never lie in memory; they are
scaled like an initialisation, so that outputs stay finite. Random weights hide fp16 overflow and
make noise, not pictures.

    python benchmarks/make_checkpoint.py sd15 -o sd15-random
    python benchmarks/make_checkpoint.py sd15 -o sd15-random --dtype fp16 --component unet
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK = 4 << 20
"""Elements drawn at a time: 16 MiB of fp32."""

CONTEXT_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"sample_size": 512, "block_out_channels": [128, 256, 512, 512]},
        "text_encoder": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    # The same blocks at a size that tests can run.
    "tiny": {
        "unet": {
            "sample_size": 16,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "block_out_channels": [16, 32, 32, 32],
            "norm_num_groups": 8,
        },
        "vae": {
            "sample_size": 128,
            "block_out_channels": [8, 16, 16, 16],
            "norm_num_groups": 4,
        },
        "text_encoder": {
            "vocab_size": 514,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    },
}
COMPONENTS = ("text_encoder", "unet", "vae")
_CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "PNDMScheduler"),
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
}


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("-o", "--output", type=Path, help="the folder (default: ARCH-random)")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--component", action="append", choices=COMPONENTS, help="just these")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.output or Path(f"{args.architecture}-random")
    write_checkpoint(folder, args.architecture, args.dtype, args.component, args.seed)
    print(folder)


def write_checkpoint(
    folder: Path,
    architecture: str = "sd15",
    dtype: str = "fp32",
    components: list[str] | None = None,
    seed: int = 0,
) -> None:
    """Write the folder; the index, the tokenizer and the scheduler always come along."""
    sizes = ARCHITECTURES[architecture]
    folder.mkdir(parents=True, exist_ok=True)
    for component in components or COMPONENTS:
        config, shapes = _describe(component, sizes[component])
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        target = folder / component
        _write_json(target / "config.json", config)
        kind = np.dtype(np.float32 if dtype == "fp32" else np.float16)
        _write_safetensors(target / f"{stem}.safetensors", shapes, kind, seed)
    _write_tokenizer(folder / "tokenizer", sizes["text_encoder"]["vocab_size"])
    _write_scheduler(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    _write_json(folder / "model_index.json", {**index, **_CLASSES})


def _describe(
    component: str, sizes: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The configuration of a component and the shapes of its weights; allocates none of them."""
    import torch

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model = _BUILDERS[component](sizes)
    names = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if component == "text_encoder":
        # transformers 5 dropped the prefix that the published files have; it reads both.
        names = {f"text_model.{n.removeprefix('text_model.')}": s for n, s in names.items()}
        config = model.config.to_dict() | {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    else:
        config = json.loads(model.to_json_string())
    return config, names


def _unet(sizes: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**sizes)


def _vae(sizes: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
        force_upcast=False,
        **sizes,
    )


def _text_encoder(sizes: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    last = sizes["vocab_size"] - 1
    tokens = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    config = CLIPTextConfig(
        max_position_embeddings=CONTEXT_LENGTH, hidden_act="quick_gelu", **tokens, **sizes
    )
    return CLIPTextModel(config)


_BUILDERS = {"text_encoder": _text_encoder, "unet": _unet, "vae": _vae}


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], seed: int
) -> None:
    """Stream weights into one file: 8 bytes of header length, a JSON header, then the data."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        kind = {2: "F16", 4: "F32"}[dtype.itemsize]
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            _write_tensor(file, name, shape, dtype, seed)
    os.replace(temporary, path)


def _write_tensor(
    file: BinaryIO, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int
) -> None:
    for block in _draw(name, shape, seed):
        file.write(block.astype(dtype, copy=False).data)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The values of one weight, as blocks of float32; every name has a stream of its own."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    random = np.random.default_rng(key)
    centre, half = _range(name, shape)
    for start in range(0, math.prod(shape), BLOCK):
        block = random.random(min(BLOCK, math.prod(shape) - start), dtype=np.float32)
        block *= 2 * half
        block += centre - half
        yield block


def _range(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and half width of a weight's values: like torch's own, norms near the identity."""
    if "embedding" in name and len(shape) == 2 and "time_embedding" not in name:
        return 0.0, 0.035
    if len(shape) >= 2:
        return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
    return (1.0, 0.05) if name.endswith("weight") else (0.0, 0.02)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A vocabulary of single bytes, and of fillers up to the size that the text encoder has."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [256 + index for index in range(256 - len(printable))]
    letters = [chr(code) for code in (*printable, *spare)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"<|unused{index}|>" for index in range(vocabulary - len(tokens) - 2)]
    table = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    _write_json(folder / "vocab.json", table)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": CONTEXT_LENGTH, "tokenizer_class": "CLIPTokenizer"},
    )


def _write_scheduler(folder: Path) -> None:
    config = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    _write_json(folder / "scheduler_config.json", config)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
