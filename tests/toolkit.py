"""What tests of passes share: running a graph, applying a pass, writing graphs as text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from sdopt import graph, modelfile
from sdopt.fingerprint import fingerprint
from sdopt.passes.base import Pass, PassContext

Arrays = dict[str, np.ndarray]


def model_of(
    body: str, weights: Mapping[str, np.ndarray] | None = None, opset: int = 23
) -> ir.Model:
    """A model from ONNX text, ``g (float[2] x) => (float[2] y) { ... }``, plus initializers."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]>\n{body}'
    values = [ir.tensor(array, name=name) for name, array in (weights or {}).items()]
    return ir.from_onnx_text(text, initializers=values)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs on ONNX Runtime's CPU with every optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(out) for out in session.run(None, dict(feeds))]


def apply(one: Pass, model: ir.Model, **context: object) -> PassContext:
    """Apply a pass in place, check the result with onnx's checker, return what it said."""
    ctx = PassContext(model, **context)  # type: ignore[arg-type]
    vendor_ops = graph.vendor_ops(model) | one.vendor_ops
    one.apply(model, ctx)
    modelfile.check(model, vendor_ops)
    return ctx


def leaves(one: Pass, model: ir.Model, reason: str = "") -> None:
    """Assert that a pass changes nothing, and that it says why where a reason is given."""
    before = fingerprint(model)
    ctx = apply(one, model)
    assert fingerprint(model) == before
    assert not any(ctx.rewrites.values())
    if reason:
        assert any(reason in skip.reason for skip in ctx.skips), ctx.skips


def ops(model: ir.Model) -> dict[str, int]:
    """Operator counts."""
    return graph.op_counts(model)


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """``||found - wanted|| / ||wanted||`` in float64; NaN where either holds one."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
