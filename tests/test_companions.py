"""Companions on disk: written, found, checked, packed, removed and rebuilt with their stage."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, companions, modelfile
from sdopt.bundle import MANIFEST, RAW, Bundle
from sdopt.companions import PLAN_KEY, Plan, Schedule
from sdopt.errors import BundleError, PassError, SdoptError, UsageError
from sdopt.manifest import ComponentEntry, StageRecord
from sdopt.passes.base import Interface, Numerics, Pass, PassContext, Reach
from sdopt.pipeline import Pipeline, RunContext
from sdopt.runtime.scheduled import open_stage
from sdopt.targets.ort import Ort
from tests.passes.denoiser import denoiser, feeds
from tests.toolkit import model_of, run

ALL = "hoist,deep_cache=2"
"""Passes that make every kind of companion."""


def make_bundle(root: Path) -> Bundle:
    """A bundle with the small denoiser."""
    bundle = Bundle.create(root, "toy", "test", {"unet": ComponentEntry("unet", "denoiser")}, "0")
    record = StageRecord("unet", "denoiser", RAW, "", "f" * 8, "toy", "test", "float32", "k")
    with bundle.lock():
        bundle.commit(denoiser(), record)
        bundle.write_manifest()
    return bundle


def files(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def out(path: Path) -> np.ndarray:
    """What a stage computes, companions and all, without onnxruntime's own rewrites."""
    session = open_stage(Ort(threads=1), path, optimize=False)
    return session.run(feeds())["out_sample"]


WANTED = run(denoiser(), feeds())[0]


def test_they_lie_beside_their_stage_and_are_no_stages(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    report = api.optimize(tmp_path, ALL)
    assert bundle.stages("unet") == (RAW, "optimized")
    names = [name.split("-")[1] for name in files(tmp_path / "unet", "optimized-*.onnx")]
    assert names == ["prompt", "shallow", "step"]
    assert report.components[0].bytes_written == 0
    assert files(tmp_path / "unet", "*_data") == files(tmp_path / "unet", "model-*_data")
    np.testing.assert_array_equal(out(bundle.file("unet", "optimized")), WANTED)


def test_a_weight_that_two_graphs_hold_is_written_once(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    (raw,) = (tmp_path / "unet").glob("model-*_data")
    report = api.optimize(tmp_path, "deep_cache=2:cut=1,cast_fp16")
    (half,) = (tmp_path / "unet").glob("optimized-*_data")
    assert report.components[0].bytes_written == half.stat().st_size < raw.stat().st_size / 1.5
    model = modelfile.load(tmp_path / "unet" / "optimized.onnx")
    places: dict[str, list[tuple[str, int]]] = {}
    for one in companions.family(model):
        for value in modelfile.initializers(one):
            if isinstance(value.const_value, ir.ExternalTensor):
                place = (str(value.const_value.location), value.const_value.offset or 0)
                places.setdefault(value.name or "", []).append(place)
    assert len(places["k_up.float16"]) == 2
    assert all(len(set(found)) == 1 for found in places.values())


def test_the_digest_covers_them_and_the_same_again_is_up_to_date(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "hoist")
    first = bundle.stage("unet", "optimized").digest
    assert api.optimize(tmp_path, "hoist").components[0].up_to_date
    plan = json.loads(modelfile.metadata(bundle.file("unet", "optimized"))[PLAN_KEY])
    assert {one["file"] for one in plan["graphs"]} == set(files(bundle.folder("unet"), "*-*.onnx"))
    model = bundle.stage("unet", "optimized").load()
    kernel = companions.graphs(model)["prompt"].graph.initializers["w_kv"]
    kernel.const_value = ir.tensor(np.zeros((24, 16), np.float32), name="w_kv")
    with bundle.lock():
        changed, _ = bundle.commit(model, bundle.stage("unet", "optimized").record)
    assert changed.digest != first


def test_those_of_a_former_stage_are_removed(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    api.optimize(tmp_path, ALL)
    api.optimize(tmp_path, "hoist", stage="other")
    before = set(files(tmp_path / "unet", "other*"))
    api.optimize(tmp_path, "clean")
    assert files(tmp_path / "unet", "optimized*") == ["optimized.onnx", "optimized.report.json"]
    assert set(files(tmp_path / "unet", "other*")) == before
    np.testing.assert_array_equal(out(tmp_path / "unet" / "other.onnx"), WANTED)


def test_a_build_lowers_them_too(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, ALL)
    report = api.build(tmp_path, "ort")
    model = bundle.stage("unet", "ort_cpu").load()
    assert [*companions.graphs(model)] == ["prompt", "step", "shallow"]
    assert report.components[0].nodes == sum(
        len(list(one.graph)) for one in companions.family(model)
    )
    found = out(bundle.file("unet", "ort_cpu"))
    assert np.linalg.norm(found - WANTED) / np.linalg.norm(WANTED) < 5e-6


def test_pack_takes_them_along(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    api.optimize(bundle.path, ALL)
    api.pack(bundle.path, tmp_path / "copy")
    for path in sorted(bundle.path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    copy = Bundle.open(tmp_path / "copy")
    assert copy.stages("unet") == (RAW,)
    assert len(files(tmp_path / "copy" / "unet", "*_data")) == 1
    np.testing.assert_array_equal(out(copy.file("unet", RAW)), WANTED)


def test_inspect_shows_them(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, ALL)
    (_, stage) = api.inspect(tmp_path)["components"]["unet"]["stages"]
    found = {one["name"]: one for one in stage["companions"]}
    assert [(name, one["schedule"]) for name, one in found.items()] == [
        ("prompt", "prompt"), ("step", "step"), ("shallow", "every=2"),
    ]  # fmt: skip
    assert found["prompt"]["ops"] == {"MatMul": 1, "Split": 1}
    assert "companions" in api.inspect(bundle.file("unet", "optimized"))
    assert "companions" not in api.inspect(bundle.file("unet", RAW))


def test_compare_runs_all_of_them_as_one_function(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    api.optimize(tmp_path, "hoist")
    api.optimize(tmp_path, ALL, stage="deep")
    (hoisted,) = api.compare(f"{tmp_path}@optimized", f"{tmp_path}@model").components
    assert (hoisted.verdict, hoisted.allowed) == ("same", 0.0)
    assert set(hoisted.shapes) == {"sample", "timestep", "encoder_hidden_states"}
    (deep,) = api.compare(f"{tmp_path}@deep", f"{tmp_path}@model").components
    assert deep.verdict == "unjudged"
    assert [(one.name, one.max_abs) for one in deep.outputs] == [("out_sample", 0.0)]
    half = api.optimize(tmp_path, "hoist,cast_fp16", stage="half")
    assert half.components[0].passes[1].changed
    (one,) = api.compare(f"{tmp_path}@half", f"{tmp_path}@model").components
    assert (one.verdict, one.dtypes) == ("same", ("float16", "float32"))


def test_a_companion_that_computes_something_else_is_found(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "hoist")
    model = bundle.stage("unet", "optimized").load()
    bias = companions.graphs(model)["step"].graph.initializers["b_time"]
    bias.const_value = ir.tensor(np.ones(8, np.float32), name="b_time")
    with bundle.lock():
        bundle.commit(model, bundle.stage("unet", "optimized").record)
    (one,) = api.compare(f"{tmp_path}@optimized", f"{tmp_path}@model").components
    assert one.verdict == "different"


def test_one_file_in_one_file_and_its_companions_out(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "elsewhere" / "out.onnx"
    ir.save(denoiser(), source)
    api.optimize_file(source, target, ALL)
    assert len(files(target.parent, "out-*.onnx")) == 3
    np.testing.assert_array_equal(out(target), WANTED)
    api.optimize_file(target, tmp_path / "again.onnx", "clean")
    np.testing.assert_array_equal(out(tmp_path / "again.onnx"), WANTED)
    api.optimize_file(source, target, "clean")
    assert files(target.parent, "*.onnx") == ["out.onnx"]


def test_a_lost_manifest_is_rebuilt_without_them(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path).manifest
    api.optimize(tmp_path, ALL)
    (tmp_path / MANIFEST).unlink()
    assert Bundle.open(tmp_path).manifest.components == manifest.components


def test_a_missing_companion_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "hoist")
    (path,) = (tmp_path / "unet").glob("optimized-step-*.onnx")
    path.unlink()
    with pytest.raises(BundleError, match="companion 'step' of a graph is missing") as caught:
        bundle.stage("unet", "optimized").load()
    assert path.name in str(caught.value)
    with pytest.raises(SdoptError, match="step"):
        open_stage(Ort(), bundle.file("unet", "optimized"))


def test_no_stage_may_be_called_like_a_companion(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    with pytest.raises(UsageError, match="no name for a stage"):
        api.optimize(tmp_path, "clean", stage="optimized-prompt-0123456789ab")


# Plans


def plan(**others: Any) -> str:
    data = {
        "inputs": ["x"], "outputs": ["y"], "sizes": {}, "clock": "", "same": [], "schema": 1,
        "graphs": [{
            "name": "prompt", "schedule": "prompt", "file": "a-prompt-0123456789ab.onnx",
            "takes": ["x"], "gives": ["z"],
        }],
    }  # fmt: skip
    graph = {key: others.pop(key) for key in ("name", "schedule", "file") if key in others}
    data["graphs"][0] |= graph  # type: ignore[index]
    return json.dumps({**data, **others})


def test_a_plan_reads_back() -> None:
    first = Plan.loads(plan(sizes={"b": ["x", 0]}), "here")
    assert Plan.loads(first.dumps(), "here") == first
    assert first.sizes == {"b": ("x", 0)}


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../a-prompt-0123456789ab.onnx"},
        {"file": "/etc/a-prompt-0123456789ab.onnx"},
        {"file": "model.onnx"},
        {"schedule": "sometimes"},
        {"schedule": "every=0"},
        {"schedule": "steps="},
        {"graphs": 3},
        {"sizes": {"b": 1}},
        {"schema": 99},
    ],
)
def test_a_forged_or_newer_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"cannot be read|newer sdopt"):
        Plan.loads(plan(**change), "here")


def test_schedules() -> None:
    assert [step for step in range(7) if Schedule("every=3").replaces(step)] == [1, 2, 4, 5]
    assert [step for step in range(20) if Schedule("steps=1+12").replaces(step)] == [1, 12]
    assert not Schedule("prompt").in_place
    assert not any(map(Schedule("step").replaces, range(5)))


# Between passes


@dataclass(frozen=True)
class Cuts(Pass):
    """A pass that moves a Relu into a companion, right or wrong."""

    numerics: ClassVar[Numerics] = Numerics.EXACT
    interface: ClassVar[Interface] = Interface.CHANGES
    reach: ClassVar[Reach] = Reach.MAIN
    how: str = "right"

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        relu, add = list(model.graph)
        made = ctx.companion("prompt", "prompt")
        assert ctx.companion("prompt", "prompt") is made
        given = ir.Value(name="c", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
        node = ir.node("Relu", [given])
        node.outputs[0].name = "r" if self.how != "name" else "q"
        dtype = ir.DataType.FLOAT
        if self.how == "type":
            node = ir.node("Cast", [given], {"to": int(ir.DataType.FLOAT16)})
            node.outputs[0].name, dtype = "r", ir.DataType.FLOAT16
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape([3])
        made.graph.inputs.append(given)
        made.graph.append(node)
        made.graph.outputs.append(node.outputs[0])
        if self.how == "invalid":
            node.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)
        taken = ir.Value(name="r", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
        add.replace_input_with(1, taken)
        relu.outputs[0].name = "gone"
        model.graph.remove(relu, safe=True)
        model.graph.inputs.remove(model.graph.inputs[1])
        model.graph.inputs.append(taken)


def two_inputs() -> ir.Model:
    return model_of("g (float[3] x, float[3] c) => (float[3] y) { r = Relu(c)\n y = Add(x, r) }")


def test_the_runner_checks_what_goes_between_graphs() -> None:
    model = two_inputs()
    Pipeline((Cuts(),)).run(model, RunContext())
    assert companions.broken_wire(model) is None
    with pytest.raises(PassError, match="broke the graph") as caught:
        Pipeline((Cuts("name"),)).run(two_inputs(), RunContext())
    assert "takes 'r', which nothing gives" in str(caught.value)
    with pytest.raises(PassError, match="broke the graph") as caught:
        Pipeline((Cuts("invalid"),)).run(two_inputs(), RunContext())
    assert "checker says" in str(caught.value)


def test_a_value_that_is_given_in_another_type_is_cast_where_it_is_taken() -> None:
    model = two_inputs()
    Pipeline((Cuts("type"),)).run(model, RunContext())
    assert model.graph.inputs[1].dtype == ir.DataType.FLOAT16
    assert [node.op_type for node in model.graph] == ["Cast", "Add"]
    given = {"x": np.ones(3, np.float32), "r": np.ones(3, np.float16)}
    np.testing.assert_array_equal(run(model, given)[0], np.full(3, 2, np.float32))


def optimize_and_die(root: str, step: int) -> None:
    """Optimize, and die before that step of those that touch the disk."""
    calls = itertools.count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for holder, name in ((os, "replace"), (os, "fsync"), (os, "ftruncate"), (Path, "unlink")):
        setattr(holder, name, dying(getattr(holder, name)))
    api.optimize(root, "hoist,deep_cache=2,cast_fp16:keep=io")


def test_a_kill_at_any_moment_leaves_a_whole_stage(tmp_path: Path) -> None:
    """Die before each step that touches the disk; then the stage before or after is there."""
    bundle = make_bundle(tmp_path)
    processes = multiprocessing.get_context("forkserver")  # it forks from one that runs nothing
    processes.set_forkserver_preload([__name__])
    seen, deaths = set(), 0
    for step in range(1, 60):
        api.optimize(tmp_path, "hoist", force=True)
        child = processes.Process(target=optimize_and_die, args=(str(tmp_path), step))
        child.start()
        child.join()
        stage = Bundle.open(tmp_path).stage("unet", "optimized")
        seen.add(tuple(companions.graphs(stage.load())))
        found = out(stage.path)
        assert np.linalg.norm(found - WANTED) / np.linalg.norm(WANTED) < 5e-3
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        deaths += 1
    assert deaths >= 10
    assert seen == {("prompt", "step"), ("prompt", "step", "shallow")}
    api.optimize(tmp_path, "clean", force=True)
    assert files(tmp_path / "unet", "*.onnx") == ["model.onnx", "optimized.onnx"]
    np.testing.assert_array_equal(out(bundle.file("unet", "optimized")), WANTED)
