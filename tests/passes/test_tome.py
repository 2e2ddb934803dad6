"""``tome`` against the package tomesd, on sizes odd and even, and what it leaves alone."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sdopt import graph, spec
from sdopt.errors import SpecError
from sdopt.passes._self_attention import find
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.passes.fuse_qkv import FuseQkv
from sdopt.passes.tome import Tome
from sdopt.pipeline import Pipeline, RunContext
from tests.passes import tome_blocks as blocks
from tests.passes import tome_reference as ref
from tests.passes.denoiser import denoiser

TIGHT = 5e-6


@functools.cache
def _merged(count: int, ratio: float, fused: str) -> tuple[ort.InferenceSession, list[str]]:
    """The merged UNet with an output after each self-attention at the highest resolution."""
    model = ref.exported()
    ctx = ref.context(model)
    ends = [site.residual.outputs[0] for site in find(model)[0] if site.level == 0]
    if fused == "before":
        FuseQkv().apply(model, ctx)
    Tome(count, ratio).apply(model, ctx)
    if fused == "after":
        FuseQkv().apply(model, ctx)
    assert ctx.rewrites["self_attention"] == count
    assert fused == "never" or ctx.rewrites["self_attention_qkv"] == 11
    model.graph.outputs.extend(ends)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return ref.session(model), [end.name or "" for end in ends]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (13, 23)], ids="{0[0]}x{0[1]}".format)
def test_equals_tomesd_at_every_size(monkeypatch, size, batch):
    _compare(monkeypatch, (batch, *size), 5, 0.5, "never")


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_equals_tomesd_at_every_count_and_ratio(monkeypatch, count, ratio):
    _compare(monkeypatch, (2, 11, 14), count, ratio, "never")


@pytest.mark.parametrize("fused", ["before", "after"])
@pytest.mark.parametrize("size", [(12, 10), (13, 23)], ids="{0[0]}x{0[1]}".format)
def test_equals_tomesd_around_fused_projections(monkeypatch, size, fused):
    _compare(monkeypatch, (2, *size), 5, 0.5, fused)


def test_all_sources_of_an_even_map_merge_at_the_largest_ratio(monkeypatch):
    _compare(monkeypatch, (2, 8, 10), 5, 0.75, "never")


def _compare(monkeypatch, size, count, ratio, fused):
    drawn = ref.slots(*size[1:])
    feed, want = ref.well_posed(monkeypatch, size, count, ratio, drawn)
    session, names = _merged(count, ratio, fused)
    out, *after = session.run(["out_sample", *names], feed)
    for got, expected in zip(after, want.blocks, strict=True):
        assert ref.distance(got, expected) <= TIGHT
    assert ref.distance(out, want.out) <= TIGHT


def test_another_destination_grid_is_seen_by_the_comparison(monkeypatch):
    drawn = ref.slots(13, 23)
    feed = ref.inputs(2, 13, 23)
    other = ref.reference(monkeypatch, feed, 5, 0.5, (drawn + 1) % 4)
    (out,) = _merged(5, 0.5, "never")[0].run(["out_sample"], feed)
    assert ref.distance(out, other.out) > 1e-3


def test_a_sum_in_place_of_the_mean_is_seen_by_the_comparison(monkeypatch):
    model = ref.exported()
    Tome(5).apply(model, ref.context(model))
    means = [
        node
        for node in model.graph
        if node.op_type == "Div" and graph.producer(node.inputs[1], "Add") is not None
        and graph.module_path(node).endswith(".tome")
        and graph.producer(node.inputs[1].producer().inputs[0], "ReduceSum") is not None
    ]  # fmt: skip
    assert len(means) == 5
    for node in means:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
    feed = ref.inputs(2, 13, 23)
    want = ref.reference(monkeypatch, feed, 5, 0.5, ref.slots(13, 23))
    (out,) = ref.session(model).run(["out_sample"], feed)
    assert ref.distance(out, want.out) > 1e-3


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("size", [(2, 2), (8, 8), (9, 8), (8, 9), (13, 23)])
def test_partition_is_one_destination_per_cell_and_the_rest(size, seed):
    height, width = size
    part = ref.run_partition(height, width, seed=seed)
    sources, destinations = part["sources"], part["destinations"]
    cells = [
        (row // 2, col // 2) for row, col in zip(*np.divmod(destinations, width), strict=True)
    ]
    assert cells == [(i, j) for i in range(height // 2) for j in range(width // 2)]
    assert sorted([*sources, *destinations]) == list(range(height * width))
    both = np.concatenate([sources, destinations])
    assert (both[part["order"]] == np.arange(height * width)).all()
    assert part["kept"] == len(sources) - height * width // 2


def test_destinations_are_spread_evenly_and_without_pattern():
    drawn = ref.slots(128, 128)[..., 0]
    assert np.allclose(np.bincount(drawn.reshape(-1)) / drawn.size, 0.25, atol=0.03)
    for axis in (0, 1):
        for step in (1, 2, 3):
            same = (drawn == np.roll(drawn, step, axis)).mean()
            assert abs(same - 0.25) < 0.04


def test_index_arithmetic_stays_in_int32_at_4096_pixels():
    values = ref.run_partition(512, 511)["all"]
    assert max(np.abs(array).max(initial=0) for array in values.values()) < 2**31


def test_only_operators_that_every_backend_takes():
    model = ref.exported()
    before = ref.op_types(model)
    Tome(5).apply(model, ref.context(model))
    assert ref.op_types(model) - before == {
        *("Equal", "Gather", "GreaterOrEqual", "Less", "Min", "Max", "Mod"),
        *("ReduceL2", "ReduceSum", "ScatterElements", "Sub", "TopK", "Where"),
    }
    scatters = [node for node in model.graph if node.op_type == "ScatterElements"]
    assert len(scatters) == 6
    assert all(graph.attribute(node, "reduction", "none") == "none" for node in scatters)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_image():
    def build(seed: int | None, run_seed: int = 0) -> bytes:
        model = ref.exported()
        Tome(5, seed=seed).apply(model, ref.context(model, run_seed))
        return ir.to_proto(model).SerializeToString()

    first, other = build(3), build(4)
    assert first == build(3) == build(None, run_seed=3)
    feed = ref.inputs(1, 12, 12)
    images = [ref.session(ref.load(data)).run(None, feed)[0] for data in (first, other)]
    assert ref.distance(*images) > 1e-3


def test_ratio_zero_is_the_raw_graph():
    model, raw = ref.exported(), ref.exported()
    ctx = ref.context(model)
    Tome(5, ratio=0).apply(model, ctx)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(raw).SerializeToString()
    assert ctx.rewrites == {}
    assert ctx.notes == ["ratio=0 merges no tokens: the graph is unchanged"]


def test_says_what_it_left_and_that_there_were_fewer():
    model = ref.exported()
    ctx = ref.context(model)
    Tome(9).apply(model, ctx)
    assert ctx.rewrites == {"self_attention": 5}
    assert ctx.notes == [
        "asked for 9 self-attentions, merged 5: no more at the highest resolution"
    ]
    reasons = [skip.reason for skip in ctx.skips]
    assert reasons.count("its keys or values come from another input than its queries") == 11
    assert reasons.count("its resolution is 1/2 of the highest") == 6
    assert len(reasons) == 17


def test_takes_the_first_blocks_in_graph_order():
    model = ref.exported()
    ctx = ref.context(model)
    sites = [site for site in find(model)[0] if site.level == 0]
    Tome(3).apply(model, ctx)
    merged = [site.residual.inputs[site.branch].producer().op_type == "Gather" for site in sites]
    assert merged == [True, True, True, False, False]
    assert sum(skip.reason == "it comes after the first 3" for skip in ctx.skips) == 2


def test_options_round_trip_and_are_checked():
    assert str(Tome(5)) == "tome=5"
    text = "tome=2:ratio=0.25:seed=9"
    assert str(spec.bind(Tome, spec.parse(text)[0])) == text
    for bad in ("tome", "tome=0", "tome=5:ratio=0.8", "tome=5:ratio=-0.1", "tome=x"):
        with pytest.raises(SpecError):
            spec.bind(Tome, spec.parse(bad)[0])


@pytest.mark.parametrize("form", blocks.FORMS)
def test_takes_every_form_of_the_block(form):
    """Each spelling of one block gives what the first gives, merged."""
    feed = blocks.feed(2, 10, 9)
    plain, written = blocks.model(), blocks.model(**blocks.FORMS[form])
    (unmerged,) = ref.session(written).run(None, feed)
    for one in (plain, written):
        ctx = ref.context(one)
        Tome(1).apply(one, ctx)
        assert ctx.rewrites == {"self_attention": 1}, ctx.skips
        onnx.checker.check_model(ir.to_proto(one), full_check=True)
    (want,), (got,) = (ref.session(one).run(None, feed) for one in (plain, written))
    assert ref.distance(got, want) <= TIGHT
    assert ref.distance(got, unmerged) > 1e-3


@pytest.mark.parametrize("miss", blocks.NEAR_MISSES)
def test_leaves_alone(miss):
    changes, reason = blocks.NEAR_MISSES[miss]
    model = blocks.model(**changes)
    before = ir.to_proto(model).SerializeToString()
    ctx = ref.context(model)
    Tome(1).apply(model, ctx)
    assert ir.to_proto(model).SerializeToString() == before
    assert [(skip.reason, skip.where) for skip in ctx.skips] == [(reason, "attend")]
    assert ctx.rewrites == {}
    assert len(ctx.notes) == 1


def test_fp16_decides_as_fp32_does():
    """Only rounding of the values themselves is left between the types, not other matches."""
    feed = blocks.feed(2, 13, 12)
    half, full = (blocks.model(kind=kind, weights_from="FLOAT16") for kind in ("FLOAT16", "FLOAT"))
    for model in (half, full):
        Tome(1).apply(model, ref.context(model))
    halved = {name: array.astype(np.float16) for name, array in feed.items()}
    widened = {name: array.astype(np.float32) for name, array in halved.items()}
    (got,), (want,) = ref.session(half).run(None, halved), ref.session(full).run(None, widened)
    assert ref.distance(got, want) < 2e-3


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16"])
def test_thousands_of_equal_tokens_have_a_finite_mean(kind):
    """A flat image merges all into one destination: sums beyond fp16, counts beyond 2048."""
    dtype = np.float32 if kind == "FLOAT" else np.float16
    feed = {"sample": np.full((1, 4, 80, 80), 3, dtype)}
    raw, merged = (blocks.model(kind=kind, norm_scale=20, pointwise=True) for _ in range(2))
    Tome(1).apply(merged, ref.context(merged))
    (want,), (got,) = (ref.session(model).run(None, feed) for model in (raw, merged))
    assert np.isfinite(got).all()
    assert ref.distance(got, want) < (1e-5 if kind == "FLOAT" else 2e-3)


def test_a_later_cast_leaves_similarities_and_means_in_fp32():
    feed = {"sample": np.full((1, 4, 80, 80), 3, np.float16)}
    raw, merged = (blocks.model(norm_scale=20, pointwise=True) for _ in range(2))
    Tome(1).apply(merged, ref.context(merged))
    for model in (raw, merged):
        CastFp16().apply(model, ref.context(model))
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    (want,), (got,) = (ref.session(model).run(None, feed) for model in (raw, merged))
    assert np.isfinite(got).all()
    assert ref.distance(got, want) < 2e-3


def test_a_token_of_zeros_gives_no_nan():
    feed = {"sample": np.zeros((1, 4, 8, 8), np.float32)}
    model = blocks.model(map_bias=False)
    Tome(1).apply(model, ref.context(model))
    assert np.isfinite(ref.session(model).run(None, feed)[0]).all()


@pytest.mark.parametrize(("spec", "reads"), [("tome=1", ("seed 3",)), ("tome=1:seed=2", ())])
def test_the_runs_seed_is_in_the_history_where_it_decides(
    spec: str, reads: tuple[str, ...]
) -> None:
    """So that ``compare`` takes two stages of different seeds for two."""
    (report,) = Pipeline.parse(spec).run(denoiser(), RunContext(seed=3))
    assert report.reads == reads
