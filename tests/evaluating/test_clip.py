"""CLIP scores equal what transformers and open_clip compute themselves, on tiny random models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sdopt import api
from sdopt.errors import UsageError
from sdopt.evaluating.clip import ClipScorer
from tests.runtime import toy

PROMPTS = ["a handwritten seven", "the digit 4", "number 2 " * 60]


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in sizes
    ]


IMAGES = images((24, 24), (64, 40), (33, 95))


def save_clip(folder: Path) -> CLIPModel:
    """A CLIP of random weights with the tokenizer of examples/digits, as transformers saves it."""
    shutil.copytree(toy.DIGITS / "tokenizer", folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            projection_dim=16,
            text_config={
                **tower,
                **ends,
                "hidden_size": 24,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 77,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "hidden_size": 24, "image_size": 24, "patch_size": 8},
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    preprocessing = {"size": {"shortest_edge": 24}, "crop_size": 24, "image_mean": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    save_clip(folder)
    return folder


def test_the_score_is_the_cosine_that_transformers_computes(clip: Path) -> None:
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    model = CLIPModel.from_pretrained(clip)
    processor = processing.CLIPImageProcessorPil.from_pretrained(clip)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    found = ClipScorer(clip).score(IMAGES, PROMPTS)
    for image, prompt, score in zip(IMAGES, PROMPTS, found, strict=True):
        ids = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt").input_ids
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            both = model(input_ids=ids, pixel_values=pixels)
        cosine = torch.nn.functional.cosine_similarity(both.image_embeds, both.text_embeds)
        assert score == pytest.approx(float(cosine), abs=1e-5)
    assert len({round(score, 3) for score in found}) == 3


def test_the_digest_is_of_the_weights_and_the_configuration(clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(clip, copy)
    digest = ClipScorer(clip).digest
    assert ClipScorer(copy).digest == digest
    (copy / "README.md").write_text("of no importance")
    assert ClipScorer(copy).digest == digest
    for name in ("model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-3] + b"\0\0\0")
        assert ClipScorer(copy).digest != digest
        (copy / name).write_bytes(data)


def test_an_evaluation_by_clip(clip: Path, tmp_path: Path) -> None:
    bundle = toy.bundle(tmp_path / "bundle")
    small = {"steps": 1, "width": 64, "height": 64}
    texts = ["a handwritten one", "a handwritten two"]
    made = api.evaluate(
        bundle.path, texts, tmp_path / "out", clip=clip, images_per_prompt=3, **small
    )
    (one,) = made.stages
    assert made.scorer == "CLIP score of tiny-clip"
    scores = np.array([[one.scores[f"{i}_{j}.png"] for j in range(3)] for i in range(2)])
    assert one.score is not None
    assert one.score.score.mean == pytest.approx(scores.mean())
    assert one.score.best.mean == pytest.approx(scores.max(1).mean())
    assert -1 <= scores.min() < scores.max() <= 1
    folder = tmp_path / "out" / "model" / "images"
    again = ClipScorer(clip).score([Image.open(folder / f"{i}_1.png") for i in range(2)], texts)
    np.testing.assert_allclose(again, scores[:, 1], atol=1e-5)


@pytest.mark.parametrize("act", ["quick", "exact"])
def test_open_clips_own_files_score_as_open_clip_does(tmp_path: Path, act: str) -> None:
    shutil.copytree(toy.DIGITS / "tokenizer", tmp_path / "clip")
    folder = tmp_path / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    # open_clip takes the place of the highest id for the end, and pads with zeros.
    ends = ids.argmax(-1)
    for row, end in zip(ids, ends, strict=True):
        assert row[end] == tokenizer.eos_token_id == len(tokenizer) - 1
        row[end + 1 :] = 0
    # Square, of the model's own size: nothing is resized, so that pixels are known.
    squares = images((24, 24), (24, 24), (24, 24))
    pixels = np.stack([np.asarray(one, np.float32) / 255 for one in squares])
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    given = torch.from_numpy(((pixels - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    torch.save({"pixels": given, "ids": ids}, folder / "given.pt")
    program = Path(__file__).with_name("open_clip_reference.py")
    subprocess.run([sys.executable, program, folder, act], check=True)
    found = torch.load(folder / "found.pt", weights_only=True)
    wanted = (found["image"] * found["text"]).sum(-1).numpy()
    scores = ClipScorer(folder).score(squares, PROMPTS)
    np.testing.assert_allclose(scores, wanted, atol=2e-6)
    assert np.ptp(wanted) > 0.01

    weights = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    save_file(
        {name: one.contiguous() for name, one in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    scorer = ClipScorer(folder)
    np.testing.assert_allclose(scorer.score(squares, PROMPTS), wanted, atol=2e-6)


def test_open_clip_without_a_tokenizer_has_clips_own(tmp_path: Path) -> None:
    from sdopt.evaluating.openclip import _tokenizer

    made = _tokenizer(tmp_path, {})
    assert len(made) == 49408
    assert made(["a cat"]).input_ids[0] == [49406, 320, 2368, 49407]


def test_what_is_no_clip_of_these_forms(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no CLIP"):
        ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UsageError, match="holds no CLIP"):
        ClipScorer(tmp_path)
    resnet = {"embed_dim": 4, "vision_cfg": {"layers": [3, 4, 6, 3], "timm_model_name": "x"}}
    config = {"model_cfg": {**resnet, "text_cfg": {}}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file({"visual.x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UsageError, match="not of CLIP's own form") as caught:
        ClipScorer(tmp_path).score(IMAGES[:1], PROMPTS[:1])
    assert "timm_model_name, layers" in (caught.value.why or "")

    copy = tmp_path / "copy"
    shutil.copytree(clip, copy)
    (copy / "preprocessor_config.json").write_text('{"do_center_crop": false}')
    with pytest.raises(UsageError, match="not CLIP's") as caught:
        ClipScorer(copy).score(IMAGES[:1], PROMPTS[:1])
    assert "do_center_crop" in (caught.value.why or "")
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match="no JSON"):
        ClipScorer(copy)
