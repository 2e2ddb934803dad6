"""Stable Diffusion 3 and 3.5: components and whole images against PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image

import sdopt
from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.exporters import DiffusersSource
from sdopt.runtime.generate import generate
from sdopt.targets.ort import Ort
from tests.exporters import families
from tests.exporters.families import FP16, FP32, distance

SIZES = [(4, 4), (5, 7), (3, 2)]
"""In patches, of two latent pixels each."""
MODEL = "sd35"
IMAGE = 2e-5
"""Four steps on components that are each within 5e-6."""
ENCODERS = ["text_encoder", "text_encoder_2", "text_encoder_3"]
COMPONENTS = [*ENCODERS, "transformer", "vae_encoder", "vae_decoder"]
SD3 = {"dual_attention_layers": (), "qk_norm": None}
"""What the transformer of 3.0 does without."""


@pytest.fixture(scope="module")
def bundle(both: tuple[Path, Path]) -> Path:
    path = both[1]
    report = api.optimize(path, "@fast", require="attention=all,rms_norm=all,gelu=all")
    assert report.met
    assert families.fused(report) == {
        "text_encoder": {"self_attention_qkv": 2},
        "text_encoder_2": {"self_attention_qkv": 3},
        "text_encoder_3": {"self_attention_qkv": 3},
        "transformer": {"joint_attention_qkv": 3, "self_attention_qkv": 2},
        "vae_encoder": {"self_attention_qkv": 1},
        "vae_decoder": {"self_attention_qkv": 1},
    }
    api.optimize(path, "@fast_fp16", stage="fp16")
    return path


def test_names_are_those_of_optimum(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.family == "sd3"
    graph = opened.stage("transformer", "optimized").load().graph
    given = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert [value.name for value in graph.inputs] == given
    assert [value.name for value in graph.outputs] == ["out_hidden_states"]
    dims = [[getattr(dim, "value", dim) for dim in value.shape or ()] for value in graph.inputs]
    assert dims == [
        ["batch_size", 16, "height", "width"],
        ["batch_size", "sequence_length", 48],
        ["batch_size", 28],
        ["batch_size"],
    ]


def test_norms_and_gates_are_single_nodes(source: Path) -> None:
    """None of them is written out, and torch's own decomposition is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        from sdopt.exporters import lowering, trace

        lowered: list[bool] = []
        patch.setattr(trace, "lower", lambda p: lowered.append(lowering.lower(p)))
        for name, counts in (
            ("transformer", {"RMSNormalization": 16, "Attention": 5, "Gelu": 5}),
            ("text_encoder_3", {"RMSNormalization": 7, "Attention": 3, "Gelu": 3}),
        ):
            model = DiffusersSource(source).export(name).model
            found = Counter(node.op_type for node in model.graph)
            assert counts.items() <= found.items()
            assert not {"Pow", "ReduceMean", "Tanh", "Einsum"} & found.keys()
    assert lowered == [True, True]


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_equal_pytorch(source: Path, bundle: Path, component: str) -> None:
    model = families.reference(source, component)
    for stage, at in (("model", FP32), ("optimized", FP32), ("fp16", FP16)):
        session = Ort().open(Bundle.open(bundle).stage(component, stage).path)
        for seed, size in enumerate(SIZES):
            feeds = families.feeds_of(component, size, seed, channels=16, states=48, pooled=28)
            families.check(session, model, feeds, at)


@pytest.mark.parametrize("image_to_image", [False, True])
@pytest.mark.parametrize("stage", ["optimized", "fp16"])
def test_images_equal_pytorch(
    source: Path, bundle: Path, stage: str, image_to_image: bool
) -> None:
    cls: Any = StableDiffusion3Img2ImgPipeline if image_to_image else StableDiffusion3Pipeline
    ours = sdopt.load_pipeline(bundle, stage=stage, image_to_image=image_to_image)
    theirs = cls.from_pretrained(source)
    assert type(ours) is cls
    options: dict[str, Any] = {"width": 112, "height": 80, "max_sequence_length": 33}
    if image_to_image:
        options |= {"image": picture(), "strength": 0.7}
    options |= {"negative_prompt": "q", "prompt_3": "c b", "guidance_scale": 4.0}
    found = [families.latents(one, "ab a cab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= (FP16 if stage == "fp16" else IMAGE)


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (80, 112, 3), np.uint8)
    return Image.fromarray(values)


def test_run_draws(bundle: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "negative": "q", "seed": 4}
    (one,) = generate(bundle, ["ab"], width=80, height=112, **options)
    assert one.image.size == (80, 112)
    assert set(one.stages) == {*ENCODERS, "transformer", "vae_decoder"}
    (other,) = generate(bundle, ["ab"], image=picture(), scheduler="heun", **options)
    assert other.image.size == (112, 80)


def test_a_size_between_patches_is_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 16 pixels, not 72"):
        list(generate(bundle, ["ab"], width=72, height=80))


def test_a_scheduler_for_noise_is_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="ddim knows no flow matching") as caught:
        list(generate(bundle, ["ab"], scheduler="ddim"))
    assert "euler" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["dpm++", "euler", "heun", "unipc"])
def test_schedulers_of_flow_shift_as_the_bundle_does(bundle: Path, name: str) -> None:
    """All of them visit the same noise levels, from all noise on."""
    (one,) = generate(bundle, ["ab"], steps=3, scheduler=name)
    assert np.isfinite(np.asarray(one.image, np.float64)).all()
    sigmas = sdopt.load_pipeline(bundle, scheduler=name).scheduler
    sigmas.set_timesteps(4)
    assert float(sigmas.sigmas[0]) == pytest.approx(1.0, abs=5e-3)


def test_the_older_transformer(tmp_path: Path) -> None:
    """SD3-medium has no norm on q and k and no second attention."""
    families.sd3(tmp_path / "source", tmp_path / "tokenizers", **SD3)
    api.export(tmp_path / "source", tmp_path / "bundle", components=["transformer"])
    report = api.optimize(tmp_path / "bundle", "@fast")
    assert families.fused(report) == {"transformer": {"joint_attention_qkv": 3}}
    model = families.reference(tmp_path / "source", "transformer")
    session = Ort().open(Bundle.open(tmp_path / "bundle").stage("transformer", "optimized").path)
    feeds = families.feeds_of("transformer", (5, 7), 1, channels=16, states=48, pooled=28)
    families.check(session, model, feeds, FP32)


def test_half_precision_keeps_t5s_sum_wide(source: Path, tmp_path: Path) -> None:
    """T5 is written so that a sum beyond float16's range survives, on the checkpoint's weights."""
    api.export(source, tmp_path / "bundle", dtype="fp16", components=["text_encoder_3"])
    api.optimize(tmp_path / "bundle", "@fast")
    feeds = families.feeds_of("text_encoder_3", (4, 4), 1)
    model = families.reference(source, "text_encoder_3")
    for stage in ("model", "optimized"):
        path = Bundle.open(tmp_path / "bundle").stage("text_encoder_3", stage)
        graph = path.load().graph
        adds = [
            node for node in graph if node.op_type == "Add" and len(node.outputs[0].shape) == 3
        ]
        assert {str(node.outputs[0].dtype) for node in adds} == {"FLOAT"}
        assert {
            str(v.dtype) for v in graph.initializers.values() if v.name.endswith("weight")
        } == {"FLOAT16"}
        families.check(Ort().open(path.path), model, feeds, FP16)


def test_a_pipeline_without_t5(tmp_path: Path) -> None:
    families.sd3(tmp_path / "source", tmp_path / "tokenizers", third=False)
    api.export(tmp_path / "source", tmp_path / "bundle")
    ours = sdopt.load_pipeline(tmp_path / "bundle")
    none: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "source", **none)
    assert ours.text_encoder_3 is None
    options: dict[str, Any] = {"width": 64, "height": 64, "max_sequence_length": 16}
    found = [families.latents(one, "ab", **options) for one in (ours, theirs)]
    assert distance(found[0].numpy(), found[1]) <= IMAGE


def test_a_missing_t5_is_named(source: Path, tmp_path: Path) -> None:
    names = [name for name in COMPONENTS if name != "text_encoder_3"]
    api.export(source, tmp_path / "bundle", components=names)
    with pytest.raises(BundleError, match="no text_encoder_3"):
        sdopt.load_pipeline(tmp_path / "bundle")


def test_one_component_tells_its_family(source: Path) -> None:
    for name in ("transformer", "text_encoder_3"):
        alone = DiffusersSource(source / name)
        assert (alone.family, alone.component_names()) == ("sd3", [name])


def test_trt_rtx_takes_every_graph(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = api.build(bundle, "trt_rtx:dtype=fp16", shapes="64x64..128x128", check=True)
    assert {one.component for one in report.components} == set(COMPONENTS)


def test_trt_lowering_parses(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = api.build(bundle, "trt:dtype=fp16", shapes="64x64..128x128", check=True)
    assert {one.component for one in report.components} == set(COMPONENTS)


def test_compare_takes_the_checkpoint(source: Path, bundle: Path) -> None:
    found = api.compare(str(source), f"{bundle}@optimized")
    assert {one.component: one.verdict for one in found.components} == dict.fromkeys(
        COMPONENTS, "same"
    )


def test_record_knows_the_transformer(bundle: Path, tmp_path: Path) -> None:
    made = api.record(
        bundle, ["ab"], output=tmp_path / "tape", steps=3, keep=2, width=64, height=64
    )
    assert made.counts()["transformer"] == 2


def test_hoist_moves_what_the_prompt_decides(bundle: Path) -> None:
    report = api.optimize(bundle, "@fast,hoist", stage="hoisted", components=["transformer"])
    (one,) = report.components
    assert any(step.spec == "hoist" and step.changed for step in one.passes)
    options: dict[str, Any] = {"width": 64, "height": 64, "max_sequence_length": 16}
    pipes = [sdopt.load_pipeline(bundle, stage=stage) for stage in ("optimized", "hoisted")]
    found = [families.latents(pipe, "ab", **options).numpy() for pipe in pipes]
    assert np.array_equal(found[0], found[1])


def test_the_index_is_kept(bundle: Path) -> None:
    index = json.loads((bundle / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert (bundle / "tokenizer_3" / "tokenizer.json").is_file()
