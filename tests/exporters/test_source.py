from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from sdopt.errors import SourceError, UnknownNameError, UsageError
from sdopt.exporters import DiffusersSource
from sdopt.exporters.tokenizer import tokenizer_files

ALL = ["text_encoder", "unet", "vae_encoder", "vae_decoder"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_imports_are_light() -> None:
    code = (
        "import sys, sdopt.exporters; "
        "print([m for m in ('torch', 'transformers', 'diffusers', 'huggingface_hub') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_components_and_files(pipeline: Path) -> None:
    source = DiffusersSource(pipeline)
    assert source.component_names() == ALL
    assert source.notes == ()
    files = {file.path: file for file in source.shared_files()}
    assert {"model_index.json", "scheduler/scheduler_config.json"} <= set(files)
    scheduler = files["scheduler/scheduler_config.json"].source
    assert scheduler is not None
    assert scheduler.is_absolute()
    assert scheduler.is_file()
    assert json.loads(files["model_index.json"].text or "")["unet"][1] == "UNet2DConditionModel"
    assert len(files) == len(source.shared_files())


def test_safety_checker_is_left_out_with_a_note(copy: Path) -> None:
    edit(
        copy / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    source = DiffusersSource(copy)
    assert "safety_checker, feature_extractor left out" in source.notes[0]
    index = json.loads(source.shared_files()[0].text or "")
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_tokenizer_files_are_those_it_was_made_from(pipeline: Path, tmp_path: Path) -> None:
    assert not (pipeline / "tokenizer/vocab.json").exists()  # what transformers 5 writes
    for file in tokenizer_files(pipeline / "tokenizer"):
        (tmp_path / Path(file.path).name).write_text(file.text or "", encoding="utf-8")
    assert tokenizer_files(tmp_path) == []
    old = CLIPTokenizer.from_pretrained(tmp_path)
    new = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    for text in ("abab cab", "a b c", "", "q" * 30):
        assert old(text)["input_ids"] == new(text)["input_ids"]


def test_tokenizer_of_garbage(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(SourceError, match="tokenizer"):
        tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert tokenizer_files(tmp_path) == []


def test_partial_folders(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    shutil.rmtree(copy / "vae")
    source = DiffusersSource(copy)
    assert source.component_names() == ["unet"]
    with pytest.raises(SourceError, match="vae_decoder is not here") as caught:
        source.export("vae_decoder")
    assert "here are: unet" in str(caught.value)
    (copy / "model_index.json").unlink()
    assert DiffusersSource(copy).component_names() == ["unet"]
    assert DiffusersSource(copy).shared_files() == []


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("unet", ["unet"]),
        ("vae", ["vae_encoder", "vae_decoder"]),
        ("text_encoder", ["text_encoder"]),
    ],
)
def test_folder_of_one_component(pipeline: Path, folder: str, names: list[str]) -> None:
    assert DiffusersSource(pipeline / folder).component_names() == names


def test_unknown_component(pipeline: Path) -> None:
    with pytest.raises(UnknownNameError, match="no component") as caught:
        DiffusersSource(pipeline).export("unnet")
    assert "unet" in str(caught.value)


def test_dtypes(pipeline: Path, pipeline_fp16: Path) -> None:
    assert DiffusersSource(pipeline).dtype_of("unet") == "fp32"
    assert DiffusersSource(pipeline_fp16).dtype_of("unet") == "fp16"
    assert DiffusersSource(pipeline_fp16).dtype_of("unet", "bf16") == "bf16"
    with pytest.raises(UsageError, match="int8"):
        DiffusersSource(pipeline).export("unet", "int8")


def test_fingerprints(pipeline: Path, pipeline_fp16: Path) -> None:
    source = DiffusersSource(pipeline)
    prints = [source.fingerprint(name, dtype) for name in ALL for dtype in ("fp32", "fp16")]
    assert len(set(prints)) == len(prints)
    assert source.fingerprint("unet") == source.fingerprint("unet", "fp32")
    assert source.fingerprint("unet") == DiffusersSource(pipeline).fingerprint("unet")
    assert source.fingerprint("unet") != DiffusersSource(pipeline_fp16).fingerprint("unet")


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "HunyuanDiTPipeline", "StableDiffusionUpscalePipeline", None]
)
def test_other_families_are_refused(copy: Path, name: str | None) -> None:
    edit(copy / "model_index.json", _class_name=name)
    with pytest.raises(SourceError, match="not supported") as caught:
        DiffusersSource(copy)
    assert "supported are Stable Diffusion 1.x and 2.x (StableDiffusionPipeline, " in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"cross_attention_dim": [8, 8]}, "cross_attention_dim"),
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "not a UNet2DConditionModel"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "not a CLIPTextModel"),
        ("text_encoder", {"architectures": None}, "is a None"),
    ],
)
def test_other_networks_are_refused(
    copy: Path, folder: str, changes: dict[str, Any], words: str
) -> None:
    edit(copy / folder / "config.json", **changes)
    with pytest.raises(SourceError) as caught:
        DiffusersSource(copy)
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_configurations_of_garbage(copy: Path, text: str) -> None:
    (copy / "unet/config.json").write_text(text)
    with pytest.raises(SourceError, match="configuration file"):
        DiffusersSource(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no component"):
        DiffusersSource(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        DiffusersSource(tmp_path / "absent")
