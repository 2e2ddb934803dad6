"""The untrained parts of the digits pipeline: tokenizer, networks and scheduler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# isort: split
from digits import captions

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
CONTEXT = 96


def _byte_letters() -> list[str]:
    """Return the letters that stand for the 256 bytes, in the order CLIP lists them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(plain)
    return [chr(code) for code in [*plain, *range(256, 256 + others)]]


def _learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word of ``texts`` is one token."""
    counts = Counter(word for text in texts for word in text.split())
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def write_vocabulary(folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` in CLIP's format, learnt from the captions."""
    letters = _byte_letters()
    merges = _learn_merges([text for digit in range(10) for text in captions(digit)])
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of the captions' vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a small, untrained CLIP text model for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CONTEXT,
            intermediate_size=4 * CONTEXT,
            projection_dim=CONTEXT,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained U-Net with the blocks of Stable Diffusion 1.x, about 1/10 as wide."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        attention_head_dim=4,  # SD 1.x semantics: the number of heads
        cross_attention_dim=CONTEXT,
        norm_num_groups=16,
    )


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder with 4 latent channels at 1/8 of the resolution."""
    return AutoencoderKL(
        sample_size=128,
        block_out_channels=(16, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        force_upcast=False,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return the sampler: DPM-Solver++ (2M) on the noise schedule of Stable Diffusion 1.x.

    It takes no notice of the last three settings; they are for DDIM and PNDM in its place.
    """
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    return DPMSolverMultistepScheduler.from_config(settings)


def _edit_json(path: Path, **changes: str | None) -> None:
    """Set keys of a JSON file, or drop those whose new value is None."""
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    settings = {key: value for key, value in settings.items() if changes.get(key, "") is not None}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_pipeline(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> None:
    """Save the parts, halved in precision, as a complete pipeline folder."""
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=build_tokenizer(),
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # transformers 5 writes tokenizer.json alone; other readers want the vocabulary beside it.
    write_vocabulary(folder / "tokenizer")
    _edit_json(folder / "tokenizer/tokenizer_config.json", is_local=None, local_files_only=None)
    # transformers 4 knows the weights by these names, as real SD 1.x has them.
    path = folder / "text_encoder/model.safetensors"
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    # Without this, transformers 5 would load this part alone in half precision by default.
    _edit_json(folder / "text_encoder/config.json", dtype="float32")
