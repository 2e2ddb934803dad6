"""The graph that the tests of both casts share, and how to run one of either type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from tests.toolkit import Arrays, run

BLOCK = """g (float[B,4] sample, float timestep) => (float[B,4] out) {
    phase = Mul(timestep, freq)
    wave = Sin(phase)
    a = MatMul(sample, w)
    b = Add(a, wave)
    n = LayerNormalization(b, gamma, beta)
    out = Relu(n)
}"""


def block_weights(scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "freq": np.array([1.0, 0.1, 0.01, 0.001], np.float32),
        "w": (rng.standard_normal((4, 4)) * scale).astype(np.float32),
        "gamma": np.ones(4, np.float32),
        "beta": np.zeros(4, np.float32),
    }


def block_feeds(batch: int = 2) -> Arrays:
    sample = np.random.default_rng(1).standard_normal((batch, 4)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(999.0, np.float32)}


def evaluate(model: ir.Model, feeds: Arrays) -> np.ndarray:
    """The first output as float32; floats are fed in the declared types.

    ONNX Runtime computes it, optimisations off, unless there is bfloat16 in the graph, for which
    release 1.31 has next to no kernels on the CPU (no MatMul, no Conv): then onnx's reference.
    """
    known = {value.name: value.dtype for value in model.graph.inputs}
    cast = {name: array.astype(known[name].numpy()) for name, array in feeds.items()}
    values = [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    if ir.DataType.BFLOAT16 in {value.dtype for value in values}:
        out = np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, cast)[0])
    else:
        out = run(model, cast)[0]
    wanted = model.graph.outputs[0].dtype
    assert wanted is not None
    assert out.dtype == wanted.numpy()
    return out.astype(np.float32)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {v.name or "": v.dtype for v in [*model.graph.inputs, *model.graph.outputs]}
