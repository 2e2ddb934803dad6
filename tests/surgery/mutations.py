"""Mistakes that the rewrites could make: planted where nodes are emitted, or in what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph

Inputs = list[ir.Value | None]
Emit = Callable[..., ir.Value]
Edit = Callable[[Inputs, dict[str, Any], Emit], None]
"""Changes inputs and attributes of a node that is about to be emitted; may emit others first."""


@contextmanager
def planted(op_type: str, edit: Edit) -> Iterator[list[str]]:
    """While it is open every ``op_type`` is emitted with the mistake; yields the modules hit."""
    hit: list[str] = []
    many = graph.Emitter.many

    def mutated(
        self: graph.Emitter,
        op: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        given = list(inputs)
        if op == op_type and not domain:
            hit.append(self.module)
            edit(given, attributes, _emitter(self, many))
        return many(self, op, *given, outputs=outputs, domain=domain, **attributes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph.Emitter, "many", mutated)
        yield hit


def _emitter(emitter: graph.Emitter, many: Callable[..., Sequence[ir.Value]]) -> Emit:
    def emit(op: str, *values: Any, **attributes: Any) -> ir.Value:
        given = [emitter.const(v, v.dtype) if isinstance(v, np.ndarray) else v for v in values]
        return many(emitter, op, *given, outputs=1, **attributes)[0]

    return emit


def swap(first: int, second: int) -> Edit:
    """Two inputs change places."""

    def edit(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
        inputs[first], inputs[second] = inputs[second], inputs[first]

    return edit


def drop(index: int) -> Edit:
    """An optional input at the end is left out."""

    def edit(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
        assert inputs[index] is not None
        del inputs[index:]

    return edit


def attribute(name: str, change: Callable[[Any], Any]) -> Edit:
    """An attribute has another value; ``change`` is given the right one or None."""

    def edit(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
        attributes[name] = change(attributes.get(name))

    return edit


def scaled(index: int, factor: float) -> Edit:
    """An input is off by a factor."""

    def edit(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
        inputs[index] = emit("Mul", inputs[index], np.array(factor, np.float32))

    return edit


def heads_reversed(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
    """The values of ``[B, heads, S, D]`` come in another order of heads than q and k."""
    inputs[2] = emit("Gather", inputs[2], np.array([3, 2, 1, 0]), axis=1)


def ones_for(index: int) -> Edit:
    """A parameter is forgotten: ones are there instead."""

    def edit(inputs: Inputs, attributes: dict[str, Any], emit: Emit) -> None:
        inputs[index] = emit("Div", inputs[index], inputs[index])

    return edit


def geglu_halves(model: ir.Model) -> int:
    """The other half of each GEGLU's projection gates."""
    gelus = [node for node in model.graph if node.op_type == "Gelu"]
    for gelu in gelus:
        split = graph.producer(gelu.inputs[0], "Split")
        assert split is not None
        (mul,) = (user for user in gelu.outputs[0].consumers() if user.op_type == "Mul")
        value, gate = split.outputs
        gelu.replace_input_with(0, value)
        mul.replace_input_with(list(mul.inputs).index(value), gate)
    return len(gelus)


def skip_order(model: ir.Model) -> int:
    """Skip connections are concatenated in front, not behind."""
    found = [
        node
        for node in model.graph
        if node.op_type == "Concat"
        and len(node.inputs) == 2
        and graph.attribute(node, "axis") == 1
    ]
    for node in found:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
    return len(found)


def residual(model: ir.Model) -> int:
    """What is added behind a projection is lost: twice the new, none of the old."""
    found = 0
    for node in model.graph:
        if node.op_type != "Add":
            continue
        projected = [_is_projection(value) for value in node.inputs]
        if projected.count(True) == 1:
            new = projected.index(True)
            node.replace_input_with(1 - new, node.inputs[new])
            found += 1
    return found


def _is_projection(value: ir.Value | None) -> bool:
    """Whether it is MatMul(x, W) + b."""
    add = graph.producer(value, "Add")
    return add is not None and any(graph.producer(one, "MatMul") for one in add.inputs)
