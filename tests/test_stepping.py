from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from sdopt.compare.stepping import Stepper, read_by
from sdopt.errors import BuildError, UsageError
from tests.toolkit import model_of, run

BODY = """g (float[n,4] x, bool flag) => (float[n,4] y, float[n,4] z) {
    a = MatMul(x, w)
    b = Relu(a)
    c = If (flag) <
        then_branch = t () => (float[n,4] t1) { t1 = Mul(b, v) },
        else_branch = e () => (float[n,4] e1) { e1 = Add(b, x) }
    >
    s = SplitToSequence<axis=1>(c, parts)
    s0 = SequenceAt(s, zero)
    s1 = SequenceAt(s, one)
    z = Concat<axis=1>(s1, s0)
    y = Add(z, a)
}"""
WEIGHTS = {
    "w": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32),
    "v": np.full(4, 3, np.float32),
    "parts": np.array([2, 2]),
    "zero": np.array(0),
    "one": np.array(1),
}


def feeds(count: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"x": rng.standard_normal((2 + i, 4)).astype(np.float32), "flag": np.array(i % 2 == 0)}
        for i in range(count)
    ]


@pytest.mark.parametrize("nodes", [None, 1, 2, 3, 100])
def test_pieces_compute_what_the_whole_does(tmp_path: Path, nodes: int | None) -> None:
    model = model_of(BODY, WEIGHTS)
    stepper = Stepper(ir.to_proto(model), tmp_path, nodes=nodes)
    for feed, found in zip(feeds(3), stepper.results(feeds(3)), strict=True):
        for wanted, name in zip(run(model, feed), ("y", "z"), strict=True):
            np.testing.assert_array_equal(found[name], wanted)


def test_values_come_in_order_for_every_feed(tmp_path: Path) -> None:
    proto = ir.to_proto(model_of(BODY, WEIGHTS))
    seen = [
        (number, name)
        for number, name, _ in Stepper(proto, tmp_path, ["b", "a", "s0"], nodes=1).run(feeds(2))
    ]
    assert seen == [(i, name) for name in ("a", "b", "s0", "z", "y") for i in range(2)]


def test_what_a_value_is(tmp_path: Path) -> None:
    proto = ir.to_proto(model_of(BODY, WEIGHTS))
    (feed,) = feeds()
    found = {name: array for _, name, array in Stepper(proto, tmp_path, ["a", "b"]).run([feed])}
    np.testing.assert_allclose(found["a"], feed["x"] @ WEIGHTS["w"], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], np.maximum(found["a"], 0))


def test_bodies_tell_what_they_take_from_outside() -> None:
    proto = ir.to_proto(model_of(BODY, WEIGHTS))
    (node,) = [node for node in proto.graph.node if node.op_type == "If"]
    assert set(read_by(node)) == {"flag", "b", "v", "x"}


def test_a_piece_opens_its_own_weights_only(tmp_path: Path) -> None:
    """Of two weights files one is gone: what does not need it is computed."""
    save_file({"w": WEIGHTS["w"]}, tmp_path / "first.safetensors")
    proto = ir.to_proto(
        model_of(
            "g (float[n,4] x) => (float[n,4] y) { a = MatMul(x, w)\n"
            "b = Relu(a)\ny = MatMul(b, u) }",
            {"w": WEIGHTS["w"], "u": WEIGHTS["w"]},
        )
    )
    for tensor, file in zip(proto.graph.initializer, ("here.bin", "gone.bin"), strict=True):
        onnx.external_data_helper.set_external_data(tensor, file, 0, 64)
        tensor.ClearField("raw_data")
    (tmp_path / "here.bin").write_bytes(WEIGHTS["w"].tobytes())
    seen = Stepper(proto, tmp_path, ["a"], nodes=1).run([{"x": np.ones((1, 4), np.float32)}])
    _, name, array = next(seen)
    assert name == "a"
    np.testing.assert_allclose(array, WEIGHTS["w"].sum(0, keepdims=True), rtol=1e-6)
    with pytest.raises(BuildError, match="weights beside the ONNX file"):
        list(seen)


def test_an_input_that_nothing_feeds(tmp_path: Path) -> None:
    stepper = Stepper(ir.to_proto(model_of(BODY, WEIGHTS)), tmp_path)
    with pytest.raises(UsageError, match="nothing feeds flag"):
        stepper.results([{"x": np.ones((1, 4), np.float32)}])
