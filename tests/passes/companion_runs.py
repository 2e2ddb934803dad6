"""Running a model with its companions in a test: each graph once, values handed on by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sdopt import companions
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.report import PassReport
from tests.toolkit import relative_l2, run


def run_pipeline(model: ir.Model, text: str) -> list[PassReport]:
    """Apply passes by the runner, which checks every graph between them."""
    return Pipeline.parse(text).run(model, RunContext(role=Role.DENOISER))


def run_all(
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    carried: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """The first output; with ``carried`` the shallow form on it in place of the main graph."""
    attached = companions.of(model)
    assert attached is not None
    values = dict(feeds)
    for name, (source, axis) in attached.sizes.items():
        values[name] = np.array([feeds[source].shape[axis]], np.int64)
    for one in attached.graphs.values():
        if not one.schedule.in_place:
            values |= outputs(one.model, values)
    if carried is None:
        return outputs(model, values)[attached.outputs[0]]
    shallow = next(o.model for o in attached.graphs.values() if o.schedule.in_place)
    return outputs(shallow, {**values, **carried})[attached.outputs[0]]


def outputs(model: ir.Model, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What one graph gives, by name."""
    names = [value.name or "" for value in model.graph.outputs]
    needed = companions.needed_inputs(model.graph)
    taken = {value.name or "": values[value.name or ""] for value in needed}
    return dict(zip(names, run(model, taken), strict=True))


def same_as(found: np.ndarray, wanted: np.ndarray, half: bool = False) -> None:
    """Bit for bit in float32; in half precision as close as a comparison asks.

    onnxruntime's CPU computes halves in float32 and leaves out the rounding between two nodes of
    one graph, so a value that goes from graph to graph is rounded where it was not.
    """
    assert found.dtype == wanted.dtype
    if half or wanted.dtype == np.float16:
        assert relative_l2(found, wanted) < 5e-3
    else:
        np.testing.assert_array_equal(found, wanted)
