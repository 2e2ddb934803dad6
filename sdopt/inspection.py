"""The verb ``inspect``: what a bundle or an ONNX file holds; weights are read only if asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt import companions, graph, modelfile
from sdopt.bundle import Bundle, Stage
from sdopt.manifest import RECORD_KEY
from sdopt.nonfinite import NonFinite, nonfinite


def inspect(
    path: str | Path, component: str | None = None, *, weights: bool = False
) -> dict[str, Any]:
    """Describe a bundle (its components and stages) or one ONNX file, as plain data.

    With ``weights`` every weight is read, and those that hold NaN or infinity are listed under
    ``nonfinite``: name, how many of which, of how many.

    Raises:
        SdoptError: neither a bundle nor an ONNX file.
    """
    where = Path(path)
    check = _Check(weights)
    if where.suffix == ".onnx":
        model = modelfile.load(where)
        data = {"file": str(where), **describe(model), **check(model)}
        data["record"] = model.metadata_props.get(RECORD_KEY)
        return data
    bundle = Bundle.open(where)
    names = [component] if component else list(bundle.components)
    return {
        "bundle": str(where),
        "origin": bundle.manifest.origin,
        "family": bundle.manifest.family,
        "components": {
            name: {
                "role": bundle.entry(name).role,
                "stages": [
                    _stage(bundle, bundle.stage(name, stage), check)
                    for stage in bundle.stages(name)
                ],
            }
            for name in names
        },
    }


def describe(model: ir.Model) -> dict[str, Any]:
    """Signature, operator counts and bytes of weights of one graph, and of its companions."""
    data = _describe_graph(model)
    if (attached := companions.of(model)) is not None:
        data["companions"] = [
            {"name": name, "schedule": one.schedule.text, **_describe_graph(one.model)}
            for name, one in attached.graphs.items()
        ]
    return data


def _describe_graph(model: ir.Model) -> dict[str, Any]:
    tensors = [value.const_value for value in modelfile.initializers(model)]
    return {
        "opset": graph.opset(model),
        "inputs": [_signature(value) for value in model.graph.inputs],
        "outputs": [_signature(value) for value in model.graph.outputs],
        "nodes": sum(1 for _ in graph.nodes(model)),
        "ops": graph.op_counts(model),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors if tensor is not None),
    }


class _Check:
    """What ``nonfinite`` finds in one graph after the other; nothing where that is off."""

    def __init__(self, on: bool) -> None:
        self._on = on
        self._seen: dict[Hashable, NonFinite | None] = {}

    def __call__(self, model: ir.Model) -> dict[str, Any]:
        if not self._on:
            return {}
        graphs = companions.family(model)
        found = {one for graph in graphs for one in nonfinite(graph, self._seen)}
        ordered = sorted(found, key=lambda one: one.name)
        return {"nonfinite": [dataclasses.asdict(one) for one in ordered]}


def _stage(bundle: Bundle, stage: Stage, check: _Check) -> dict[str, Any]:
    record = stage.record
    return {
        "name": stage.name,
        "file": str(stage.path.relative_to(bundle.path)),
        "digest": stage.digest,
        "made_from": record.source_stage or "the checkpoint",
        "stale": bundle.is_stale(stage),
        "dtype": record.dtype,
        "history": [step.spec for step in record.history],
        "versions": record.versions,
        **describe(model := stage.load()),
        **check(model),
    }


def _signature(value: ir.Value) -> dict[str, Any]:
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or []]
    return {"name": value.name, "dtype": str(value.dtype), "shape": dims}
