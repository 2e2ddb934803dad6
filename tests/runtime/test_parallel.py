"""Guidance's two halves on two sessions: the same images, and a batch that is cut where it may."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.errors import UsageError
from sdopt.passes.cfg_parallel import CfgParallel
from sdopt.runtime.parallel import on_halves, targets_for
from sdopt.session import Port, checked_feeds
from sdopt.targets.ort import Ort
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run


class Doubling:
    """A session that doubles its image, adds the prompt's sum, and notes what it was given."""

    def __init__(self, batch: int | str = "batch", meet: threading.Barrier | None = None) -> None:
        single = np.dtype(np.float32)
        self.inputs: Mapping[str, Port] = {
            "sample": Port(single, (batch, 1, "height", "width")),
            "timestep": Port(single, ()),
            "prompt": Port(single, (batch, 3)),
        }
        self.outputs: Mapping[str, Port] = {"out": Port(single, (batch, 1, "height", "width"))}
        self.sizes: list[int] = []
        self._meet = meet

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = checked_feeds(self.inputs, feeds, "here")
        self.sizes.append(len(arrays["sample"]))
        if self._meet is not None:
            self._meet.wait(timeout=20)
        sums = arrays["prompt"].sum(axis=1).reshape(-1, 1, 1, 1)
        return {"out": 2 * arrays["sample"] + sums + arrays["timestep"]}


def feeds(batch: int) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((batch, 1, 2, 3), np.float32),
        "timestep": np.array(7, np.float32),
        "prompt": rng.standard_normal((batch, 3), np.float32),
    }


@pytest.mark.parametrize("batch", [2, 6])
def test_halves_are_computed_at_the_same_time_and_joined(batch: int) -> None:
    meet = threading.Barrier(2)
    first, second = Doubling(meet=meet), Doubling(meet=meet)
    both = on_halves([first, second], halved=False, where="here")
    wanted = Doubling().run(feeds(batch))["out"]
    assert np.array_equal(both.run(feeds(batch))["out"], wanted)
    assert first.sizes == second.sizes == [batch // 2]


def test_without_guidance_one_device_computes_all() -> None:
    first, second = Doubling(), Doubling()
    both = on_halves([first, second], halved=False, where="here")
    assert both.run(feeds(1))["out"].shape == (1, 1, 2, 3)
    assert (first.sizes, second.sizes) == ([1], [])


def test_one_device_computes_the_halves_of_a_halved_graph_in_turn() -> None:
    one = Doubling(batch=2)
    both = on_halves([one], halved=True, where="here")
    assert np.array_equal(both.run(feeds(4))["out"], Doubling().run(feeds(4))["out"])
    assert one.sizes == [2, 2]
    both.run(feeds(2))
    assert one.sizes == [2, 2, 2]
    with pytest.raises(UsageError, match="a batch of 2 or twice that, not 6"):
        both.run(feeds(6))


def test_one_device_and_a_whole_graph_is_the_session_itself() -> None:
    one = Doubling()
    assert on_halves([one], halved=False, where="here") is one


def test_a_fixed_doubled_batch_must_be_halved_first() -> None:
    with pytest.raises(UsageError, match="fixed batch of 2") as raised:
        on_halves([Doubling(2), Doubling(2)], halved=False, where="here")
    assert "cfg_parallel" in str(raised.value)


def test_devices() -> None:
    assert targets_for(Ort(), "cpu,cpu") == [Ort(), Ort()]
    cards = targets_for(Ort(provider="cuda"), "0,1")
    assert [str(one) for one in cards] == ["ort:provider=cuda", "ort:provider=cuda:device=1"]


@pytest.mark.parametrize("text", ["", "0,1,2", "cpu,", "gpu", "0"])
def test_wrong_devices(text: str) -> None:
    with pytest.raises(UsageError):
        targets_for(Ort(), text)


def attention(batch: int | str, *, fixed: int | None = None) -> ir.Model:
    """Tokens of a latent, split into heads by a baked batch, with a constant per batch entry."""
    rng = np.random.default_rng(0)
    size = batch if isinstance(batch, int) else 2
    weights: dict[str, np.ndarray] = {
        "w": (rng.standard_normal((4, 8)) / 3).astype(np.float32),
        "heads": np.array([fixed if fixed is not None else size, -1, 2, 4]),
        "flat": np.array([size, 6, 8] if isinstance(batch, int) else [0, -1, 8]),
        "tokens": np.array([size, 4, 6] if isinstance(batch, int) else [0, 4, -1]),
        "bias": np.repeat(rng.standard_normal((1, 1, 8)).astype(np.float32), size, axis=0),
    }
    body = """
        t = Reshape(x, tokens)
        s = Transpose<perm=[0,2,1]>(t)
        m = MatMul(s, w)
        b = Add(m, bias)
        r = Reshape(b, heads)
        h = Transpose<perm=[0,2,1,3]>(r)
        a = Attention(h, h, h)
        u = Transpose<perm=[0,2,1,3]>(a)
        y = Reshape(u, flat)"""
    head = f"g (float[{batch},4,2,3] x) => (float[{batch},6,8] y)"
    return model_of(f"{head} {{ {body} }}", weights)


@pytest.mark.parametrize("batch", [2, 4])
def test_a_fixed_batch_is_halved_by_the_dataflow(batch: int) -> None:
    x = np.random.default_rng(1).standard_normal((batch, 4, 2, 3)).astype(np.float32)
    wanted = run(attention(batch), {"x": x})[0]
    model = attention(batch)
    before = ops(model)
    assert apply(CfgParallel(), model).rewrites == {"batch": 1}
    assert ops(model) == before
    assert [value.shape[0] for value in model.graph.inputs if value.shape] == [batch // 2]
    halves = [run(model, {"x": part})[0] for part in np.split(x, 2)]
    assert relative_l2(np.concatenate(halves), wanted) <= 5e-6


def test_a_dynamic_batch_stays_to_the_byte() -> None:
    model = model_of("g (float[B,4,H,W] x) => (float[B,4,H,W] y) { y = Relu(x) }")
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    ctx = apply(CfgParallel(), model)
    assert ctx.present == {"batch": 1}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == data


LEFT = {
    "an odd batch": ("g (float[3,4,2,2] x) => (float[3,4,2,2] y) { y = Relu(x) }", "no halves"),
    "no image": ("g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }", "no input is [B, C, H, W]"),
}


@pytest.mark.parametrize("case", sorted(LEFT))
def test_what_is_left_alone(case: str) -> None:
    body, reason = LEFT[case]
    leaves(CfgParallel(), model_of(body), reason)


def test_a_constant_that_differs_along_the_batch_is_left() -> None:
    model = attention(2)
    bias = next(v for v in model.graph.initializers.values() if v.name == "bias")
    assert bias.const_value is not None
    array = bias.const_value.numpy().copy()
    array[1] += 1
    bias.const_value = ir.tensor(array, name="bias")
    leaves(CfgParallel(), model, "halves that differ")
