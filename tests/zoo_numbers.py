"""What computes a model, and whether two results of it count as the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from sdopt.tolerance import FP32_REASSOCIATED, HALF
from tests.zoo_cases import Feeds

Runner = Callable[[onnx.ModelProto, Feeds], list[Any]]


def by_ort(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    """ONNX Runtime's CPU with every optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options)
    run = ort.RunOptions()
    run.log_severity_level = 4
    return list(session.run(None, dict(feeds), run))


def by_reference(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    """onnx's own evaluator."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(model).run(None, dict(feeds)))


RUNNERS: dict[str, Runner] = {"ort": by_ort, "reference": by_reference}


def raw_result(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, list[Any]]:
    """What computes the model as it comes, and its outputs; ``none`` if nothing here can."""
    for name, runner in RUNNERS.items():
        try:
            return name, runner(model, feeds)
        except Exception:  # whatever a runtime says about an operator that it lacks
            continue
    return "none", []


def difference(got: Any, wanted: Any, exact: bool, random: bool = False) -> str:
    """How two results differ, empty if they count as the same; random ones by type and shape."""
    if isinstance(wanted, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(wanted):
            return f"{wanted!r} became {got!r}"
        parts = (difference(a, b, exact, random) for a, b in zip(got, wanted, strict=True))
        return next((part for part in parts if part), "")
    if not isinstance(wanted, np.ndarray):
        return "" if type(got) is type(wanted) and got == wanted else f"{wanted!r} became {got!r}"
    if not isinstance(got, np.ndarray) or got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{wanted.dtype}{wanted.shape} became {getattr(got, 'dtype', '')}{np.shape(got)}"
    if random:
        return ""
    if wanted.dtype == object:
        return "" if np.array_equal(got, wanted) else "other text"
    if got.tobytes() == wanted.tobytes():
        return ""
    distance = "not bit-equal"
    if not exact and wanted.dtype.kind in "fV":
        limit = {2: HALF["float16"]}.get(wanted.dtype.itemsize, FP32_REASSOCIATED)
        distance = relative(got.astype(np.float64), wanted.astype(np.float64), limit)
    return distance


def relative(a: np.ndarray, b: np.ndarray, limit: float) -> str:
    """Relative L2 where both are finite; elsewhere both must be the same."""
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "other infinities or NaN"
    norm = float(np.linalg.norm(b[finite]))
    off = float(np.linalg.norm(a[finite] - b[finite]))
    return "" if off <= limit * norm else f"relative L2 {off / norm if norm else off:.1e}"
