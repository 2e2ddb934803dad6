"""What is wrong with a single file or goes not with it, and what is said then; parts from
elsewhere, tokenizers and adapters."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import sdopt
from examples.digits import single_file
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, MissingDependencyError, SourceError, UsageError, WeightsError
from sdopt.exporters import SingleFileSource, open_source
from sdopt.exporters.clip_vocabulary import PACKAGE, clip_tokenizer
from sdopt.exporters.hub import select
from sdopt.runtime.generate import generate
from tests.exporters import families
from tests.exporters.test_single_file import rewrite, sd1, tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sd1")
    sd1(root / "folder", root / "tokenizer")
    return root / "folder"


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    single_file.write(folder, folder.parent / "sd1.safetensors")
    return folder.parent / "sd1.safetensors"


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("xl")
    families.sdxl(root / "folder", root / "tokenizer")
    return root / "folder"


@pytest.fixture(scope="module")
def bare(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser alone."""

    def keep(state: dict[str, torch.Tensor]) -> None:
        for name in [one for one in state if not one.startswith("model.")]:
            del state[name]

    return rewrite(path, tmp_path_factory.mktemp("bare") / "bare.safetensors", keep)


@pytest.mark.parametrize(
    ("names", "what", "hint"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA file", "--lora"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA file", "--lora"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet", "--controlnet"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a ControlNet",
            "--controlnet",
        ),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE", "--vae"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE", "--vae"),
        (
            ["double_blocks.0.img_attn.norm.key_norm.scale"],
            "a Flux checkpoint",
            "diffusers folder",
        ),
        (
            ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
            "a Flux checkpoint",
            "diffusers folder",
        ),
        (
            ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
            "a Stable Diffusion 3 checkpoint",
            "diffusers folder",
        ),
        (["down_blocks.0.resnets.0.conv1.weight"], "one component in diffusers' names", "folder"),
        (["text_model.final_layer_norm.weight"], "a text encoder", "--text-encoder"),
        (["ip_adapter.1.to_k_ip.weight"], "an IP-Adapter", "whole model"),
        (["input_blocks.0.0.weight", "out.2.weight"], "a UNet alone", "whole model"),
        (["emb_params"], "a textual inversion", "whole model"),
        (["a", "b"], "no checkpoint of a known family", "1.x, 2.x and XL"),
        (["model.diffusion_model.blocks.0.w"], "not Stable Diffusion's UNet", "folder"),
    ],
)
def test_another_file_is_named(tmp_path: Path, names: list[str], what: str, hint: str) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    with pytest.raises(SourceError, match=what) as caught:
        api.export(file, tmp_path / "bundle")
    assert hint in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("v1.ckpt", b"PK\x03\x04", "pickled weights are refused", "from_single_file"),
        ("m.onnx", b"\x08\x0a", "an ONNX file", "sdopt adopt m.onnx"),
        ("m.gguf", b"GGUF", "no model that can be exported", ".safetensors file"),
        ("a.safetensors", b"PK\x03\x04" + b"0" * 40, "a pickle", "itself"),
        ("a.safetensors", b"version https://git-lfs.github.com", "pointer of Git LFS", "itself"),
        ("a.safetensors", b"<!DOCTYPE html><html></html>", "a web page", "itself"),
        ("a.safetensors", b"\x08\x0a\x12\x07pytorch" * 5, "an ONNX file", "itself"),
        ("a.safetensors", b"\x10\x00", "not a usable weights file", "again"),
        ("absent.safetensors", None, "no such file", "path"),
    ],
)
def test_no_safetensors(
    tmp_path: Path, name: str, content: bytes | None, what: str, hint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((SourceError, WeightsError), match=what) as caught:
        api.export(tmp_path / name, tmp_path / "bundle")
    assert hint in str(caught.value)


def test_a_folder_of_single_files(path: Path, tmp_path: Path) -> None:
    (tmp_path / "sd1.safetensors").symlink_to(path)
    with pytest.raises(SourceError, match="no component that can be exported") as caught:
        open_source(str(tmp_path))
    assert f"give the file itself: {tmp_path / 'sd1.safetensors'}" in str(caught.value)


def test_a_mix_of_dtypes_is_exported_in_the_one_of_most(path: Path, tmp_path: Path) -> None:
    name = "first_stage_model.decoder.conv_out.weight"

    def halve(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name].half()

    mixed = rewrite(path, tmp_path / "mix.safetensors", halve)
    report = api.export(mixed, tmp_path / "bundle", components=["vae_decoder"])
    (note,) = report.notes
    assert note.startswith("vae_decoder: the checkpoint mixes float32 and float16")
    stage = Bundle.open(tmp_path / "bundle").stage("vae_decoder", "model")
    assert stage.record.dtype == "fp32"
    tensor = stage.load().graph.initializers["decoder.conv_out.weight"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), load_file(path)[name].half().float().numpy())


def test_a_mix_of_dtypes_cannot_stay_in_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_out.weight"] = state["decoder.conv_out.weight"].half()
    save_file(state, file)
    with pytest.raises(UsageError, match="--in-place cannot change the weights") as caught:
        api.export(tmp_path, in_place=True, components=["vae_decoder"])
    assert "the checkpoint mixes float32 and float16" in str(caught.value)
    assert "leave --dtype away" not in str(caught.value)


def test_a_shard(tmp_path: Path) -> None:
    file = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, file)
    with pytest.raises(SourceError, match="one shard of a model"):
        api.export(file, tmp_path / "bundle")


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = list(load_file(weights))
    weights.rename(weights.with_name(first))
    table = dict.fromkeys(names[:-1], first) | {names[-1]: second}
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(WeightsError, match="a weights file is missing") as caught:
        api.export(tmp_path, tmp_path / "bundle")
    assert second in str(caught.value)


@pytest.mark.parametrize("channels", [5, 7])
def test_other_numbers_of_channels(path: Path, tmp_path: Path, channels: int) -> None:
    def widen(state: dict[str, torch.Tensor]) -> None:
        state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, channels, 3, 3)

    header = json.dumps({"configs": {"unet": {"norm_num_groups": 4}}})
    other = rewrite(path, tmp_path / "depth.safetensors", widen)
    save_file(load_file(other), other, metadata={"sdopt": header})
    with pytest.raises(SourceError, match=f"a UNet of {channels} input channels"):
        SingleFileSource(other)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"configs": []}',
        '{"files": {"../x.json": ""}}',
        '{"files": {"unet/a.txt": ""}}',
    ],
)
def test_metadata_that_cannot_be_used(path: Path, tmp_path: Path, text: str) -> None:
    save_file(load_file(path), tmp_path / "a.safetensors", metadata={"sdopt": text})
    with pytest.raises(SourceError, match="metadata"):
        SingleFileSource(tmp_path / "a.safetensors")


def test_in_place_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="--in-place cannot be done with a single file") as caught:
        api.export(path, in_place=True)
    assert "-o BUNDLE" in str(caught.value)


def test_a_repository_of_single_files() -> None:
    with pytest.raises(SourceError, match="single files") as caught:
        select(["README.md", "model.safetensors", "model.ckpt"])
    assert "hf download REPOSITORY model.safetensors" in str(caught.value)
    with pytest.raises(SourceError, match="single files") as caught:
        select(["model.ckpt"])
    assert "pickles" in str(caught.value)


def test_what_the_file_lacks_is_said(bare: Path, tmp_path: Path) -> None:
    report = api.export(bare, tmp_path / "bundle")
    assert [one.component for one in report.components] == ["unet"]
    assert [note.split(",")[0] for note in report.notes] == [
        "the file holds no text_encoder",
        "the file holds no vae",
    ]
    assert "--vae DIR" in report.notes[1]
    with pytest.raises(SourceError, match="vae_decoder is not here") as caught:
        api.export(bare, tmp_path / "bundle", components=["vae_decoder"])
    assert "supply it: --vae DIR" in str(caught.value)


def test_what_it_lacks_is_supplied(bare: Path, path: Path, folder: Path, tmp_path: Path) -> None:
    supplied = {"text_encoder": folder / "text_encoder", "vae": folder}
    source = open_source(str(bare), supplied=supplied)
    whole = SingleFileSource(path)
    assert source.component_names() == whole.component_names()
    assert source.notes == ()
    for component in source.component_names():
        ours, theirs = tensors(source, component), tensors(whole, component)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_run_says_what_is_missing(bare: Path, tmp_path: Path) -> None:
    api.export(bare, tmp_path / "bundle")
    with pytest.raises(BundleError, match="no text_encoder") as caught:
        list(generate(tmp_path / "bundle", ["a"]))
    assert "--text-encoder DIR" in str(caught.value)


def test_a_folders_part_is_replaced(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "vae"
    shutil.copytree(folder / "vae", other)
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    source = open_source(str(folder), supplied={"vae": other})
    ours, theirs = tensors(source, "vae_decoder"), tensors(open_source(str(folder)), "vae_decoder")
    assert all(np.array_equal(ours[name], theirs[name] * 2) for name in theirs)
    with pytest.raises(UsageError, match="--in-place takes no parts"):
        api.export(folder, in_place=True, supplied={"vae": other})


def test_parts_of_another_model(path: Path, folder: Path, xl: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="text_encoder is a CLIPTextModelWithProjection"):
        open_source(str(path), supplied={"text_encoder": xl / "text_encoder_2"})
    with pytest.raises(SourceError, match="no text_encoder_2 can be taken"):
        open_source(str(path), supplied={"text_encoder_2": xl / "text_encoder_2"})
    with pytest.raises(SourceError, match="no vae can be taken"):
        open_source(str(path), supplied={"vae": tmp_path})
    narrow = tmp_path / "narrow"
    shutil.copytree(folder / "text_encoder", narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "hidden_size": 21}))
    with pytest.raises(SourceError, match="of different models") as caught:
        open_source(str(path), supplied={"text_encoder": narrow})
    assert "text_encoder gives 21, the UNet takes 24" in str(caught.value)
    thin = tmp_path / "thin"
    shutil.copytree(folder / "vae", thin)
    config = json.loads((thin / "config.json").read_text())
    (thin / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(SourceError, match="the VAE and the UNet are of different models"):
        open_source(str(folder), supplied={"vae": thin})


def test_a_mixed_checkpoint(path: Path, folder: Path, tmp_path: Path) -> None:
    def widen(state: dict[str, torch.Tensor]) -> None:
        start = "cond_stage_model.transformer.text_model.embeddings."
        for name in ("token_embedding", "position_embedding"):
            tensor = state[f"{start}{name}.weight"]
            state[f"{start}{name}.weight"] = torch.cat([tensor, tensor], 1)

    mixed = rewrite(path, tmp_path / "mixed.safetensors", widen)
    hints = {"configs": {"unet": {"norm_num_groups": 4}}}
    save_file(load_file(mixed), mixed, metadata={"sdopt": json.dumps(hints)})
    with pytest.raises(SourceError, match="text encoder and the UNet are of different models"):
        SingleFileSource(mixed)
    shutil.copytree(folder, tmp_path / "folder")
    config = tmp_path / "folder" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 16}))
    with pytest.raises(SourceError, match="the VAE and the UNet are of different models"):
        open_source(str(tmp_path / "folder"))


# Tokenizers.


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package that ships invented merges, of which CLIP takes the first 48894."""
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    pairs = list(itertools.product(letters, letters))
    merges = [*(f"{a} {b}" for a, b in pairs), *(f"{a} {b}</w>" for a, b in pairs)]
    place = tmp_path / "packages"
    (place / "open_clip").mkdir(parents=True)
    with gzip.open(place / "open_clip" / "bpe_simple_vocab_16e6.txt.gz", "wt") as file:
        file.write("\n".join(["a first line", *merges]))
    info = place / f"{PACKAGE}-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 9\n")
    (info / "RECORD").write_text("open_clip/bpe_simple_vocab_16e6.txt.gz,,\n")
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    return merges


def written(files: list[Any], folder: Path) -> Path:
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_text(file.text, encoding="utf-8")
    return (folder / files[0].path).parent


def test_the_vocabulary_is_numbered_as_clips(vocabulary: list[str], tmp_path: Path) -> None:
    folder = written(clip_tokenizer("tokenizer", pad_with_zero=False), tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert len(vocab) == 49408
    # As in CLIP: "!" first, "a" 64th, and a word's end 256 later; the marks last.
    known = {"!": 0, "a": 64, "!</w>": 256, "a</w>": 320, "!!": 512, '!"': 513}
    marks = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {name: vocab[name] for name in known | marks} == known | marks
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    assert lines[1:] == vocabulary[: 49408 - 514]
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer("a !", padding="max_length").input_ids
    assert ids == [49406, 320, 256] + [49407] * 74


def test_the_second_pads_with_zero(vocabulary: list[str], tmp_path: Path) -> None:
    folder = written(clip_tokenizer("tokenizer_2", pad_with_zero=True), tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer("a", padding="max_length").input_ids == [49406, 320, 49407] + [0] * 74


def _installed() -> bool:
    return any(one.name == PACKAGE for one in metadata.distributions())


@pytest.mark.skipif(not _installed(), reason=f"{PACKAGE} is not installed")
def test_the_vocabulary_that_is_installed(tmp_path: Path) -> None:
    folder = written(clip_tokenizer("tokenizer", pad_with_zero=False), tmp_path)
    ids = CLIPTokenizer.from_pretrained(folder)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_no_vocabulary(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_: str) -> None:
        raise metadata.PackageNotFoundError(PACKAGE)

    monkeypatch.setattr(metadata, "files", absent)
    configs = single_file.metadata(path.parent / "folder")["configs"]
    file = tmp_path / "plain.safetensors"
    save_file(load_file(path), file, metadata={"sdopt": json.dumps({"configs": configs})})
    with pytest.raises(MissingDependencyError, match="no tokenizer") as caught:
        SingleFileSource(file).shared_files()
    assert "--tokenizer DIR" in str(caught.value)
    # Nobody needs it for the UNet alone.
    assert SingleFileSource(file, components=["unet"]).shared_files()
    given = open_source(str(file), supplied={"tokenizer": path.parent / "folder"})
    files = {one.path for one in given.shared_files()}
    assert {"tokenizer/tokenizer.json", "tokenizer/vocab.json"} <= files


def test_a_broken_vocabulary(vocabulary: list[str], tmp_path: Path) -> None:
    file = tmp_path / "packages" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(file, "wt") as short:
        short.write("first\na b\n")
    with pytest.raises(SourceError, match="not CLIP's vocabulary"):
        clip_tokenizer("tokenizer", pad_with_zero=False)
    file.write_bytes(b"none")
    with pytest.raises(SourceError, match="cannot be read"):
        clip_tokenizer("tokenizer", pad_with_zero=False)


def test_a_given_tokenizer_serves_both_encoders(xl: Path, tmp_path: Path) -> None:
    shutil.copytree(xl / "tokenizer", tmp_path / "own")
    source = open_source(str(xl), supplied={"tokenizer": tmp_path / "own"})
    files = {one.path: one for one in source.shared_files()}
    second = json.loads(files["tokenizer_2/tokenizer_config.json"].text or "")
    assert second["pad_token"] == "!"
    assert files["tokenizer/tokenizer_config.json"].source is not None
    with pytest.raises(SourceError, match="no tokenizer is here"):
        open_source(str(xl), supplied={"tokenizer": tmp_path}).shared_files()


# Adapters.


def adapter(path: Path, names: dict[str, tuple[int, int]], rank: int = 2) -> Path:
    """A LoRA file in diffusers' names with random factors; sizes are ``(out, in)``."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (out, given) in names.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, given, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    save_file(state, path)
    return path


CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def test_an_adapter_is_merged(folder: Path, path: Path, tmp_path: Path) -> None:
    file = adapter(tmp_path / "a.safetensors", {f"unet.{CROSS}": (8, 24)})
    api.export(path, tmp_path / "bundle", components=["unet"], lora=[f"{file}:0.5"])
    stage = Bundle.open(tmp_path / "bundle").stage("unet", "model")
    assert [step.spec.split("=")[0] for step in stage.record.history] == ["lora"]
    assert stage.record.history[0].reads
    ours = {
        str(value.name): value.const_value for value in stage.load().graph.initializers.values()
    }
    plain = tensors(open_source(str(folder)), "unet")
    factors = load_file(file)
    down, up = (factors[f"unet.{CROSS}.lora_{one}.weight"] for one in "AB")
    tensor = ours[f"{CROSS}.weight"]
    assert tensor is not None
    want = plain[f"{CROSS}.weight"] + 0.5 * (up @ down).numpy()
    assert np.allclose(tensor.numpy(), want, rtol=0, atol=1e-6)
    same = f"{CROSS.replace('to_k', 'to_q')}.weight"
    assert np.array_equal(ours[same].numpy(), plain[same])  # type: ignore[union-attr]
    again = api.export(path, tmp_path / "bundle", components=["unet"], lora=[f"{file}:0.5"])
    assert again.components[0].up_to_date
    other = api.export(path, tmp_path / "bundle", components=["unet"], lora=[str(file)])
    assert not other.components[0].up_to_date


@pytest.mark.parametrize(
    "name",
    [
        f"lora_unet_{CROSS.replace('.', '_')}.lora_down.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
        f"unet.{CROSS}.lora_A.weight",
        f"unet.{CROSS}.lora_A.default.weight",
        f"base_model.model.{CROSS}.lora_A.weight",
        f"unet.{CROSS}.lora.down.weight",
        f"unet.{CROSS.removesuffix('.to_k')}.processor.to_k_lora.down.weight",
    ],
)
@pytest.mark.parametrize(("width", "base"), [(2048, "Diffusion XL"), (768, "Diffusion 1.x")])
def test_an_adapter_of_another_family(
    folder: Path, xl: Path, tmp_path: Path, name: str, width: int, base: str
) -> None:
    save_file({name: torch.zeros(4, width)}, tmp_path / "a.safetensors")
    source = folder if width == 2048 else xl
    with pytest.raises(SourceError, match="the adapter is for another model") as caught:
        api.export(source, tmp_path / "bundle", lora=[str(tmp_path / "a.safetensors")])
    assert f"made for Stable {base} (states of {width})" in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_an_lcm_adapter_draws_what_pytorch_draws(folder: Path, path: Path, tmp_path: Path) -> None:
    # As LCM's adapters are: kohya's names, an alpha, linear layers and kernels.
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, weight in load_file(next((folder / "unet").glob("*.safetensors"))).items():
        module, _, leaf = name.rpartition(".")
        adapted = module.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj", "conv1", "conv2"))
        if adapted and leaf == "weight":
            start = f"lora_unet_{module.replace('.', '_')}"
            down = (2, *weight.shape[1:])
            up = (len(weight), 2, *([1] * (weight.dim() - 2)))
            state[f"{start}.alpha"] = torch.tensor(1.0)
            for part, shape in (("lora_down", down), ("lora_up", up)):
                state[f"{start}.{part}.weight"] = 0.2 * torch.randn(*shape, generator=generator)
    file = tmp_path / "lcm.safetensors"
    save_file(state, file)
    bundle = tmp_path / "bundle"
    api.export(path, bundle, lora=[str(file)])
    ours = sdopt.load_pipeline(bundle, scheduler="lcm")
    pipeline: Any = StableDiffusionPipeline
    theirs = pipeline.from_pretrained(folder, safety_checker=None)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(file)
    theirs.fuse_lora()
    options = {"width": 104, "height": 72, "guidance_scale": 1.5}
    found = [families.latents(one, "ab a", **options) for one in (ours, theirs)]
    assert families.distance(found[0].numpy(), found[1]) <= 2e-5
    theirs.unfuse_lora()
    theirs.disable_lora()
    plain = families.latents(theirs, "ab a", **options)
    assert families.distance(found[0].numpy(), plain) > 0.01  # it does something


def test_adapters_asked_for_wrongly(path: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'strong' is no scale"):
        api.export(path, tmp_path / "bundle", lora=["a.safetensors:strong"])
    with pytest.raises(WeightsError, match="missing"):
        api.export(path, tmp_path / "bundle", lora=["absent.safetensors"])
    with pytest.raises(UsageError, match="--in-place takes no --lora"):
        api.export(folder, in_place=True, lora=["a.safetensors"])


# Numbers that are none.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_in_weights_is_named(
    bare: Path, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdopt.cli import main

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state |= {name: tensor.to(dtype) for name, tensor in state.items()}
        broken = state["model.diffusion_model.out.2.weight"].flatten()
        broken[3], broken[5], broken[-1] = float("nan"), float("nan"), float("-inf")

    def inspected(bundle: Path) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["sdopt", "inspect", str(bundle), "--weights"])
            with pytest.raises(SystemExit) as done:
                main()
        return int(done.value.code or 0), capsys.readouterr().out

    api.export(rewrite(bare, tmp_path / "nan.safetensors", spoil), tmp_path / "nan")
    code, text = inspected(tmp_path / "nan")
    assert code == 1
    assert "BROKEN conv_out.weight: 2 NaN and 1 infinite of 288" in text
    assert text.count("BROKEN") == 1
    if dtype is torch.float32:
        api.export(bare, tmp_path / "whole")
        code, text = inspected(tmp_path / "whole")
        assert code == 0
        assert "every weight is a finite number" in text


def test_the_command_line(
    bare: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdopt.cli import main

    name = "encoder.layers.0.self_attn.q_proj"
    file = adapter(tmp_path / "a.safetensors", {f"text_encoder.{name}": (24, 24)})
    words = ["export", bare, "-o", tmp_path / "bundle", "-c", "text_encoder"]
    words += ["--text-encoder", folder, "--vae", folder / "vae", "--tokenizer", folder]
    words += ["--lora", f"{file}:0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdopt", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
    assert not done.value.code
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "bundle")
    assert "adapted_weight" in shown.err
    assert (tmp_path / "bundle" / "tokenizer" / "vocab.json").is_file()
    stage = Bundle.open(tmp_path / "bundle").stage("text_encoder", "model")
    assert stage.record.history[0].spec.startswith("lora=")
