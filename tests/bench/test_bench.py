"""``bench`` on toy bundles: which rows, what they are fed, and what is said of planted times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt import api
from sdopt.bench import BenchReport, bench, benching, components, feeds, images
from sdopt.bench.rows import Contestant, contestants, plan_of, replaces_steps
from sdopt.bench.settings import Settings
from sdopt.bench.timing import Turns
from sdopt.bundle import Bundle
from sdopt.companions import Entry, Plan
from sdopt.errors import (
    BuildError,
    MissingDependencyError,
    SdoptError,
    UnknownNameError,
    UsageError,
)
from sdopt.runtime import session
from sdopt.session import Port
from tests.bench.planted import TICK, Clock, Slow
from tests.runtime import toy
from tests.runtime.test_scheduled import FILE, scheduled
from tests.test_bundle import make_bundle

QUICK: dict[str, Any] = {"rounds": 2, "warm_up": 1, "pause": 0.0, "memory": False}
SMALL: dict[str, Any] = {**QUICK, "image_rounds": 2, "steps": 3, "shapes": "24x32"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a raw, an optimized and a built stage; to look at only."""
    made = toy.bundle(tmp_path_factory.mktemp("bench") / "bundle")
    for name in made.components:
        toy.restage(made, name, "optimized")
        toy.restage(made, name, "ort_cpu")
    toy.restage(made, "unet", "other")
    return made


def row(bundle: Bundle, stage: str, target: Slow, label: str = "") -> Contestant:
    stages = {name: bundle.stage(name, stage) for name in bundle.components}
    return Contestant(label or stage, stage, "slow", target, stages)


def quiet(what: str, share: float) -> None:
    assert what
    assert 0 <= share <= 1


# Which rows


def test_the_usual_rows_are_raw_optimized_and_built(whole: Bundle) -> None:
    found = contestants(whole, [], ["ort"], whole.components)
    assert [one.label for one in found] == ["model", "optimized", "ort_cpu"]
    assert all(one.text == "ort" for one in found)
    assert found[2].stages["unet"].digest == whole.stage("unet", "ort_cpu").digest


def test_a_row_is_a_stage_on_a_target(whole: Bundle) -> None:
    targets = ["ort:threads=1", "ort:threads=2"]
    found = contestants(whole, ["other", "model"], targets, whole.components)
    assert [one.label for one in found] == [
        f"{stage} on {target}" for target in targets for stage in ("other", "model")
    ]
    assert [*found[0].stages] == ["unet"]
    assert [*found[1].stages] == [*whole.components]


def test_a_compiled_target_runs_its_build_and_no_other_stage(
    whole: Bundle, tmp_path: Path
) -> None:
    made = toy.bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="nothing was built for onnx_engine"):
        _with_engine(made, ["model"])
    toy.restage(made, "unet", "engine")
    found = _with_engine(made, ["model"])
    wanted = [("model", "ort"), ("engine", "onnx_engine")]
    assert [(one.stage, one.text) for one in found] == wanted
    assert [(one.stage, one.text) for one in _with_engine(made, [])] == wanted
    with pytest.raises(UsageError, match="none of the targets runs the stage 'model'"):
        _with_engine(made, ["model"], "onnx_engine")


def test_an_engine_that_cannot_run_here_says_so_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = toy.bundle(tmp_path / "b")
    toy.restage(made, "unet", "trt_rtx_fp16")
    options = {**QUICK, "targets": "trt_rtx:dtype=fp16", "components": ["unet"]}
    with pytest.raises(UsageError, match="there is no engine here"):
        bench(made, **options)
    made.file("unet", "trt_rtx_fp16").with_suffix(".plan").write_bytes(b"no engine")
    with pytest.raises((BuildError, MissingDependencyError)) as caught:
        bench(made, **options)
    assert caught.value.hint


class Engine(Slow):
    """A target with a compiler."""

    compiled = True

    def stage_name(self) -> str:
        return "engine"


def _with_engine(bundle: Bundle, stages: list[str], *targets: str) -> list[Contestant]:
    with pytest.MonkeyPatch.context() as patch:
        known = {"ort": session.opener("ort"), "onnx_engine": Engine()}
        patch.setattr("sdopt.bench.rows.opener", known.__getitem__)
        return contestants(bundle, stages, targets or [*known], bundle.components)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"stages": ["optimised"]}, UnknownNameError, "optimized"),
        ({"stages": ["ort_cuda"]}, UnknownNameError, "no component has a stage 'ort_cuda'"),
        ({"targets": ["tensort"]}, UnknownNameError, "tensort"),
        ({"targets": []}, UsageError, "no target"),
        ({"components": ["unnet"]}, UnknownNameError, "unet"),
        ({"targets": "ort:provider=cuda"}, SdoptError, "onnxruntime-gpu"),
        ({"shapes": "64x64,32x32"}, UsageError, "one size at a time"),
        ({"shapes": "64x64..128x128"}, UsageError, "one size at a time"),
        ({"dims": {"tokens": 4}}, UsageError, "no input has a dimension tokens"),
        ({"rounds": 0}, UsageError, "rounds must be 1 or more"),
        ({"pause": -1.0}, UsageError, "pause"),
        ({"prompts": []}, UsageError, "no prompt"),
        ({"recorded": "nowhere"}, SdoptError, "no recorded samples"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    whole: Bundle, options: dict[str, Any], kind: type[SdoptError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bench(whole, **(SMALL | options))


def test_images_of_a_bundle_that_draws_none(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match=r"there is no model_index.json"):
        bench(made, **QUICK, images=True)
    found = bench(made, **QUICK)
    assert found.images is None
    assert "whole images were not timed: there is no model_index.json" in found.notes[0]


@pytest.mark.parametrize("missing", ["vae_decoder", "text_encoder"])
def test_images_need_every_part(tmp_path: Path, missing: str) -> None:
    made = toy.bundle(tmp_path / "b", without=(missing,))
    assert images.cannot_draw(made) == f"there is no {missing}"


# Components


def measure(
    bundle: Bundle, clock: Clock, rows: list[Contestant], **options: Any
) -> components.ComponentBench:
    settings = Settings(**{"shapes": "24x32", **options})
    turns = Turns(2, 1, 0.25, clock, lambda seconds: None)
    return components.measure(bundle, "unet", rows, settings, turns, quiet)


def test_planted_durations_are_what_is_reported(whole: Bundle) -> None:
    clock = Clock()
    slow = Slow(clock, {"unet": [8.0, 2.0, 4.0]})
    fast = Slow(clock, {"unet": [9.0, 1.0, 1.0]})
    found = measure(whole, clock, [row(whole, "model", slow), row(whole, "optimized", fast)])
    assert [one.row for one in found.rows] == ["model", "optimized"]
    assert [one.warm_up for one in found.rows] == [(8000.0,), (9000.0,)]
    assert [one.rounds for one in found.rows] == [(2000.0, 4000.0), (1000.0, 1000.0)]
    assert [one.calls for one in found.rows] == [{"main": 2}] * 2
    assert found.reference == "model"
    assert found.ratio(found.rows[0]).p50 == 1.0
    ratio = found.ratio(found.rows[1])
    assert (ratio.p50, ratio.of_totals) == (0.375, 2 / 6)
    assert found.throughput(found.rows[0]) == pytest.approx(1 / 3)


def test_seeded_feeds_are_of_the_asked_for_sizes_and_the_same_for_all(whole: Bundle) -> None:
    clock = Clock()
    targets = [Slow(clock, {"unet": itertools.repeat(1.0)}) for _ in range(2)]
    rows = [
        row(whole, name, one) for name, one in zip(("model", "optimized"), targets, strict=True)
    ]
    found = measure(whole, clock, rows, batch=3, seed=5)
    assert found.shapes == {
        "sample": (6, 4, 3, 4),
        "timestep": (),
        "encoder_hidden_states": (6, 77, 8),
    }
    assert found.feeds == "seeded: seed 5"
    fed = [target.opened[0].fed for target in targets]
    assert [len(one) for one in fed] == [3, 3]
    for name, array in fed[0][0].items():
        np.testing.assert_array_equal(array, fed[1][2][name])
    half = measure(whole, clock, rows, batch=3, guidance=1.0)
    assert half.shapes["sample"] == (3, 4, 3, 4)


def test_recorded_samples_are_fed_in_turn(whole: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    made = api.record(whole.path, ["a seven"], output=folder, steps=3, keep=3, width=40, height=16)
    wanted = [made.load(one) for one in made.samples if one.component == "unet"]
    assert len(wanted) == 3
    clock = Clock()
    target = Slow(clock, {"unet": itertools.repeat(1.0)})
    found = measure(whole, clock, [row(whole, "model", target)], recorded=str(folder), shapes="")
    assert found.feeds == f"recorded: 3 samples of {folder}"
    assert found.shapes["sample"] == (2, 4, 2, 5)
    for fed, sample in zip(target.opened[0].fed, wanted, strict=True):
        for name, array in sample.items():
            np.testing.assert_array_equal(fed[name], array)
    assert Settings(recorded=str(folder)).size(whole) == (16, 40)
    report = bench(whole, **QUICK, recorded=folder, stages=["model"], images=False)
    notes = [note for note in report.notes if "recorded" in note]
    assert notes == ["vae_encoder: nothing was recorded for it, it is fed seeded inputs"]
    assert {one.component: one.feeds.split(":")[0] for one in report.components} == {
        **dict.fromkeys(whole.components, "recorded"),
        "vae_encoder": "seeded",
    }
    with pytest.raises(UsageError, match="nothing was recorded for vae_encoder"):
        bench(whole, **QUICK, recorded=folder, components=["vae_encoder"])


def test_seeded_feeds_have_the_shapes_of_a_run(whole: Bundle, tmp_path: Path) -> None:
    made = api.record(
        whole.path, ["a seven"], output=tmp_path / "recorded", steps=1, width=40, height=16
    )
    wanted = {
        one.component: {name: shape for name, (_, shape) in one.inputs.items()}
        for one in made.samples
    }
    options = {**QUICK, "shapes": "16x40", "stages": ["model"], "images": False}
    found = {one.component: one.shapes for one in bench(whole, **options).components}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(("component", "tokens"), [("transformer", 333), ("text_encoder_3", 256)])
def test_t5_has_more_tokens_than_clip(tmp_path: Path, component: str, tokens: int) -> None:
    """As diffusers' StableDiffusion3Pipeline gives them, which ``record`` shows."""
    made = make_bundle(tmp_path / "b", (component,))
    ports = {"x": Port(np.dtype(np.float32), ("batch_size", "sequence_length", 4))}
    stage = made.stage(component, "model")
    found = feeds.make(made, stage, ports, Settings(), steps=False)
    assert found.samples[0]["x"].shape == (2, tokens, 4)


def test_where_steps_differ_a_round_is_a_whole_run_of_them(
    whole: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((), (), (Entry("s", "every=3", FILE.format("s"), (), ()),), {}, "t", ())
    assert replaces_steps(plan)
    assert not replaces_steps(None)
    monkeypatch.setattr(components, "plan_of", lambda stage: plan)
    clock = Clock()
    target = Slow(clock, {"unet": itertools.repeat(1.0)})
    found = measure(whole, clock, [row(whole, "model", target)], steps=6)
    assert found.calls_per_round == 6
    assert found.feeds == "seeded: seed 0, 6 timesteps"
    times = [float(one["timestep"]) for one in target.opened[0].fed]
    assert times == sorted(times[:6], reverse=True) * 3
    assert found.rows[0].rounds == (1000.0, 1000.0), "of one call, not of six"
    assert found.rows[0].calls == {"main": 12}


def test_a_run_of_steps_computes_full_and_shallow_ones() -> None:
    both, _ = scheduled("every=3")
    samples = [
        {
            "sample": np.ones((2, 2), np.float32),
            "time": np.array(time, np.float32),
            "text": np.ones((2, 3), np.float32),
        }
        for time in (900, 600, 300, 100)
    ]
    calls = components.Calls(both, samples, 4)
    calls.run(0)
    calls.settle()  # its timestep is the lowest: what follows is a new run, whatever it did
    calls.run(1)
    assert [dict(one) for one in calls.laps] == [
        {"main": 2, "shallow": 2, "prompt": 1, "step": 4},
        {"main": 2, "shallow": 2},
    ]


def test_a_real_hoisted_stage_has_a_plan(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "b")
    api.optimize(made.path, "hoist", components=["unet"])
    stage = made.stage("unet", "optimized")
    assert not replaces_steps(plan_of(stage))
    found = bench(made, **SMALL, stages=["model", "optimized"])
    assert found.components[1].calls_per_round == 1
    assert any("kept between" in note for note in found.notes)
    assert any(
        note == "text_encoder has no stage of optimized; ratios are to model"
        for note in found.notes
    )
    assert found.images is not None
    # Two images of three steps, each of another prompt, on which here every graph depends: the
    # companions' calls are the component's too.
    assert [one.calls["unet"] for one in found.images.rows] == [6, 6 + 2 + 6]
    assert found.images.stages["optimized"]["text_encoder"] == "model"


# Whole images


def planted_images(
    whole: Bundle, batch: int = 1, tick: float = TICK, **options: Any
) -> images.ImageBench:
    clock = Clock(tick)
    seconds = {
        name: itertools.repeat(value)
        for name, value in (("text_encoder", 1.0), ("unet", 4.0), ("vae_decoder", 2.0))
    }
    rows = [
        row(whole, "model", Slow(clock, seconds)),
        row(whole, "optimized", Slow(clock, seconds)),
    ]
    settings = Settings(steps=3, shapes="24x32", batch=batch, scheduler="ddim", **options)
    turns = Turns(2, 1, 0.0, clock, lambda _: None)
    return images.measure(whole, rows, settings, turns, quiet)


def test_the_parts_of_an_image_sum_to_the_whole(whole: Bundle) -> None:
    found = planted_images(whole)
    for one in found.rows:
        parts = found.breakdown(one)
        # Prompt and negative prompt, three steps, one decoding; each timed call takes a tick.
        assert parts == {
            "text_encoder": 2 * (1.0 + TICK),
            "unet": 3 * (4.0 + TICK),
            "vae_decoder": 2.0 + TICK,
            "host": 7 * TICK,  # the ticks between the calls, and the last one
        }
        assert sum(parts.values()) == one.spread.mean == 16.0 + 13 * TICK
        assert found.calls_per_image(one) == {"text_encoder": 2, "unet": 3, "vae_decoder": 1}
        assert len(one.warm_up) == 1
        assert len(one.inside) == len(one.rounds) == 2
    assert (found.width, found.height, found.scheduler) == (32, 24, "DDIMScheduler")


def test_a_batch_is_divided_among_its_images(whole: Bundle) -> None:
    found = planted_images(whole, batch=4, tick=0.0)
    (one, _) = found.rows
    assert one.rounds == (4.0, 4.0)
    assert found.throughput(one) == 0.25
    assert found.breakdown(one)["unet"] == 3.0
    assert found.calls_per_image(one)["unet"] == 0.75


def test_prompts_are_drawn_in_turn_and_rows_draw_the_same(
    whole: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], int]] = []
    real = images.generate

    def spy(bundle: Bundle, prompts: list[str], **options: Any) -> Any:
        asked.append((prompts, options["seed"]))
        return real(bundle, prompts, **options)

    monkeypatch.setattr(images, "generate", spy)
    planted_images(whole, batch=2, prompts=("a one", "a two"), seed=9)
    assert asked == [(["a one", "a one", "a two", "a two", "a one", "a one"], 9)] * 2


# The report


@pytest.fixture(scope="module")
def found(whole: Bundle) -> BenchReport:
    return bench(whole, **SMALL, command="sdopt bench it")


def test_everything_is_measured_and_said(whole: Bundle, found: BenchReport) -> None:
    assert [one.label for one in found.rows] == ["model", "optimized", "ort_cpu"]
    assert [one.component for one in found.components] == [*whole.components]
    assert found.images is not None
    assert [one.row for one in found.images.rows] == ["model", "optimized", "ort_cpu"]
    assert found.rows[0].digests["unet"] == whole.stage("unet", "model").digest
    assert found.machine.versions["onnxruntime"]
    assert found.machine.usable_cores >= 1
    assert found.command == "sdopt bench it"
    assert found.settings["steps"] == 3
    for table in (*found.components, found.images):
        for one in table.rows:
            assert one.load_seconds > 0
            assert all(value > 0 for value in one.rounds)


def test_json_is_stable_on_its_way_through_a_file(found: BenchReport) -> None:
    text = json.dumps(found.to_json())
    again = BenchReport.from_json(json.loads(text))
    assert again == found
    assert json.dumps(again.to_json()) == text
    assert again.row("model").stage == "model"


def test_what_is_no_report_is_refused(found: BenchReport) -> None:
    data = found.to_json()
    for broken, message in (
        ({}, "no report"),
        ({**data, "kind": "eval"}, "no report"),
        ({**data, "schema": 99}, "newer"),
        ({name: value for name, value in data.items() if name != "machine"}, "not whole"),
        ({**data, "components": [{"rows": []}]}, "not whole"),
    ):
        with pytest.raises(UsageError, match=message):
            BenchReport.from_json(broken)
    assert BenchReport.from_json({**data, "later": 1}) == found


def test_a_stale_stage_and_noise_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toy.bundle(tmp_path / "b")
    toy.restage(made, "unet", "optimized", source="f" * 16)

    def loud(*args: Any) -> Turns:
        clock = itertools.accumulate(itertools.cycle((0.0, 1.0, 0.0, 1.0, 0.0, 9.0)))
        return Turns(*args[:3], clock=clock.__next__)

    monkeypatch.setattr(benching, "Turns", loud)
    found = bench(made, **(QUICK | {"rounds": 3}), components=["unet"], stages=["optimized"])
    assert found.notes[0] == "unet: the stage optimized is stale: its source has changed since"
    assert found.notes[1].startswith("noisy: unet of optimized has a p95 of")
    assert found.images is None
