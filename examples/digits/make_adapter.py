"""Make ``next.safetensors``: an adapter with which the digits model draws the next digit.

Run it as ``python examples/digits/make_adapter.py -o FILE``; it takes seconds, since nothing is
trained. Asked for a seven the model then draws an eight, and a zero for a nine.

Keys and values of every cross-attention are ``W c`` of a context ``c``. Wanted is ``W c'``, with
``c'`` the context of the same caption about the next digit, and ``W c`` for an empty caption. The
least-squares solution over all captions is ``W (1 + M)`` with one ``M`` for all layers, and so a
LoRA: with the singular values ``M = U S V`` its factors are ``W U S`` and ``V``. This is the
closed form of "Unified Concept Editing in Diffusion Models" (Gandikota et al., WACV 2024).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

# isort: split
from components import LENGTH
from digits import captions

EMPTY_WEIGHT = 20.0
"""How much more an empty caption counts than one about a digit."""


@torch.no_grad()
def contexts(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """What the text encoder makes of each text, ``[texts, 77, 96]`` in double precision."""
    ids = pipeline.tokenizer(
        texts, padding="max_length", max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return pipeline.text_encoder(ids)[0].double()


def solve(pipeline: StableDiffusionPipeline, ridge: float) -> Tensor:
    """``M`` ``[96, 96]``, of which ``M c`` is what is missing from the next digit's context."""
    texts = [captions(digit) for digit in range(10)]
    found = torch.stack([contexts(pipeline, some) for some in texts])
    empty = contexts(pipeline, [""]) * EMPTY_WEIGHT**0.5
    given = torch.cat([found.flatten(0, 2), empty.flatten(0, 1)])
    missing = (found.roll(-1, 0) - found).flatten(0, 2)
    moment = given.T @ given
    moment += ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(moment, found.flatten(0, 2).T @ missing).T


def main() -> None:
    """Solve, and write the factors of every layer in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ridge", type=float, default=1e-2)
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(Path(__file__).parent).to(torch.float32)
    left, sizes, right = torch.linalg.svd(solve(pipeline, args.ridge))
    state: dict[str, Tensor] = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            up = module.weight.double() @ (left * sizes)[:, : args.rank]
            state[f"unet.{name}.lora_A.weight"] = right[: args.rank].half().contiguous()
            state[f"unet.{name}.lora_B.weight"] = up.detach().half().contiguous()
    save_file(state, args.output, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
