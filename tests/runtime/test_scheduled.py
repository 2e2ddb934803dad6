"""Main graph and companions as one session: what runs, what is kept, when a run begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.companions import Entry, Plan
from sdopt.errors import BundleError, UsageError
from sdopt.runtime.generate import generate
from sdopt.runtime.pipeline import load_pipeline
from sdopt.runtime.scheduled import KEPT, Scheduled, open_stage
from sdopt.session import Port
from sdopt.targets.ort import Ort
from tests.runtime import toy

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
FILE = "a-{}-0123456789ab.onnx"


class Graph:
    """A session that computes with numpy and remembers what it was fed."""

    def __init__(self, inputs: dict[str, Port], outputs: list[str], value: Any) -> None:
        self.inputs = inputs
        self.outputs = {name: Port(FLOAT, ("?",)) for name in outputs}
        self.seen: list[dict[str, np.ndarray]] = []
        self._value = value

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert feeds.keys() == self.inputs.keys()
        self.seen.append(dict(feeds))
        return {name: self._value(name, feeds) for name in self.outputs}


SAMPLE, TIME, PROMPT = (
    Port(FLOAT, ("b", 2)), Port(FLOAT, ()), Port(FLOAT, ("b", 3)),
)  # fmt: skip


def number(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([sum(float(v.sum()) for v in values.values())], np.float32)


class OnCard(Graph):
    """A session on a card: what it leaves there is overwritten by its next run, unless kept."""

    ready = True

    def holds(self) -> bool:
        return self.ready

    def run_held(
        self, feeds: Mapping[str, Any], held: Collection[str], *, keep: bool
    ) -> dict[str, Any]:
        near = {name: one.array if isinstance(one, Held) else one for name, one in feeds.items()}
        self.came = {name for name, one in feeds.items() if isinstance(one, Held)}
        for one in getattr(self, "left", ()):
            one.array = np.full_like(one.array, np.nan)
        found = {name: Held(v) if name in held else v for name, v in self.run(near).items()}
        self.left = [] if keep else [one for one in found.values() if isinstance(one, Held)]
        return found


@dataclass
class Held:
    """A value on the card."""

    array: np.ndarray


def scheduled(shallow: str = "", made: type[Graph] = Graph) -> tuple[Scheduled, dict[str, Graph]]:
    """A denoiser with ``prompt`` and ``step``, and ``shallow`` if it has a schedule."""
    graphs = {
        "main": made(
            {"sample": SAMPLE, "k": Port(FLOAT, (1,)), "t": Port(FLOAT, (1,))},
            ["out", "deep"],
            lambda name, feeds: number(feeds) * (10 if name == "deep" else 1),
        ),
        "prompt": made({"text": PROMPT}, ["k"], lambda _, feeds: number(feeds)),
        "step": made(
            {"time": TIME, "k": Port(FLOAT, (1,)), "b": Port(INT, (1,))},
            ["t"],
            lambda _, feeds: number(feeds),
        ),
    }
    entries = [
        Entry("prompt", "prompt", FILE.format("prompt"), ("text",), ("k",)),
        Entry("step", "step", FILE.format("step"), ("time", "k", "b"), ("t",)),
    ]
    if shallow:
        graphs["shallow"] = made(
            {"sample": SAMPLE, "deep": Port(FLOAT, (1,))}, ["out"], lambda _, feeds: number(feeds)
        )
        entries.append(
            Entry("shallow", shallow, FILE.format("shallow"), ("sample", "deep"), ("out",))
        )
    plan = Plan(
        ("sample", "time", "text"),
        ("out",),
        tuple(entries),
        {"b": ("sample", 0)},
        "time",
        ("text",),
    )
    beside = {name: one for name, one in graphs.items() if name != "main"}
    return Scheduled(plan, graphs["main"], beside, "here"), graphs


def step(session: Scheduled, time: float, text: float = 1.0, batch: int = 2) -> float:
    found = session.run(
        {
            "sample": np.ones((batch, 2), np.float32),
            "time": np.array(time, np.float32),
            "text": np.full((batch, 3), text, np.float32),
        }
    )
    assert [*found] == ["out"]
    return float(found["out"][0])


def test_it_looks_like_the_graph_that_it_came_from() -> None:
    session, _ = scheduled("every=2")
    assert dict(session.inputs) == {"sample": SAMPLE, "time": TIME, "text": PROMPT}
    assert [*session.outputs] == ["out"]
    with pytest.raises(UsageError, match="the graph takes sample, time, text"):
        session.run({"sample": np.ones((1, 2), np.float32)})


def test_once_per_prompt_and_once_per_timestep() -> None:
    session, graphs = scheduled()
    first = [step(session, time) for time in (9, 5, 1)]
    assert session.calls == {"main": 3, "prompt": 1, "step": 3}
    assert [step(session, time) for time in (9, 5, 1)] == first
    assert session.calls == {"main": 6, "prompt": 1, "step": 3}
    assert len(set(first)) == 3
    other = step(session, 9, text=2.0)
    assert session.calls == {"main": 7, "prompt": 2, "step": 4}
    assert other != first[0]
    assert step(session, 9) == first[0]
    assert session.calls == {"main": 8, "prompt": 2, "step": 4}
    step(session, 9, batch=3)
    assert session.calls["step"] == 5
    assert int(graphs["step"].seen[-1]["b"][0]) == 3


def test_an_array_that_is_changed_in_place_is_another_prompt() -> None:
    session, _ = scheduled()
    text = np.ones((2, 3), np.float32)
    given = {"sample": np.ones((2, 2), np.float32), "time": np.array(1, np.float32), "text": text}
    first = session.run(given)["out"].copy()
    text[:] = 3
    assert session.run(given)["out"] != first


def test_what_graphs_give_each_other_stays_on_the_card() -> None:
    times = [900.0, 800.0, 700.0, 600.0, 900.0, 800.0]
    plain, _ = scheduled("every=3")
    session, graphs = scheduled("every=3", OnCard)
    for time in times:
        assert step(session, time) == step(plain, time)
    assert session.calls == plain.calls
    cards = {name: one for name, one in graphs.items() if isinstance(one, OnCard)}
    assert cards["main"].came == {"k", "t"}
    assert cards["step"].came == {"k"}
    assert cards["shallow"].came == {"deep"}
    assert cards["prompt"].came == set()


def test_without_a_way_to_hold_values_everything_goes_through_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OnCard, "ready", False)
    session, graphs = scheduled("every=3", OnCard)
    plain, _ = scheduled("every=3")
    assert step(session, 900.0) == step(plain, 900.0)
    assert not hasattr(graphs["main"], "came")


def test_few_prompts_are_kept() -> None:
    session, _ = scheduled()
    for text in range(KEPT["prompt"] + 1):
        step(session, 1, text=float(text))
    step(session, 1, text=float(KEPT["prompt"]))
    assert session.calls["prompt"] == KEPT["prompt"] + 1
    step(session, 1, text=0.0)
    assert session.calls["prompt"] == KEPT["prompt"] + 2


def kinds(session: Scheduled, times: list[float], **others: Any) -> str:
    """``F`` for each step that the full graph computed, ``s`` for the shallow one."""
    found = ""
    for time in times:
        before = session.calls["main"]
        step(session, time, **others)
        found += "F" if session.calls["main"] > before else "s"
    return found


def test_the_shallow_one_in_between_on_the_last_full_ones_feature() -> None:
    session, graphs = scheduled("every=3")
    assert kinds(session, [9, 8, 7, 6, 5, 4, 3]) == "FssFssF"
    full, shallow = graphs["main"].seen, graphs["shallow"].seen
    assert float(shallow[0]["deep"][0]) == float(number(full[0])[0] * 10)
    assert float(shallow[2]["deep"][0]) == float(number(full[1])[0] * 10)


def test_a_list_of_steps() -> None:
    session, _ = scheduled("steps=1+2+4")
    assert kinds(session, [9, 8, 7, 6, 5, 4]) == "FssFsF"


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([9, 5, 1, 9, 5, 1], "FsFFsF"),  # the next image
        ([9, 9, 9], "FFF"),  # images of one step
        ([9, 5, 5, 1], "FsFs"),  # PNDM
        ([9, 5, 5, 3, 3, 1, 1], "FsFsFsF"),  # Heun
        ([5, 4, 9, 8], "FsFs"),  # a run that was broken off
    ],
)
def test_when_a_run_begins(times: list[float], wanted: str) -> None:
    session, _ = scheduled("every=2")
    assert kinds(session, times) == wanted


def test_another_prompt_or_size_begins_a_run() -> None:
    session, _ = scheduled("every=9")
    assert kinds(session, [9, 8]) == "Fs"
    assert kinds(session, [7], text=5.0) == "F"
    assert kinds(session, [6], text=5.0) == "s"
    assert kinds(session, [5], text=5.0, batch=1) == "F"


def test_halves_of_a_batch_on_one_session_never_share_a_feature() -> None:
    session, _ = scheduled("every=2")
    found = "".join(kinds(session, [t], text=text) for t in (9, 8, 7) for text in (1.0, 2.0))
    assert found == "FFFFFF"


def test_an_input_that_no_graph_takes_is_an_error() -> None:
    _, graphs = scheduled()
    plan = Plan(("sample", "time", "text", "lost"), ("out",), ())
    with pytest.raises(BundleError, match="companions of this graph do not fit"):
        Scheduled(plan, graphs["main"], {}, "here")


# In a pipeline


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = toy.bundle(tmp_path_factory.mktemp("toy") / "bundle")
    api.optimize(made.path, "hoist", stage="hoisted")
    return made


def test_a_stage_without_companions_opens_as_ever(bundle: Bundle, tmp_path: Path) -> None:
    plain = open_stage(Ort(), bundle.file("unet", "model"))
    assert not isinstance(plain, Scheduled)
    assert isinstance(open_stage(Ort(), bundle.file("unet", "hoisted")), Scheduled)
    with pytest.raises(BundleError, match="no such ONNX file"):
        open_stage(Ort(), tmp_path / "none.onnx")


def test_the_images_are_the_same(bundle: Bundle) -> None:
    def draw(stage: str) -> list[np.ndarray]:
        prompts = ["a handwritten seven", "a handwritten four"]
        options = {"steps": 4, "width": 32, "height": 24, "count": 2, "batch": 2}
        made = generate(bundle, prompts, stage=stage, **options)  # type: ignore[arg-type]
        return [np.asarray(one.image) for one in made]

    for one, other in zip(draw("hoisted"), draw("model"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pipeline_computes_the_companions_once(bundle: Bundle) -> None:
    pipe = load_pipeline(bundle, stage="hoisted")
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        pipe("a handwritten two", num_inference_steps=5, width=32, height=32, output_type="np")
    calls = pipe.unet._session.session.calls
    assert calls == {"main": 10, "prompt": 1, "step": 5}
