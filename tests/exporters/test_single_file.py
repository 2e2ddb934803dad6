"""Single files with the original names: what is found in them, against folders and diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sdopt
from examples.digits import single_file
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.exporters import DiffusersSource, SingleFileSource, ldm
from sdopt.exporters.published import PUBLISHED
from sdopt.manifest import RECORD_KEY
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP32, distance
from tests.exporters.made import once

OFFSET = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
SCHEDULER = partial(DDIMScheduler, set_alpha_to_one=False, **OFFSET)
LCM = partial(LCMScheduler, beta_schedule="scaled_linear")


def inpaint(folder: Path, scratch: Path) -> None:
    families.sd1(StableDiffusionInpaintPipeline, folder, scratch, SCHEDULER(), in_channels=9)


def consistency(folder: Path, scratch: Path) -> None:
    cls = LatentConsistencyModelPipeline
    families.sd1(cls, folder, scratch, LCM(), time_cond_proj_dim=32)


def sd1(folder: Path, scratch: Path) -> None:
    families.sd1(StableDiffusionPipeline, folder, scratch, SCHEDULER())


MAKE: Mapping[str, Callable[[Path, Path], None]] = {
    "sd1": sd1,
    "sd2": families.sd2,
    "sdxl": families.sdxl,
    "sdxl_refiner": families.refiner,
    "inpaint": inpaint,
    "lcm": consistency,
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A family's folder, and the same as a single file; each made once."""
    done: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            if name == "sdxl":  # its bundle is looked at too
                folder, _ = once(name, tmp_path_factory)
            else:
                folder = root / "folder"
                MAKE[name](folder, root / "tokenizer")
            single_file.write(folder, root / f"{name}.safetensors")
            done[name] = folder, root / f"{name}.safetensors"
        return done[name]

    return get


def tensors(source: Any, component: str) -> dict[str, np.ndarray]:
    """A component's weights by name, without the prefix that transformers 5 dropped."""
    checkpoint = source._checkpoint(component, None)
    return {
        name.removeprefix("text_model."): checkpoint.external(name).numpy()
        for name in checkpoint.entries
    }


@pytest.mark.parametrize("name", MAKE)
def test_it_holds_what_the_folder_holds(made: Callable[[str], Pair], name: str) -> None:
    folder, path = made(name)
    whole, single = DiffusersSource(folder), SingleFileSource(path)
    assert single.component_names() == whole.component_names()
    assert single.family == whole.family == {"inpaint": "sd1", "lcm": "sd1"}.get(name, name)
    assert single.notes == ()
    for component in single.component_names():
        ours, theirs = tensors(single, component), tensors(whole, component)
        assert ours.keys() >= theirs.keys()
        for one, tensor in theirs.items():
            assert np.array_equal(ours[one], tensor), one
        known = plain(whole.config(component))
        found = plain(single.config(component))
        assert {key: found[key] for key in known} == known
    index = json.loads(single.shared_files()[0].text or "")
    known = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == known["_class_name"]
    chosen = {"force_zeros_for_empty_prompt"} if name == "sdxl_refiner" else set()  # as published
    both = (index.keys() & known.keys()) - chosen
    assert {key: index[key] for key in both} == {key: known[key] for key in both}
    files = {file.path for file in single.shared_files()}
    assert {file.path for file in whole.shared_files()} - files <= {
        f"{part}/{file}"
        for part in ("tokenizer", "tokenizer_2")
        for file in ("vocab.json", "merges.txt")  # made from tokenizer.json
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_diffusers_reads_the_same_out_of_it(made: Callable[[str], Pair], name: str) -> None:
    folder, path = made(name)
    single = SingleFileSource(path)
    offline: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    for part, cls, component in (
        ("unet", UNet2DConditionModel, "unet"),
        ("vae", AutoencoderKL, "vae_decoder"),
    ):
        loader: Any = cls
        model = loader.from_single_file(str(path), subfolder=part, **offline)
        same(tensors(single, component), model.state_dict())
    for part in ("text_encoder", "text_encoder_2"):
        if part in single.component_names():
            kind: Any = CLIPTextModelWithProjection if part[-1] == "2" else CLIPTextModel
            model = create_diffusers_clip_model_from_ldm(
                kind, load_file(path), subfolder=part, **offline
            )
            same(tensors(single, part), model.state_dict())


def same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name.removeprefix("text_model.")], tensor.numpy()), name


PUBLIC: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        "sample_size": 96,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl_refiner": {
        "sample_size": 128,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "transformer_layers_per_block": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}
"""The UNets' configurations as published, beyond diffusers' defaults."""


def full_size(name: str, **more: Any) -> dict[str, tuple[int, ...]]:
    """Original names and shapes of the published UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**PUBLIC[name], **more})
    state = single_file.original({"unet": unet.state_dict()}, {"unet": dict(unet.config)})
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return {key: value for key, value in found.items() if not key.startswith("_")}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sd1", {}),
        ("sd1", {"in_channels": 9}),
        ("sd1", {"time_cond_proj_dim": 256}),
        ("sd2", {}),
        ("sdxl", {}),
        ("sdxl_refiner", {}),
    ],
)
def test_the_published_unets_are_known_by_shapes(name: str, more: dict[str, Any]) -> None:
    shapes = full_size(name, **more)
    assert ldm.family_of(shapes, {}) == name
    found = ldm.unet_config(shapes, name, {}, "")
    with torch.device("meta"):
        want = UNet2DConditionModel(**{**PUBLIC[name], **more})
        ours = UNet2DConditionModel.from_config(found)
    assert plain(ours.config) == plain(want.config)


def test_the_published_vae_and_text_encoders_are_known_by_shapes() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=1024,
            scaling_factor=0.13025,
        )
        size = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(**size, num_hidden_layers=32, num_attention_heads=20)
        )
    state = single_file.original(
        {"vae": vae.state_dict(), "text_encoder_2": text.state_dict()}, {"vae": dict(vae.config)}
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    known = PUBLISHED["sdxl"]
    found = ldm.vae_config(ldm.inside(shapes, "first_stage_model."), known, {})
    assert plain(AutoencoderKL.from_config(found).config) == plain(vae.config)
    below = ldm.inside(shapes, "conditioner.embedders.0.model.")
    found = ldm.text_config(below, "text_encoder_2", known, {})
    assert {key: found[key] for key in size} == size
    assert (found["num_hidden_layers"], found["num_attention_heads"]) == (32, 20)
    assert (found["hidden_act"], found["vocab_size"]) == ("gelu", 49408)
    # Stable Diffusion 2's file holds the whole tower, of which it leaves the last layer out.
    assert ldm.text_config(below, "text_encoder", known, {})["num_hidden_layers"] == 31


@pytest.fixture(scope="module")
def bundles(made: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """XL's bundles, of the folder and of the single file."""
    single = tmp_path_factory.mktemp("bundles") / "single"
    api.export(made("sdxl")[1], single)
    return once("sdxl", tmp_path_factory)[1], single


@pytest.mark.parametrize("component", ["text_encoder_2", "unet", "vae_encoder", "vae_decoder"])
def test_the_bundle_is_the_folders(bundles: Pair, component: str) -> None:
    graphs = []
    for path in bundles:
        model = Bundle.open(path).stage(component, "model").load()
        del model.metadata_props[RECORD_KEY]
        graphs.append(ir.to_proto(model).SerializeToString())
    # Data files are called by the digest of their bytes.
    assert graphs[0] == graphs[1]
    data = [{p.name for p in (path / component).glob("*.onnx_data")} for path in bundles]
    assert data[0] == data[1] != set()


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "unet", "vae_decoder"])
def test_components_equal_pytorch(
    made: Callable[[str], Pair], bundles: Pair, component: str
) -> None:
    model = families.reference(made("sdxl")[0], component)
    session = Ort().open(Bundle.open(bundles[1]).stage(component, "model").path)
    feeds = families.feeds_of(component, (9, 13), 1, states=40, **families.ADDED)
    families.check(session, model, feeds, FP32)


def test_the_image_is_pytorchs(made: Callable[[str], Pair], bundles: Pair) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline
    theirs = pipeline.from_pretrained(made("sdxl")[0], add_watermarker=False)
    options = {"width": 104, "height": 72}
    found = [
        families.latents(one, "ab a", **options)
        for one in (sdopt.load_pipeline(bundles[1]), theirs)
    ]
    assert distance(found[0].numpy(), found[1]) <= 2e-5


def rewrite(path: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A single file with other tensors and the same metadata."""
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    known = json.loads(header[8 : 8 + length])["__metadata__"]
    state = load_file(path)
    change(state)
    save_file(state, to, metadata=known)
    return to


def test_averaged_weights_are_left_alone(made: Callable[[str], Pair], tmp_path: Path) -> None:
    def average(state: dict[str, torch.Tensor]) -> None:
        start = "model.diffusion_model."
        for name in [one for one in state if one.startswith(start)]:
            flat = name.removeprefix("model.").replace(".", "")
            state[f"model_ema.{flat}"] = torch.zeros_like(state[name])

    _, path = made("sd1")
    single = SingleFileSource(rewrite(path, tmp_path / "ema.safetensors", average))
    assert any("averaged weights (model_ema)" in note for note in single.notes)
    ours, theirs = tensors(single, "unet"), tensors(SingleFileSource(path), "unet")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_mix_of_dtypes_is_said(made: Callable[[str], Pair], tmp_path: Path) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        name = "model.diffusion_model.out.2.weight"
        state[name] = state[name].half()

    single = SingleFileSource(rewrite(made("sd1")[1], tmp_path / "mix.safetensors", halve))
    (note,) = single.remarks(["unet", "vae_decoder"])
    assert note == "unet: the checkpoint mixes float32 and float16; all of it is exported in fp32"
    (note,) = single.remarks(["unet"], "fp16")
    assert note.endswith("exported in fp16")


@pytest.mark.parametrize(
    ("metadata", "names", "said"),
    [
        ({}, (), None),
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction"),
        ({}, ("v_pred",), "v_prediction"),
    ],
)
def test_what_sd2_predicts(
    made: Callable[[str], Pair],
    tmp_path: Path,
    metadata: dict[str, str],
    names: tuple[str, ...],
    said: str | None,
) -> None:
    folder, path = made("sd2")
    configs = single_file.metadata(folder)["configs"]
    state = load_file(path) | {name: torch.zeros(0) for name in names}
    known = {"sdopt": json.dumps({"configs": configs}), **metadata}
    save_file(state, tmp_path / "sd2.safetensors", metadata=known)
    single = SingleFileSource(tmp_path / "sd2.safetensors", components=["unet"])
    files = {file.path: file.text or "" for file in single.shared_files()}
    config = json.loads(files["scheduler/scheduler_config.json"])
    assert config["prediction_type"] == (said or "v_prediction")
    assert any("does not say whether it predicts" in n for n in single.notes) == (said is None)


def test_what_sd2_predicts_for_inpainting(tmp_path: Path) -> None:
    shapes = full_size("sd2", in_channels=9)
    with torch.device("meta"):
        state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    single = SingleFileSource(sparse(tmp_path / "a.safetensors", state), components=["unet"])
    config = json.loads(single.shared_files()[1].text or "")
    assert config["prediction_type"] == "epsilon"
    assert single.config("unet")["sample_size"] == 64
    assert [note for note in single.notes if "predicts" in note] == []
    assert json.loads(single.shared_files()[0].text or "")["_class_name"] == (
        "StableDiffusionInpaintPipeline"
    )


def sparse(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A safetensors file of these names and shapes in half precision, without its bytes."""
    table, end = {}, 0
    for name, tensor in state.items():
        size = 2 * math.prod(tensor.shape)
        shape = list(tensor.shape)
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
