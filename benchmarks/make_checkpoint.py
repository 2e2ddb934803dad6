"""Writes a diffusers folder with a published architecture and random weights.

No published weights are needed to measure time and memory. The weights are drawn by name from a
seed and streamed into safetensors one block at a time, so they never lie in memory; they are
scaled like an initialisation, so that outputs stay finite. Random weights hide fp16 overflow and
make noise, not pictures. ``--sparse`` writes none at all: files of the full size that take no
space, all zero, for what only depends on sizes. Files of more than 10 GB are split into shards,
as diffusers and transformers do.

    python benchmarks/make_checkpoint.py sd15 -o sd15-random
    python benchmarks/make_checkpoint.py sd15 -o sd15-random --dtype fp16 --component unet
    python benchmarks/make_checkpoint.py sd35-large --dtype fp16 --sparse
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script

from benchmarks.architectures import ARCHITECTURES, END, Part

BLOCK = 4 << 20
"""Elements drawn at a time: 16 MiB of fp32."""
SHARD_BYTES = 10_000_000_000
"""The size at which diffusers and transformers begin another file."""

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
BEGIN = "<|startoftext|>"
Shapes = Mapping[str, tuple[int, ...]]


def main() -> None:
    """Read the command line and write the folder."""
    parts = sorted({name for one in ARCHITECTURES.values() for name in one.parts})
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("-o", "--output", type=Path, help="the folder (default: ARCH-random)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--component", action="append", choices=parts, help="just these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="zeros that take no space")
    args = parser.parse_args()
    folder = args.output or Path(f"{args.architecture}-random")
    write_checkpoint(
        folder, args.architecture, args.dtype, args.component, args.seed, sparse=args.sparse
    )
    print(folder)


def write_checkpoint(
    folder: Path,
    architecture: str = "sd15",
    dtype: str = "fp32",
    components: list[str] | None = None,
    seed: int = 0,
    *,
    sparse: bool = False,
) -> None:
    """Write the folder; the index, the tokenizers and the scheduler always come along."""
    made = ARCHITECTURES[architecture]
    folder.mkdir(parents=True, exist_ok=True)
    for name in components or made.parts:
        part = made.parts[name]
        config, shapes = _describe(part)
        _write_json(folder / name / "config.json", config)
        stem = "model" if part.library == "transformers" else "diffusion_pytorch_model"
        _write_weights(folder / name, stem, shapes, DTYPES[dtype], None if sparse else seed)
    clip = next(part.config["vocab_size"] for part in made.parts.values() if _is_clip(part))
    for name, pad in made.tokenizers.items():
        if pad == "<pad>":
            _write_t5_tokenizer(folder / name)
        else:
            _write_clip_tokenizer(folder / name, clip, pad)
    _write_json(folder / "scheduler" / "scheduler_config.json", made.scheduler)
    _write_json(folder / "model_index.json", _index(architecture))


def _index(architecture: str) -> dict[str, Any]:
    made = ARCHITECTURES[architecture]
    tokenizers = {
        name: ("transformers", "T5TokenizerFast" if pad == "<pad>" else "CLIPTokenizer")
        for name, pad in made.tokenizers.items()
    }
    return {
        "_class_name": made.pipeline,
        **{name: (part.library, part.class_name) for name, part in made.parts.items()},
        **tokenizers,
        "scheduler": ("diffusers", made.scheduler["_class_name"]),
        **made.index,
    }


def _is_clip(part: Part) -> bool:
    return part.class_name.startswith("CLIP")


def _describe(part: Part) -> tuple[dict[str, Any], Shapes]:
    """The configuration of a component and the shapes of its weights; allocates none of them."""
    import diffusers
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        if part.library == "diffusers":
            model = getattr(diffusers, part.class_name)(**part.config)
            config = json.loads(model.to_json_string())
        else:
            cls = getattr(transformers, part.class_name)
            model = cls(cls.config_class(**part.config, **_tokens(part)))
            # As the published files say it, which have the dtype of their time.
            named = {"architectures": [part.class_name], "dtype": "float32"}
            config = model.config.to_dict() | named
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if _is_clip(part):
        # transformers 5 dropped the prefix that the published files have; it reads both.
        bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        shapes = {
            name if name.startswith("text_projection") else f"text_model.{name}": shape
            for name, shape in bare.items()
        }
    elif part.library == "transformers":
        shapes.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight, saved once
    return config, shapes


def _tokens(part: Part) -> dict[str, int]:
    """The ids of CLIP's begin and end, the last two of the vocabulary."""
    if not _is_clip(part):
        return {}
    last = part.config["vocab_size"] - 1
    return {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}


def _write_weights(
    folder: Path, stem: str, shapes: Shapes, dtype: np.dtype[Any], seed: int | None
) -> None:
    """One file, or shards and their index; without a seed they are holes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if size + bytes_ > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_
    if len(shards) == 1:
        _write_safetensors(folder / f"{stem}.safetensors", shapes, dtype, seed)
        return
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, shard, dtype, seed)
        places |= dict.fromkeys(shard, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index_file = folder / f"{stem}.safetensors.index.json"
    _write_json(index_file, {"metadata": {"total_size": total}, "weight_map": places})


def _write_safetensors(path: Path, shapes: Shapes, dtype: np.dtype[Any], seed: int | None) -> None:
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
        if seed is None:
            file.truncate(file.tell() + position)
        else:
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


def _write_clip_tokenizer(folder: Path, vocabulary: int, pad: str) -> None:
    """A vocabulary of single bytes, and of fillers up to the size that the text encoder has."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [256 + index for index in range(256 - len(printable))]
    letters = [chr(code) for code in (*printable, *spare)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"<|unused{index}|>" for index in range(vocabulary - len(tokens) - 2)]
    table = {token: index for index, token in enumerate([*tokens, BEGIN, END])}
    _write_json(folder / "vocab.json", table)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )


def _write_t5_tokenizer(folder: Path) -> None:
    """T5's vocabulary with single letters in the place of its pieces."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    pieces += [(f"<unused{index}>", -9.0) for index in range(32000 - len(pieces))]
    T5TokenizerFast(vocab=pieces, extra_ids=100).save_pretrained(folder)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
