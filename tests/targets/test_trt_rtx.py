"""trt_rtx: engines built here, without a GPU; what is refused, and how it says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, artifacts, modelfile, recorded, registry
from sdopt.errors import BuildError, SpecError, UsageError
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.shapes import Request, parse_sizes
from sdopt.targets.base import Order
from sdopt.targets.trt import Trt
from sdopt.targets.trt_rtx import TrtRtx
from tests import building_bundle
from tests.passes import denoiser
from tests.toolkit import model_of


def attention() -> ir.Model:
    """A convolution's tokens, attended to with 4 heads of 16."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w": (rng.standard_normal((64, 4, 3, 3)) / 6).astype(np.float32),
        "flat": np.array([0, 64, -1]),
        "heads": np.array([0, -1, 4, 16]),
        "two": np.array(2, np.float32),
    }
    body = """
        c = Conv<pads=[1,1,1,1]>(sample, w)
        f = Reshape(c, flat)
        t = Transpose<perm=[0,2,1]>(f)
        r = Reshape(t, heads)
        h = Transpose<perm=[0,2,1,3]>(r)
        k = Mul(h, two)
        v = Add(h, two)
        a = Attention(h, k, v)
        y = Transpose<perm=[0,2,1,3]>(a)"""
    head = "g (float[batch_size,4,height,width] sample) => (float[batch_size,S,4,16] y)"
    return model_of(f"{head} {{ {body} }}", weights)


def order(path: Path, shapes: str) -> Order:
    sizes = parse_sizes(shapes)
    inputs: dict[str, list[int | str]] = {"sample": ["batch_size", 4, "height", "width"]}
    profiles = Request(sizes, (1, 2)).profiles(inputs, doubled=True)
    return Order("unet", Role.DENOISER, path, profiles, sizes, (1, 2), lambda what, share: None)


def lowered(target: TrtRtx, folder: Path) -> Path:
    model = attention()
    Pipeline.parse(target.lowering(Role.DENOISER)).run(model, RunContext())
    target.check_legal(model)
    path = folder / "lowered.onnx"
    ir.save(model, path)
    return path


def test_an_engine_for_two_cards_and_two_profiles_fuses_its_attention(tmp_path: Path) -> None:
    target = TrtRtx(dtype="fp16", sm=("86", "89"))
    given = order(lowered(target, tmp_path), "64x64..128x128,72x88")
    facts = target.compile(given, tmp_path / "one.plan")
    assert (facts["attentions"], facts["attentions_fused"]) == (1, 1)
    assert [one["sample"][2] for one in facts["profiles"]] == [[8, 16, 16], [9, 9, 9]]


def test_two_engines_of_fixed_axes_have_the_same_bytes(tmp_path: Path) -> None:
    target = TrtRtx(dtype="fp16", sm=("86",))
    path = lowered(target, tmp_path)
    model = ir.load(path)
    model.graph.inputs[0].shape = ir.Shape([2, 4, 8, 8])
    ir.save(model, path)
    given = order(path, "64x64")
    first, second = tmp_path / "one.plan", tmp_path / "two.plan"
    target.compile(given, first)
    target.compile(given, second)
    assert first.read_bytes() == second.read_bytes()


def test_the_parser_judges_a_graph_without_a_card(tmp_path: Path) -> None:
    target = TrtRtx(dtype="fp16")
    (note,) = target.check(order(lowered(target, tmp_path), "64x64"))
    assert "tensorrt_rtx" in note
    (note,) = Trt().check(order(tmp_path / "lowered.onnx", "64x64"))
    assert "parses it" in note


def test_a_graph_that_the_parser_refuses_names_its_node(tmp_path: Path) -> None:
    model = model_of("g (float[2,3] x) => (int64[2,N] y) { y = NonZero(x) }")
    path = tmp_path / "refused.onnx"
    ir.save(model, path)
    with pytest.raises(BuildError, match="refuses NonZero"):
        TrtRtx().check(order(path, "64x64"))
    with pytest.raises(BuildError, match="cannot take NonZero"):
        TrtRtx().check_legal(model)


def test_quantized_builds_want_something_quantized(tmp_path: Path) -> None:
    target = TrtRtx(dtype="int8")
    path = lowered(target, tmp_path)
    with pytest.raises(BuildError, match="nothing in unet is in int8"):
        target.compile(order(path, "64x64"), tmp_path / "x.plan")


@pytest.mark.parametrize(
    "options",
    ["level=3:workspace=64", "version_compatible=true", "dtype=bf16:sm=80", "dtype=fp32"],
)
def test_options_of_the_builder(tmp_path: Path, options: str) -> None:
    target = registry.make("targets", f"trt_rtx:{options}")
    assert isinstance(target, TrtRtx)
    told: list[tuple[str, float]] = []
    given = dataclasses.replace(
        order(lowered(target, tmp_path), "64x64"),
        progress=lambda what, share: told.append((what, share)),
    )
    target.compile(given, tmp_path / "x.plan")
    assert (tmp_path / "x.plan").stat().st_size > 100_000
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_a_refittable_engine_wants_a_card(tmp_path: Path) -> None:
    target = TrtRtx(refit=True)
    given = order(lowered(target, tmp_path), "64x64")
    with pytest.raises(BuildError, match="could not build an engine") as caught:
        target.compile(given, tmp_path / "x.plan")
    assert "with a card" in (caught.value.hint or "")


@pytest.mark.parametrize(("dtype", "sm"), [("int8", "86"), ("fp8", "89")])
def test_recorded_inputs_make_a_quantized_engine(tmp_path: Path, dtype: str, sm: str) -> None:
    building_bundle.make(tmp_path / "b")
    writer = recorded.Writer(tmp_path / "recorded")
    for index in range(3):
        given = denoiser.feeds(batch=2, size=(8, 8), time=float(index))
        given["timestep"] = np.full(2, index, np.float32)
        writer.add("unet", given, prompt="a", seed=index, step=index, timestep=1.0)
    writer.commit("key", {}, {"unet": recorded.Origin("model", "digest")})
    text = f"trt_rtx:dtype={dtype}:sm={sm}:data={tmp_path / 'recorded'}"
    assert registry.make("targets", str(registry.make("targets", text))).data  # type: ignore[attr-defined]
    sizes = {"shapes": "64x64..128x128", "dims": {"sequence_length": (5, 5)}}
    (unet,) = api.build(tmp_path / "b", text, **sizes).components  # type: ignore[arg-type]
    assert unet.artifact["size"] > 100_000
    lowered = modelfile.load(Path(unet.file))
    kinds = [value.const_value.dtype.name for value in modelfile.initializers(lowered)]  # type: ignore[union-attr]
    assert kinds.count({"int8": "INT8", "fp8": "FLOAT8E4M3FN"}[dtype]) >= 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("trt_rtx:dtype=fp16:data=x", "data calibrates dtype=int8 and dtype=fp8"),
        ("trt_rtx:sm=90", "does not build for compute capability 90"),
        ("trt_rtx:dtype=fp8:sm=86", "has no fp8"),
        ("trt_rtx:dtype=bf16:sm=75", "has no bf16"),
        ("trt_rtx:level=9", "level must be 0 to 5"),
        ("trt_rtx:strip=true", "options of trt"),
        ("trt:dtype=fp64", "fp64"),
    ],
)
def test_what_cannot_be_built(text: str, reason: str) -> None:
    with pytest.raises((SpecError, UsageError), match=reason):
        registry.make("targets", text)


def test_commands_for_another_machine() -> None:
    given = order(Path("bundle/unet/trt_fp16.onnx"), "64x64..128x128")
    (line,) = Trt(dtype="fp16").commands([given])
    assert line.startswith("trtexec --onnx=unet/trt_fp16.onnx --saveEngine=unet/trt_fp16.plan")
    assert "--stronglyTyped" in line
    assert "--minShapes=sample:1x4x8x8 --optShapes=sample:2x4x16x16" in line
    (line,) = TrtRtx(sm=("86", "120")).commands([given])
    assert "--computeCapabilities=8.6,12.0" in line


def test_an_artifact_is_known_again_only_whole_and_of_the_same_making(tmp_path: Path) -> None:
    path = tmp_path / "unet.plan"
    with artifacts.writing(path) as folder:
        (folder / path.name).write_bytes(b"engine")
        made = artifacts.commit(folder / path.name, path, "key", 1.0, {"tool": "1"}, {"n": 2})
    assert artifacts.known(path, "key") == made
    assert artifacts.known(path, "other") is None
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    path.write_bytes(b"broken")
    assert artifacts.known(path, "key") is None
    path.write_bytes(b"engine")
    record = json.loads(artifacts.record_path(path).read_text())
    artifacts.record_path(path).write_text(json.dumps(record)[:-5])
    assert artifacts.known(path, "key") is None


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "unet.plan"
    path.write_bytes(b"before")

    def fail() -> None:
        with artifacts.writing(path) as folder:
            (folder / path.name).write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["unet.plan"]
    assert path.read_bytes() == b"before"
