"""What a space holds, and which of it the samplers try."""

from __future__ import annotations

import sys

import pytest

from sdopt.errors import MissingDependencyError, SdoptError, SpecError, UsageError
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.sampling import Sampling
from sdopt.sweep.space import Space, Template

FAST = "clean,raise_ops,clean,fuse_qkv,pad_align"


def space(*passes: str, target: str = "ort", shapes: str = "64x64", batch: int = 1) -> Space:
    return Space.of(passes, [target], [shapes], [batch])


def recipes(*passes: str) -> list[str]:
    return [one.recipe for one in space(*passes).candidates()]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("clean", ["clean"]),
        ("", [""]),
        ("@fast", [FAST]),
        ("clean,tome=1..3", ["clean,tome=1", "clean,tome=2", "clean,tome=3"]),
        # 0 blocks cannot be: it is the recipe without the pass.
        ("clean,tome=0..1", ["clean", "clean,tome=1"]),
        ("clean|fuse_qkv", ["clean", "fuse_qkv"]),
        ("clean,|cast_fp16", ["clean", "clean,cast_fp16"]),
        ("cast_fp16:keep=io|quantize=w8", ["cast_fp16:keep=io", "quantize=w8"]),
        ("tome=1..2|quantize=w8", ["tome=1", "tome=2", "quantize=w8"]),
        (
            "tome=1:ratio=0.25..0.75/0.25",
            ["tome=1:ratio=0.25", "tome=1", "tome=1:ratio=0.75"],  # 0.5 is the default
        ),
        ("clean|@fast,tome=0..1", ["clean", "clean,tome=1", FAST, f"{FAST},tome=1"]),
        ("clean|clean", ["clean"]),
    ],
)
def test_ranges_and_alternatives(text: str, found: list[str]) -> None:
    assert recipes(text) == found


def test_what_stands_in_quotes_or_is_no_number_is_no_range() -> None:
    (slot,) = Template.parse('lora="a|b,1..3.safetensors":scale=0.5|x').slots[:1]
    assert slot.values[0] == 'lora="a|b,1..3.safetensors":scale=0.5'
    (data,) = Template.parse("quantize=int8:data=../recorded").slots
    assert data.values == ("quantize=int8:data=../recorded",)


def test_a_grid_is_the_product_and_every_point_says_what_was_chosen() -> None:
    made = Space.of(
        ["@fast,tome=0..2,|cast_fp16", ""], ["ort:threads=1..2", "onnx"], ["64x64,32x32"], [1, 4]
    )
    found = made.candidates()
    assert len(found) == len(set(found)) == made.size == (3 * 2 + 1) * 3 * 2 * 2
    assert found[0].choices == {
        "tome": "without",
        "cast_fp16": "without",
        "recipe": "@fast,tome,cast_fp16",
        "target": "ort:threads=1",
        "shape": "64x64",
        "batch": "1",
    }
    assert Candidate.from_json(found[-1].to_json()) == found[-1]
    assert found[-1].choices["recipe"] == "raw"
    # A sampler that chooses each axis comes to every point, and to no other.
    axes = made.axes()
    chosen: list[dict[str, str]] = [{}]
    for name, values in axes.items():
        chosen = [{**one, name: value} for one in chosen for value in values]
    assert {made.at(one) for one in chosen} == set(found)


@pytest.mark.parametrize(
    ("passes", "target", "message"),
    [
        ("@fast,tomee=0..2", "ort", "did you mean tome?"),
        ("@fats", "ort", "did you mean fast?"),
        ("tome=1:blocs=3", "ort", "did you mean blocks?"),
        ("tome=5..1", "ort", "5..1 is no range"),
        ("tome=1..99999", "ort", "99999 values"),
        ("tome=1:ratio=0.3..0.9/0.1", "ort", "ratio must be from 0 to 0.75"),
        ("tome=1..2,raise_ops", "ort", "tome must come after raise_ops"),
        ("clean", "ort|tensort", "unknown target 'tensort'"),
        ("clean", "ort:provider=cpu|gpu", "unknown target 'gpu'"),
        ("clean", "ort:stage=mine", "has no name"),
        ("tome=1..200,tome=1..200", "ort", "40000 points"),
    ],
)
def test_errors_come_before_anything_runs(passes: str, target: str, message: str) -> None:
    with pytest.raises(SdoptError) as caught:
        space(passes, target=target).candidates()
    assert message in str(caught.value)


def test_sizes_and_batches_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="one size"):
        space("clean", shapes="64x64..128x128")
    with pytest.raises(UsageError):
        space("clean", shapes="63x64")
    with pytest.raises(UsageError, match="batch"):
        space("clean", batch=0)
    with pytest.raises(UsageError, match="nothing to try"):
        Space.of([], ["ort"], ["64x64"], [1])
    with pytest.raises(SpecError):
        space("clean,,fuse_qkv=").candidates()


def test_random_is_a_part_of_the_grid_that_the_seed_decides() -> None:
    made, grid = space("tome=1..50"), space("tome=1..50").candidates()
    assert [*Sampling().make(made, ["ms"]).ask()] == [*grid]
    one, other, same = (Sampling("random", 10, s).make(made, ["ms"]).ask() for s in (1, 2, 1))
    assert one == same != other
    assert len(set(one)) == 10
    assert set(one) < set(grid)
    assert len(Sampling("random", 99).make(made, ["ms"]).ask()) == 50


@pytest.mark.parametrize("name", ["tpe", "nsgaii"])
def test_optuna_asks_within_the_budget_and_learns(name: str) -> None:
    made, axes = space("tome=1..40,|cast_fp16"), ("ms", "score")

    def tried() -> list[Candidate]:
        sampler = Sampling(name, 24, seed=3).make(made, axes)
        found: list[Candidate] = []
        while some := sampler.ask():
            assert len(some) <= 4
            for one in some:
                blocks = int(one.recipe.split("tome=")[1].split(",")[0])
                failed = blocks == 7
                values = {"ms": 100.0 - blocks, "score": float("cast" not in one.recipe)}
                sampler.tell(one, None if failed else values)
            found += some
        return found

    found = tried()
    assert len(found) == len(set(found)) == 24
    assert found == tried()  # the seed decides, and what was told


def test_samplers_ask_for_every_point_where_there_are_few() -> None:
    sampler = Sampling("tpe", 50).make(space("tome=1..3"), ("ms",))
    found = []
    while some := sampler.ask():
        found += some
        for one in some:
            sampler.tell(one, {"ms": 1.0})
    assert len(set(found)) == len(found) == 3


def test_what_is_no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"sampler": "bayes"}, {"budget": 5}, {"sampler": "tpe"}):
        with pytest.raises(SdoptError):
            Sampling(**options)
    with pytest.raises(UsageError):
        Sampling("random", 0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match="Optuna"):
        Sampling("tpe", 3).make(space("tome=1..3"), ("ms",))
