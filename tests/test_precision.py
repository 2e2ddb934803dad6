from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, graph
from sdopt.bundle import Bundle
from sdopt.cli import main
from sdopt.compare.stepping import Stepper
from sdopt.errors import UsageError
from sdopt.passes.base import Role
from sdopt.precision import PrecisionReport, choose
from sdopt.precision.bisection import Bisection, Tree, Trial
from sdopt.precision.emulation import emulated, halves_of, name_nodes
from sdopt.precision.ranges import limits_of
from sdopt.runtime.recording import record
from tests.browser import opened
from tests.exporters import made
from tests.runtime import toy
from tests.toolkit import apply, model_of, run

SIZES = {"height": 8, "width": 8, "sequence_length": 7}


def in_half(
    model: ir.Model,
    feeds: dict[str, np.ndarray],
    folder: Path,
    dtype: str = "fp16",
    keep: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """What the graph gives in half precision, and in float32 where ``keep`` says so."""
    name_nodes(model)
    proto = ir.to_proto(model)
    halves = halves_of(model, dtype, Role.MODEL)
    graph = emulated(proto, halves, halves.kept(keep))
    return Stepper(graph, folder, nodes=None).results([feeds])[0]


# The arithmetic


def test_an_overflow_that_onnxruntime_hides_is_seen(tmp_path: Path) -> None:
    text = "g (float[n] x) => (float[n] y) { a = Mul(x, two)\ny = Mul(a, half) }"
    weights = {"two": np.array(2, np.float32), "half": np.array(0.5, np.float32)}
    feeds = {"x": np.array([60000, 30000], np.float32)}
    from sdopt.passes.cast_fp16 import CastFp16

    cast = model_of(text, weights)
    apply(CastFp16(keep=("io",)), cast)
    (hidden,) = run(cast, feeds)
    assert hidden.tolist() == [60000, 30000], "onnxruntime 1.31 computes between casts in float32"
    found = in_half(model_of(text, weights), feeds, tmp_path)
    assert found["y"].tolist() == [math.inf, 30000]


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
def test_arithmetic_is_that_of_numpys_float16(tmp_path: Path, op: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        (rng.standard_normal(4096) * 10.0 ** rng.integers(-6, 4, 4096)).astype(np.float32)
        for _ in range(2)
    )
    model = model_of(f"g (float[n] a, float[n] b) => (float[n] y) {{ y = {op}(a, b) }}")
    found = in_half(model, {"a": a, "b": b}, tmp_path)["y"]
    with np.errstate(all="ignore"):
        compute = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract, "Div": np.divide}[op]
        wanted = compute(a.astype(np.float16), b.astype(np.float16)).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_bfloat16_is_coarse_and_does_not_overflow(tmp_path: Path) -> None:
    text = "g (float[n] x) => (float[n] y) { y = Mul(x, x) }"
    feeds = {"x": np.array([1e4, 1 + 2**-9], np.float32)}
    found = in_half(model_of(text), feeds, tmp_path, "bf16")["y"]
    assert math.isfinite(found[0])
    assert found[1] == 1.0
    assert in_half(model_of(text), feeds, tmp_path)["y"][0] == math.inf


def test_a_matrix_product_adds_up_in_float32(tmp_path: Path) -> None:
    """As tensor cores do: 4096 ones are 4096, where a running float16 sum stops at 2048."""
    model = model_of(
        "g (float[1,4096] x) => (float[1,1] y) { y = MatMul(x, w) }",
        {"w": np.ones((4096, 1), np.float32)},
    )
    assert in_half(model, {"x": np.ones((1, 4096), np.float32)}, tmp_path)["y"] == 4096


def test_masks_become_the_lowest_number_of_half(tmp_path: Path) -> None:
    mask = np.array([[0, -np.inf], [-np.inf, -np.inf]], np.float32)
    model = model_of(
        "g (float[2,2] x) => (float[2,2] y) { a = Add(x, mask)\ny = Softmax<axis=-1>(a) }",
        {"mask": mask},
    )
    found = in_half(model, {"x": np.zeros((2, 2), np.float32)}, tmp_path)["y"]
    np.testing.assert_allclose(found, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [([], -math.inf), (["up.exp"], -math.inf), (["up"], -20), (["Exp", "Log"], -20)],
)
def test_what_is_kept_is_not_rounded(tmp_path: Path, keep: list[str], wanted: float) -> None:
    model = model_of("g (float[n] x) => (float[n] y) { a = Exp(x)\nb = Log(a)\ny = Neg(b) }")
    for node, path in zip(model.graph, ("up.exp", "up.log", "out"), strict=True):
        node.metadata_props["sdopt.module"] = path
    found = in_half(model, {"x": np.array([20.0], np.float32)}, tmp_path, keep=keep)
    assert found["y"] == pytest.approx(wanted)


def test_limits() -> None:
    half, brain = limits_of("fp16"), limits_of("bf16")
    assert (half.largest, half.normal, half.smallest) == (65504, 2**-14, 2**-24)
    assert brain.largest > 3e38
    assert brain.normal == pytest.approx(2**-126)


# The search

PATHS = [
    "conv_in",
    *(f"down.{b}.res.{r}.conv{c}" for b in range(3) for r in range(2) for c in (1, 2)),
    *(f"up.{b}.attn.{p}" for b in range(2) for p in ("q", "k", "v")),
    "up.1",
]


def found_with(
    error: Callable[[set[str]], float], tolerance: float = 1.0
) -> tuple[list[str] | None, list[Trial]]:
    """A search where the error depends on the single modules that are kept."""
    trials: list[Trial] = []

    def measure(keep: frozenset[str]) -> float:
        covered = {p for p in PATHS if any(p == k or p.startswith(f"{k}.") for k in keep)}
        return error(covered)

    return Bisection(measure, tolerance, Tree(PATHS), trials.append).run(), trials


def test_modules_of_a_tree() -> None:
    tree = Tree(PATHS)
    assert tree.below() == ["conv_in", "down.0", "down.1", "down.2", "up.0", "up.1"]
    assert tree.below("down.1") == ["down.1.res.0", "down.1.res.1"]
    assert tree.below("up.1") == ["up.1.attn"]
    assert tree.below("conv_in") == []


@pytest.mark.parametrize(
    "culprits",
    [
        {"conv_in"},
        {"down.1.res.0.conv2"},
        {"down.0.res.0.conv1", "up.1.attn.k"},
        {"down.2.res.1.conv1", "down.2.res.1.conv2", "up.0.attn.v"},
    ],
)
def test_culprits_are_found_exactly(culprits: set[str]) -> None:
    found, trials = found_with(lambda kept: 0.0 if culprits <= kept else math.inf)
    assert found is not None
    covered = {p for p in PATHS if any(p == k or p.startswith(f"{k}.") for k in found)}
    assert covered == culprits
    assert len(trials) < 60


def test_a_guess_that_is_enough_saves_the_search() -> None:
    culprits = {"down.2.res.1.conv1", "up.0.attn.v"}

    def measure(keep: frozenset[str]) -> float:
        return 0.0 if culprits <= keep else math.inf

    trials: list[Trial] = []
    search = Bisection(measure, 1.0, Tree(PATHS), trials.append)
    assert search.run([["conv_in"], ["conv_in", *culprits]]) == sorted(culprits)
    assert len(trials) < 10


def test_what_lies_in_a_block_itself_keeps_the_block() -> None:
    found, _ = found_with(lambda kept: 0.0 if "up.1" in kept else 5.0)
    assert found == ["up.1"]


def test_of_small_errors_the_few_largest_are_kept() -> None:
    sizes = dict.fromkeys(PATHS, 0.01) | {"up.0.attn.q": 3.0, "down.0.res.1.conv1": 2.0}
    found, _ = found_with(lambda kept: sum(s for p, s in sizes.items() if p not in kept))
    assert found == ["down.0.res.1.conv1", "up.0.attn.q"]


def test_nothing_to_keep_is_one_trial() -> None:
    found, trials = found_with(lambda _: 0.5)
    assert found == []
    assert len(trials) == 1


def test_where_nothing_is_enough() -> None:
    assert found_with(lambda _: 2.0)[0] is None
    assert found_with(lambda _: math.nan)[0] is None


# On models with planted overflow


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(made.copy_of("sd1", tmp_path_factory)[1])


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(made.copy_of("sd35", tmp_path_factory)[1])


def planted(bundle: Bundle, component: str, **factors: float) -> str:
    """A stage of a component's raw graph whose named weights are multiplied."""
    raw = bundle.stage(component, "model")
    model = raw.load()
    for name, factor in factors.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        grown = value.const_value.numpy() * np.float32(factor)
        assert np.abs(grown).max() < 65504, "the weight itself must fit"
        value.const_value = ir.tensor(grown, name=name)
    record_of = dataclasses.replace(
        raw.record, stage="planted", source_stage="model", source=raw.digest
    )
    with bundle.lock():
        bundle.commit(model, record_of)
    return "planted"


def chosen(bundle: Bundle, component: str, stage: str, **more: object) -> PrecisionReport:
    options: dict[str, object] = {"samples": 1, **more}
    if component == "unet":
        options["sizes"] = SIZES
    return choose(bundle, component, stage=stage, **options)  # type: ignore[arg-type]


def confirmed(bundle: Bundle, found: PrecisionReport) -> None:
    """The recipe makes a stage in half precision that is as near as it says."""
    assert found.passed
    assert found.everywhere == math.inf
    assert found.error <= found.tolerance
    assert all(error > found.tolerance for error in found.without.values())
    api.optimize(
        bundle.path, found.recipe, components=[found.component], stage="half", source=found.stage
    )
    sides = [f"{bundle.path}@{stage}" for stage in ("half", found.stage)]
    sizes = SIZES if found.component == "unet" else None
    one = api.compare(*sides, components=[found.component], sizes=sizes)
    assert one.passed, one.lines()


def covers(found: PrecisionReport, module: str) -> bool:
    """Whether an entry is the module or lies around it."""
    return any(graph.in_module(module, entry) for entry in found.keep or ())


def test_a_block_whose_activations_pass_65504(sd1: Bundle) -> None:
    module = "mid_block.resnets.1.conv1"
    found = chosen(sd1, "unet", planted(sd1, "unet", **{f"{module}.weight": 2e5}))
    assert found.overflowing()[0].path == module
    assert covers(found, module)
    # What reads the value in half overflows as well; nothing else needs to be kept.
    assert all(graph.in_module(entry, "mid_block.resnets.1") for entry in found.keep or ())
    assert found.kept < 0.05 * found.nodes
    confirmed(sd1, found)


def test_an_attention_with_large_scores(sd1: Bundle) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    weights = {f"{block}.to_q.weight": 1.5e3, f"{block}.to_k.weight": 1.5e3}
    found = chosen(sd1, "unet", planted(sd1, "unet", **weights))
    assert [one.path for one in found.overflowing()] == [block]
    assert found.keep == (block,)
    confirmed(sd1, found)


def test_a_group_norm_of_the_vae_that_hides_an_overflow(sd1: Bundle) -> None:
    resnet = "decoder.up_blocks.0.resnets.0"
    weights = {f"{resnet}.conv1.weight": 2e5}
    found = chosen(sd1, "vae_decoder", planted(sd1, "vae_decoder", **weights))
    assert found.overflowing()[0].path == f"{resnet}.conv1"
    assert found.keep == (f"{resnet}.conv1", f"{resnet}.norm2")
    confirmed(sd1, found)


def test_the_last_joint_block_of_sd35(sd35: Bundle) -> None:
    """What NVIDIA's pipeline keeps of SD3.5-large is its last joint block."""
    raw = sd35.stage("transformer", "model").load()
    names = [n for n in raw.graph.initializers if n.endswith("ff.net.2.weight")]
    last = max(int(name.split(".")[1]) for name in names)
    block = f"transformer_blocks.{last}"
    weights = {f"{block}.ff.net.2.weight": 1e5}
    found = chosen(sd35, "transformer", planted(sd35, "transformer", **weights))
    assert found.overflowing()[0].path.startswith(block)
    assert any(graph.in_module(entry, block) for entry in found.keep or ())
    # The sum that leaves the block is read by what comes last, and by no other block.
    others = [f"transformer_blocks.{number}" for number in range(last)]
    assert not any(covers(found, other) for other in others)
    confirmed(sd35, found)


def test_small_errors_everywhere_are_bisected(sd1: Bundle) -> None:
    found = chosen(sd1, "vae_decoder", "model", tolerance=3e-4)
    assert found.overflowing() == []
    assert found.everywhere > 3e-4
    assert found.keep
    assert found.error <= 3e-4
    assert all(error > 3e-4 for error in found.without.values())


def test_a_model_that_needs_nothing(sd1: Bundle) -> None:
    found = chosen(sd1, "unet", "model")
    assert found.keep == ()
    assert len(found.trials) == 1
    assert found.overflowing() == []
    assert found.passes == "cast_fp16:keep=io"
    assert 0 < found.everywhere == found.error < 5e-3


def test_recorded_inputs_are_looked_at(tmp_path: Path) -> None:
    bundle = toy.bundle(tmp_path / "bundle")
    made_of = record(bundle, ["a one"], steps=4, keep=3, width=32, height=16)
    found = choose(bundle, "unet", recording=made_of.folder, samples=3)
    assert found.inputs == "3 recorded sample(s)"
    assert all("timestep" in name for name in found.samples)
    inputs = frozenset({"sample", "timestep", "encoder_hidden_states"})
    sample = made_of.load(made_of.of(inputs)[0])
    largest = next(one for one in found.ranges if one.op == "Div")
    assert largest.largest >= float(sample["timestep"]) / 1000 - 1e-6


def test_what_cannot_be_asked(sd1: Bundle) -> None:
    api.optimize(sd1.path, "cast_fp16", components=["unet"], stage="already")
    api.optimize(sd1.path, "@fast,hoist", components=["unet"], stage="hoisted")
    for stage, words in (("already", "half precision already"), ("hoisted", "companions")):
        with pytest.raises(UsageError, match=words):
            chosen(sd1, "unet", stage)
    with pytest.raises(UsageError, match="no half type"):
        chosen(sd1, "unet", "model", dtype="int8")


def test_the_command_and_its_page(
    sd1: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = "decoder.up_blocks.0.resnets.0.conv1"
    stage = planted(sd1, "vae_decoder", **{f"{module}.weight": 2e5})
    words = [
        "precision",
        str(sd1.path),
        "-c",
        "vae_decoder",
        "--stage",
        stage,
        "--samples",
        "2",
        "--html",
        str(tmp_path / "page.html"),
        "-o",
        str(tmp_path / "vae.recipe"),
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["sdopt", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert data["everywhere"] is None, "infinite"
    assert module in data["overflowing"]
    assert f"keep=io+{'+'.join(data['keep'])}" in (tmp_path / "vae.recipe").read_text()
    with opened(tmp_path / "page.html") as one:
        assert one.charts() == 1
        assert module in one.page.locator("table").nth(1).inner_text()
        assert one.complaints == []
