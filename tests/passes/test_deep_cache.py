"""``deep_cache``: a full form that gives the feature, a shallow one that takes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import companions, weights
from sdopt.errors import SpecError
from sdopt.passes.deep_cache import DeepCache
from sdopt.pipeline import Pipeline
from tests.passes.companion_runs import outputs, run_all, run_pipeline, same_as
from tests.passes.denoiser import denoiser, feeds
from tests.passes.denoiser import weights as weights_of
from tests.toolkit import leaves, model_of, ops, relative_l2, run


def shallow_of(model: ir.Model) -> ir.Model:
    return companions.graphs(model)["shallow"]


def test_two_forms_that_share_their_weights() -> None:
    model = denoiser()
    before = ops(model)
    (report,) = run_pipeline(model, "deep_cache=3")
    shallow = shallow_of(model)
    assert report.rewrites == {"shallow_graph": 1}
    assert ops(model) == before
    assert [v.name for v in model.graph.outputs] == ["out_sample", "deep_feature"]
    assert ops(shallow) == {
        "Conv": 2, "Gemm": 2, "Mul": 2, "Unsqueeze": 2, "Add": 1, "Concat": 1, "Expand": 1,
        "Reshape": 1, "Shape": 1, "Sigmoid": 1, "Sin": 1,
    }  # fmt: skip
    assert [v.name for v in shallow.graph.inputs] == ["sample", "timestep", "deep_feature"]
    assert report.new_bytes == 0
    for name, value in shallow.graph.initializers.items():
        assert value.const_value is model.graph.initializers[name].const_value
    assert "a shallow step takes" in report.notes[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("batch", "size"), [(2, (6, 10)), (3, (9, 7))])
def test_with_the_feature_of_the_same_step_it_is_the_full_graph(
    dtype: type, batch: int, size: tuple[int, int]
) -> None:
    given = feeds(dtype, batch, size)
    wanted = run(denoiser(dtype), given)[0]
    model = denoiser(dtype)
    run_pipeline(model, "deep_cache=2")
    full = outputs(model, given)
    carried = {"deep_feature": full["deep_feature"]}
    same_as(full["out_sample"], wanted)
    same_as(run_all(model, given, carried), wanted)
    other = {"deep_feature": full["deep_feature"] * 2}
    assert relative_l2(run_all(model, given, other), wanted) > 1e-2


def test_it_composes_with_hoist_and_a_cast() -> None:
    given = {key: value.astype(np.float16) for key, value in feeds().items()}
    model, plain = denoiser(), denoiser()
    run_pipeline(plain, "cast_fp16")
    given["timestep"] = given["timestep"].astype(plain.graph.inputs[1].dtype.numpy())
    run_pipeline(model, "hoist,deep_cache=2,cast_fp16")
    assert [*companions.graphs(model)] == ["prompt", "step", "shallow"]
    assert [v.name for v in shallow_of(model).graph.inputs] == ["early", "sample", "deep_feature"]
    same_as(run_all(model, given), run(plain, given)[0])


def test_a_feature_that_is_given_in_half_is_taken_in_half() -> None:
    """The one node that reads it in the shallow form stays in fp32, what makes it does not."""
    model = denoiser()
    run_pipeline(model, "deep_cache=2,cast_fp16:keep=Concat")
    (taken,) = (v for v in shallow_of(model).graph.inputs if v.name == "deep_feature")
    assert model.graph.outputs[1].dtype == taken.dtype == ir.DataType.FLOAT16
    given = {
        v.name or "": feeds()[v.name or ""].astype(v.dtype.numpy()) for v in model.graph.inputs
    }
    full = outputs(model, given)
    carried = {"deep_feature": full["deep_feature"]}
    same_as(run_all(model, given, carried), full["out_sample"])


def test_a_cast_is_one_recipe_in_both_forms() -> None:
    """So that the weight, which both hold, is written once."""
    model = denoiser()
    run_pipeline(model, "deep_cache=2,cast_fp16")

    def recipes(one: ir.Model) -> set[object]:
        tensors = [v.const_value for v in one.graph.initializers.values()]
        return {weights.identity(t) for t in tensors if isinstance(t, weights.BlockTensor)}

    assert recipes(shallow_of(model))
    assert recipes(shallow_of(model)) < recipes(model)


def test_the_cut_by_level_and_by_module() -> None:
    by_level, by_module = denoiser(), denoiser()
    run_pipeline(by_level, "deep_cache=2:cut=1")
    assert [v.name for v in shallow_of(by_level).graph.inputs] == [
        "sample", "timestep", "deep_feature",
    ]  # fmt: skip
    assert ops(shallow_of(by_level))["Resize"] == 1
    assert "Attention" not in ops(shallow_of(by_level))
    run_pipeline(by_module, "deep_cache=2:cut=up_blocks.0.upsamplers.0.conv")
    plain = denoiser()
    run_pipeline(plain, "deep_cache=2")
    assert ops(shallow_of(by_module)) == ops(shallow_of(plain))
    given = feeds()
    carried = {"deep_feature": outputs(by_level, given)["deep_feature"]}
    np.testing.assert_array_equal(run_all(by_level, given, carried), run(denoiser(), given)[0])


def test_the_schedule_is_a_rhythm_or_a_list() -> None:
    found = []
    for spec in ("deep_cache=3", "deep_cache=0:steps=1+2+5"):
        model = denoiser()
        run_pipeline(model, spec)
        attached = companions.of(model)
        assert attached is not None
        schedule = attached.graphs["shallow"].schedule
        found.append([step for step in range(7) if schedule.replaces(step)])
    assert found == [[1, 2, 4, 5], [1, 2, 5]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("deep_cache=1", "every must be 2 or more"),
        ("deep_cache=0", "every must be 2 or more"),
        ("deep_cache=3:steps=1+2", "give a rhythm"),
        ("deep_cache=0:steps=0+1", "numbers above 0"),
        ("deep_cache=0:steps=1+a", "numbers above 0"),
        ("deep_cache", "needs a value"),
        ("deep_cache=2,hoist", "deep_cache must come after hoist"),
    ],
)
def test_what_was_asked_wrongly(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(spec)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (DeepCache(2, cut="5"), "no join is at cut=5: there are 0, 1"),
        (DeepCache(2, cut="no.such.module"), "names no module"),
        (DeepCache(2, step="sigma"), "no input is known to tell the step"),
    ],
)
def test_what_is_left_alone(one: DeepCache, reason: str) -> None:
    leaves(one, denoiser(), reason)


def test_a_graph_without_skip_connections_is_left() -> None:
    text = """g (float[B,4,H,W] sample, float timestep) => (float[B,8,H,W] y) {
        a = Mul(sample, timestep)
        b = Tanh(sample)
        c = Concat<axis=1>(a, b)
        y = Tanh(c)
    }"""
    leaves(DeepCache(2), model_of(text), "joins no feature map")


def test_a_second_run_and_hoist_behind_it_are_left() -> None:
    model = denoiser()
    run_pipeline(model, "deep_cache=2")
    (report,) = run_pipeline(model, "deep_cache=3")
    assert not report.changed
    assert "shallow form already" in report.skips[0].reason
    (report,) = run_pipeline(model, "hoist")
    assert not report.changed
    assert "hoist must come before" in report.skips[0].reason


def test_an_output_inside_a_body_is_left() -> None:
    text = """g (float[B,4,H,W] sample, float timestep, bool flag) => (float[B,4,H,W] y) {
        d = Conv(sample, k)
        m = Conv(d, k)
        j = Concat<axis=1>(m, d)
        o = If (flag) <
            then_branch = yes () => (float[B,8,H,W] a) { a = Tanh(j) },
            else_branch = no () => (float[B,8,H,W] b) { b = Neg(j) }
        >
        y = Conv(o, k2)
    }"""
    kernels = {"k": np.ones((4, 4, 1, 1), np.float32), "k2": np.ones((4, 8, 1, 1), np.float32)}
    leaves(DeepCache(2), model_of(text, kernels), "a node with a body")


def test_a_weight_that_a_caller_may_override_stays_one_in_both_forms() -> None:
    model, given = denoiser(), feeds()
    wanted = run(model, given)[0]
    for name in ("k_in", "k_up"):
        value = model.graph.initializers[name]
        value.type, value.shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape(weights_of()[name].shape),
        )
        model.graph.inputs.append(value)
    run_pipeline(model, "deep_cache=2")
    attached = companions.of(model)
    assert attached is not None
    assert attached.inputs == ("sample", "timestep", "encoder_hidden_states")
    carried = {"deep_feature": outputs(model, given)["deep_feature"]}
    np.testing.assert_array_equal(run_all(model, given, carried), wanted)
    shallow = shallow_of(model).graph
    assert shallow.initializers["k_in"] in shallow.inputs
    assert "k_up" not in shallow.initializers
