"""Heads that share keys and values: grouped-query attention (Ainslie et al. 2023)."""

from __future__ import annotations

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import ONE, times
from sdopt.passes._raise_shapes import Shapes


def before_repetition(value: ir.Value, shapes: Shapes) -> tuple[ir.Value, int] | None:
    """K or v before Expand and Reshape repeated each head, and how often they did."""
    reshape = graph.producer(value, "Reshape")
    expand = graph.producer(reshape.inputs[0], "Expand") if reshape is not None else None
    flat = expand.inputs[0].producer() if expand is not None and expand.inputs[0] else None
    if reshape is None or expand is None or flat is None:
        return None
    if flat.op_type not in ("Unsqueeze", "Reshape") or flat.inputs[0] is None:
        return None
    dims = [
        shapes.dims(one) for one in (flat.inputs[0], flat.outputs[0], expand.outputs[0], value)
    ]
    source, one, many, last = [list(d) if d is not None else [] for d in dims]
    if len(source) != 4 or len(many) != 5 or len(last) != 4 or many[2].known is None:
        return None
    batch, groups, length, width = source
    plain = (
        one == [batch, groups, ONE, length, width]
        and many == [batch, groups, many[2], length, width]
        and last == [batch, times(groups, many[2]), length, width]
    )
    return (flat.inputs[0], many[2].known) if plain else None
