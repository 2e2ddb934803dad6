"""``pad_align`` on whole UNets that other exporters traced at 16x16, against PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.errors import BuildError
from sdopt.fingerprint import fingerprint
from sdopt.passes.base import PassContext
from sdopt.passes.clean import Clean
from sdopt.passes.pad_align import PadAlign
from sdopt.targets.ort import Ort
from sdopt.tolerance import FP32_REASSOCIATED, HALF
from tests.passes import adopted

RESHAPES = {adopted.TORCHSCRIPT: 0}
"""Frozen Reshapes: none by torch's older exporter, which reads live shapes. 12 by the dynamo one:
each transformer flattens and restores, and the six of the up path are frozen. With named Dims,
which must be multiples of 8, the two at full size are not, but two of the down path are."""

VARIANTS = [
    *adopted.QUICK,
    *(pytest.param(variant, marks=pytest.mark.slow) for variant in adopted.SLOW),
]
SOME = [(8, 8), (15, 15), (9, 24), (24, 9), (13, 23), (17, 10)]


def aligned(variant: str, mode: str = "resize", *, clean: bool = False) -> ir.Model:
    model = adopted.load(variant)
    if clean:
        Clean().apply(model, PassContext(model))
    PadAlign(mode).apply(model, PassContext(model))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_pass_the_graph_runs_only_where_nothing_is_rounded(variant: str) -> None:
    session = adopted.session(adopted.load(variant))
    runs = [session.run(None, adopted.feeds(*size))[0] for size in ((16, 16), (8, 24))]
    assert adopted.distance(runs[0], adopted.answer(16, 16)) <= FP32_REASSOCIATED
    with pytest.raises(Exception, match=r"Concat node.*Non concat axis dimensions must match"):
        session.run(None, adopted.feeds(15, 15))


def test_the_error_names_the_pass(tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    ir.save(adopted.load(adopted.TORCHSCRIPT), path)
    with pytest.raises(BuildError, match="pad_align") as caught:
        Ort().open(path).run(adopted.feeds(15, 15))
    assert "Concat" in str(caught.value.why)


@pytest.mark.parametrize("clean", [False, True], ids=["raw", "cleaned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_latent_equals_pytorch(variant: str, clean: bool) -> None:
    session = adopted.session(aligned(variant, clean=clean))
    worst = max(
        adopted.distance(session.run(None, adopted.feeds(*size))[0], adopted.answer(*size))
        for size in adopted.SIZES
    )
    assert worst <= FP32_REASSOCIATED


@pytest.mark.parametrize("mode", ["resize", "crop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_where_the_graph_ran_before_not_a_bit_changes(variant: str, mode: str) -> None:
    before, after = adopted.session(adopted.load(variant)), adopted.session(aligned(variant, mode))
    for size in ((16, 16), (8, 24)):
        inputs = adopted.feeds(*size)
        np.testing.assert_array_equal(after.run(None, inputs)[0], before.run(None, inputs)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_cropping_a_doubling_is_the_same_function(variant: str) -> None:
    session = adopted.session(aligned(variant, "crop"))
    for size in SOME:
        found = session.run(None, adopted.feeds(*size))[0]
        assert adopted.distance(found, adopted.answer(*size)) <= FP32_REASSOCIATED


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_rewritten_is_counted_and_nothing_is_left(variant: str) -> None:
    model = adopted.load(variant)
    interface = [str(v.type) + str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)]
    ctx = PassContext(model)
    PadAlign().apply(model, ctx)
    expected = {"upsampler": 3, "baked_size": RESHAPES.get(variant, 12)}
    assert ctx.rewrites == {what: count for what, count in expected.items() if count}
    assert ctx.skips == []
    assert interface == [
        str(v.type) + str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    named = {str(dim) for value in model.graph.inputs for dim in value.shape or ()}
    out = model.graph.outputs[0].shape
    assert out is not None
    assert all(isinstance(d, int) or str(d) in {*named, "None"} for d in out)


@pytest.mark.parametrize("mode", ["resize", "crop", "pad"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_application_changes_nothing(variant: str, mode: str) -> None:
    model = aligned(variant, mode)
    once, ctx = fingerprint(model), PassContext(model)
    PadAlign(mode).apply(model, ctx)  # type: ignore[arg-type]
    assert fingerprint(model) == once
    assert ctx.rewrites == {}


@pytest.mark.parametrize("mode", ["resize", "pad"])
@pytest.mark.parametrize("clean", [False, True], ids=["raw", "cleaned"])
def test_a_fresh_export_has_nothing_to_align(mode: str, clean: bool) -> None:
    model = adopted.load("fresh23")
    if clean:
        Clean().apply(model, PassContext(model))
    before, ctx = fingerprint(model), PassContext(model)
    PadAlign(mode).apply(model, ctx)  # type: ignore[arg-type]
    assert fingerprint(model) == before
    assert ctx.rewrites == {}
    assert ctx.skips == []


def test_a_fresh_export_is_cropped_to_the_sizes_it_resizes_to() -> None:
    model, resized = adopted.load("fresh23"), adopted.session(adopted.load("fresh23"))
    ctx = PassContext(model)
    PadAlign("crop").apply(model, ctx)
    assert (ctx.rewrites, ctx.skips) == ({"upsampler": 3}, [])
    cropped = adopted.session(model)
    for height, width in SOME:
        inputs = adopted.feeds(height, width)
        np.testing.assert_array_equal(cropped.run(None, inputs)[0], resized.run(None, inputs)[0])


def test_padding_is_pytorch_on_the_padded_latent() -> None:
    session = adopted.session(aligned("dynamo23", "pad"))
    for height, width in SOME:
        inputs = adopted.feeds(height, width)
        found = session.run(None, inputs)[0]
        margin = [(0, 0), (0, 0), (0, -height % 8), (0, -width % 8)]
        padded = {**inputs, "sample": np.pad(inputs["sample"], margin, mode="edge")}
        wanted = adopted.torch_unet(padded)[:, :, :height, :width]
        assert adopted.distance(found, wanted) <= FP32_REASSOCIATED
    # It is a function of its own: 13x23 is nowhere near what the network makes of 13x23.
    found = session.run(None, adopted.feeds(13, 23))[0]
    assert adopted.distance(found, adopted.answer(13, 23)) > 0.05


def test_batch_and_tokens_stay_free() -> None:
    for variant in ("torchscript17", "dynamo23+"):
        session = adopted.session(aligned(variant))
        inputs = adopted.feeds(11, 18, batch=3)
        found = session.run(None, inputs)[0]
        assert adopted.distance(found, adopted.torch_unet(inputs)) <= FP32_REASSOCIATED


def test_a_half_precision_unet() -> None:
    model = adopted.load("torchscript17-half")
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT16
    PadAlign().apply(model, PassContext(model))
    session = adopted.session(model)
    for size in SOME:
        inputs = {k: v.astype(np.float16) for k, v in adopted.feeds(*size).items()}
        (found,) = session.run(None, inputs)
        assert found.dtype == np.float16
        assert adopted.distance(found, adopted.answer(*size)) <= HALF["float16"]


@pytest.mark.parametrize("component", ["vae_decoder", "text_encoder"])
def test_other_components_stay_as_they_are(component: str) -> None:
    model = adopted.load(component)
    before, ctx = fingerprint(model), PassContext(model)
    PadAlign().apply(model, ctx)
    assert fingerprint(model) == before
    assert ctx.skips == []
    if component == "vae_decoder":
        assert graph.op_counts(model)["Resize"] > 0
