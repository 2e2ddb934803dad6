"""``hoist``: the same numbers, bit for bit, from companions and a smaller main graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import companions
from sdopt.errors import SdoptError, SpecError
from sdopt.passes.hoist import Hoist
from sdopt.pipeline import Pipeline, RunContext
from tests.passes.companion_runs import run_all, run_pipeline, same_as
from tests.passes.denoiser import denoiser, feeds
from tests.toolkit import Arrays, leaves, model_of, ops, relative_l2, run


def inputs(model: ir.Model) -> list[str | None]:
    return [value.name for value in model.graph.inputs]


def test_what_depends_on_prompt_and_timestep_moves_to_two_companions() -> None:
    model = denoiser()
    before = ops(model)
    (report,) = run_pipeline(model, "hoist")
    prompt, step = companions.graphs(model).values()
    assert report.rewrites == {"prompt_value": 2, "step_value": 2}
    assert ops(prompt) == {"MatMul": 1, "Split": 1}
    assert ops(step) == {
        "Gemm": 3, "Mul": 2, "Reshape": 1, "Expand": 1, "Unsqueeze": 1, "Sin": 1, "Sigmoid": 1,
    }  # fmt: skip
    assert before["Gemm"] == 3
    assert "Gemm" not in ops(model)
    assert ops(model)["MatMul"] == before["MatMul"] - 1
    assert inputs(model) == ["sample", "k", "v", "early", "late"]
    assert inputs(prompt) == ["encoder_hidden_states"]
    assert inputs(step) == ["timestep", "batch_size"]
    attached = companions.of(model)
    assert attached is not None
    assert attached.sizes == {"batch_size": ("sample", 0)}
    assert attached.clock == "timestep"
    assert "GFLOP moved" in report.notes[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("batch", "size"), [(2, (6, 10)), (3, (9, 7)), (1, (4, 4))])
def test_bit_equal_at_every_size(dtype: type, batch: int, size: tuple[int, int]) -> None:
    given = feeds(dtype, batch, size)
    wanted = run(denoiser(dtype), given)[0]
    model = denoiser(dtype)
    run_pipeline(model, "hoist")
    same_as(run_all(model, given), wanted)
    other = {**given, "timestep": np.array(400, dtype)}
    assert relative_l2(run_all(model, other), wanted) > 1e-3


def test_a_timestep_per_image_needs_no_size() -> None:
    model = denoiser(time="batch_size")
    wanted_of = denoiser(time="batch_size")
    given = feeds() | {"timestep": np.array([5, 90], np.float32)}
    run_pipeline(model, "hoist")
    attached = companions.of(model)
    assert attached is not None
    assert attached.sizes == {}
    assert inputs(attached.graphs["step"].model) == ["timestep"]
    np.testing.assert_array_equal(run_all(model, given), run(wanted_of, given)[0])


def test_sizes_of_unrelated_names_are_not_taken_for_equal() -> None:
    """The prompt's batch has another name than the sample's: nothing proves them equal."""
    text = """g (float[batch_size,3] sample, float[other,3] encoder_hidden_states)
        => (float[batch_size,3] y) {
            n = Shape<start=0, end=1>(sample)
            s = Concat<axis=0>(n, minus)
            c = Reshape(encoder_hidden_states, s)
            t = Tanh(c)
            y = Add(sample, t)
        }"""
    model = model_of(text, {"minus": np.array([-1])})
    given: Arrays = {
        "sample": np.ones((2, 3), np.float32),
        "encoder_hidden_states": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    wanted = run(model, given)[0]
    run_pipeline(model, "hoist")
    attached = companions.of(model)
    assert attached is not None
    assert attached.sizes == {"batch_size": ("sample", 0)}
    np.testing.assert_array_equal(run_all(model, given), wanted)


def test_inputs_of_any_name_by_options() -> None:
    names = {"encoder_hidden_states": "c_txt", "timestep": "sigma"}
    model = denoiser(**names)
    leaves(Hoist(), model, "no input is known to stay the same")
    wanted_of = denoiser(**names)
    run_pipeline(model, "hoist:prompt=c_txt:step=sigma")
    given = {names.get(key, key): value for key, value in feeds().items()}
    np.testing.assert_array_equal(run_all(model, given), run(wanted_of, given)[0])
    assert [*companions.graphs(model)] == ["prompt", "step"]


def test_one_of_the_two_is_enough() -> None:
    model = denoiser(timestep="tau")
    run_pipeline(model, "hoist")
    assert [*companions.graphs(model)] == ["prompt"]
    assert inputs(model) == ["sample", "tau", "k", "v"]


def test_what_needs_both_runs_per_step_and_reads_what_the_prompt_gave() -> None:
    text = """g (float[batch_size,3] sample, float timestep, float[batch_size,3] text_embeds)
        => (float[batch_size,3] y) {
            p = Tanh(text_embeds)
            s = Sin(timestep)
            both = Add(p, s)
            e = Exp(both)
            z = Mul(e, sample)
            y = Add(z, p)
        }"""
    rng = np.random.default_rng(0)
    given: Arrays = {
        "sample": rng.standard_normal((2, 3), np.float32),
        "timestep": np.array(3, np.float32),
        "text_embeds": rng.standard_normal((2, 3), np.float32),
    }
    model = model_of(text)
    wanted = run(model, given)[0]
    run_pipeline(model, "hoist")
    graphs = companions.graphs(model)
    assert [v.name for v in graphs["prompt"].graph.outputs] == ["p"]
    assert inputs(graphs["step"]) == ["timestep", "p"]
    assert inputs(model) == ["sample", "p", "e"]
    np.testing.assert_array_equal(run_all(model, given), wanted)


def test_an_input_that_is_also_read_elsewhere_stays() -> None:
    text = """g (float[B,3] sample, float[B,3] encoder_hidden_states) => (float[B,3] y) {
            t = Tanh(encoder_hidden_states)
            m = Mul(sample, encoder_hidden_states)
            y = Add(m, t)
        }"""
    model = model_of(text)
    given: Arrays = {name: np.ones((2, 3), np.float32) for name in inputs(model) if name}
    wanted = run(model, given)[0]
    run_pipeline(model, "hoist")
    assert inputs(model) == ["sample", "encoder_hidden_states", "t"]
    np.testing.assert_array_equal(run_all(model, given), wanted)


@pytest.mark.parametrize("spec", ["hoist,cast_fp16", "cast_fp16,hoist", "hoist,cast_fp16:keep=io"])
def test_a_cast_keeps_both_ends_of_a_value_in_one_type(spec: str) -> None:
    model, plain = denoiser(), denoiser()
    run_pipeline(model, spec)
    run_pipeline(plain, spec.replace("hoist,", "").replace(",hoist", ""))
    half = np.float32 if "io" in spec else np.float16
    given = {key: value.astype(half) for key, value in feeds().items()}
    given["timestep"] = given["timestep"].astype(plain.graph.inputs[1].dtype.numpy())
    same_as(run_all(model, given), run(plain, given)[0], half=True)
    assert relative_l2(run_all(model, given), run(denoiser(), feeds())[0]) < 5e-3


def test_later_passes_reach_the_companions() -> None:
    model = denoiser()
    (_, report) = Pipeline.parse("hoist,clean").run(model, RunContext())
    step = companions.graphs(model)["step"]
    assert report.ops_after["Gemm"] == 3
    assert "Gemm" not in ops(model)
    given = feeds()
    np.testing.assert_array_equal(run_all(model, given), run(denoiser(), given)[0])
    assert not set(ops(step)) & {"Identity", "Constant"}


def test_a_pass_that_changes_only_a_companion_has_changed_the_model() -> None:
    model = denoiser()
    run_pipeline(model, "hoist,clean")
    step = companions.graphs(model)["step"].graph
    late = step.outputs[1]
    copy = ir.node("Identity", [late.producer().inputs[0]])  # type: ignore[union-attr,list-item]
    copy.outputs[0].name = "copied"
    step.insert_before(late.producer(), copy)  # type: ignore[arg-type]
    late.producer().replace_input_with(0, copy.outputs[0])  # type: ignore[union-attr]
    (report,) = run_pipeline(model, "clean")
    assert report.changed
    assert report.op_deltas() == {"Identity": -1}
    assert not run_pipeline(model, "clean")[0].changed


def test_a_second_run_changes_nothing_and_says_why() -> None:
    model = denoiser()
    run_pipeline(model, "hoist")
    leaves(Hoist(), model, "hoisted already")


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("t = RandomNormalLike(encoder_hidden_states)", "nothing is computed"),
        ("t = Identity(encoder_hidden_states)", "nothing is computed"),
        ("i = Unsqueeze(encoder_hidden_states, two)\n t = Squeeze(i, two)", "nothing is computed"),
        ("s = Mul(encoder_hidden_states, sample)\n t = Tanh(s)", "nothing is computed"),
        ("t = Tanh(other)", "nothing is computed"),
    ],
)
def test_what_is_left_alone(nodes: str, reason: str) -> None:
    text = """g (float[B,3] sample, float[B,3] encoder_hidden_states, float[B,3] other)
        => (float[B,3] y) {
            NODES
            y = Add(t, sample)
        }"""
    constants = {"two": np.array([2])} if "two" in nodes else {}
    leaves(Hoist(), model_of(text.replace("NODES", nodes), constants), reason)


def test_an_output_of_the_graph_is_made_by_the_main_graph() -> None:
    text = """g (float[B,3] sample, float[B,3] encoder_hidden_states)
        => (float[B,3] y, float[B,3] u) {
            y = Tanh(sample)
            u = Tanh(encoder_hidden_states)
        }"""
    leaves(Hoist(), model_of(text), "nothing is computed")


def test_a_body_that_reads_the_prompt_stays() -> None:
    text = """g (bool flag, float[2] sample, float[2] encoder_hidden_states) => (float[2] y) {
        c = If (flag) <
            then_branch = yes () => (float[2] a) { a = Tanh(encoder_hidden_states) },
            else_branch = no () => (float[2] b) { b = Neg(encoder_hidden_states) }
        >
        y = Add(c, sample)
    }"""
    leaves(Hoist(), model_of(text), "nothing is computed")


def test_a_body_may_read_what_was_moved() -> None:
    text = """g (bool flag, float[2] sample, float[2] encoder_hidden_states) => (float[2] y) {
        t = Tanh(encoder_hidden_states)
        c = If (flag) <
            then_branch = yes () => (float[2] a) { a = Add(t, sample) },
            else_branch = no () => (float[2] b) { b = Sub(t, sample) }
        >
        y = Neg(c)
    }"""
    model = model_of(text)
    given: Arrays = {"flag": np.array(True)} | {
        name: np.arange(2, dtype=np.float32) for name in ("sample", "encoder_hidden_states")
    }
    wanted = run(model, given)[0]
    run_pipeline(model, "hoist")
    assert inputs(model) == ["flag", "sample", "t"]
    np.testing.assert_array_equal(run_all(model, given), wanted)


def test_a_function_of_the_model_goes_along() -> None:
    text = """g (float[2] sample, float[2] encoder_hidden_states) => (float[2] y) {
        t = own.twice(encoder_hidden_states)
        y = Add(t, sample)
    }
    <domain: "own", opset_import: ["" : 23]> twice (a) => (b) { b = Add(a, a) }"""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23, "own" : 1]>\n{text}')
    given: Arrays = {
        name: np.arange(2, dtype=np.float32) for name in ("sample", "encoder_hidden_states")
    }
    wanted = run(model, given)[0]
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph[0].outputs[0].shape = ir.Shape([2])
    run_pipeline(model, "hoist")
    assert inputs(model) == ["sample", "t"]
    np.testing.assert_array_equal(run_all(model, given), wanted)


def test_a_value_whose_rank_nobody_states_is_left() -> None:
    text = """g (float[2] sample, float[2] encoder_hidden_states) => (float[2] y) {
        t = com.microsoft.Gelu(encoder_hidden_states)
        y = Add(t, sample)
    }"""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n{text}'
    )
    leaves(Hoist(), model, "no known type and rank")
    assert companions.of(model) is None


def test_names_that_are_not_there_are_said() -> None:
    leaves(Hoist(prompt=("nothing",)), model_of("g (float[2] x) => (float[2] y) { y = Tanh(x) }"),
           "prompt=nothing names no input")  # fmt: skip


def test_it_comes_after_the_fusions_and_lora_before_it() -> None:
    with pytest.raises(SpecError, match="hoist must come after fuse_qkv"):
        Pipeline.parse("hoist,fuse_qkv")
    model = denoiser()
    run_pipeline(model, "hoist")
    with pytest.raises(SdoptError, match="lora cannot be applied to a graph with companions") as e:
        Pipeline.parse("lora=some.safetensors").run(model, RunContext())
    assert "moved to prompt and step" in str(e.value)
