"""The few FX rewrites that let torch's ONNX exporter skip its own decomposition.

``torch.onnx.export`` retraces the whole program twice to decompose it (torch 2.13: half of the
time for a UNet), though all but a handful of operators of these networks have ONNX functions
already. Those few are rewritten here, node by node; a program with an operator that is not in
``DIRECT`` goes through the exporter's decomposition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

aten = torch.ops.aten

_CASTS = {aten.to.device: 2, aten.to.dtype: 1, aten.to.dtype_layout: 1}
"""Spellings of a cast to the position of the dtype among their arguments."""

_COMPOSITE = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.chunk.default,
        aten.concat.default,
        aten.contiguous.default,
        aten.dropout.default,
        *_CASTS,
    }
)
DIRECT = _COMPOSITE | frozenset(
    {
        aten._to_copy.default,
        aten.add.Tensor,
        aten.arange.default,
        aten.arange.start,
        aten.argmax.default,
        aten.cat.default,
        aten.conv2d.default,
        aten.cos.default,
        aten.div.Tensor,
        aten.embedding.default,
        aten.eq.Scalar,
        aten.exp.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.gelu.default,
        aten.group_norm.default,
        aten.index.Tensor,
        aten.layer_norm.default,
        aten.le.Tensor,
        aten.linear.default,
        aten.mul.Tensor,
        aten.pad.default,
        aten.permute.default,
        aten.reshape.default,
        aten.scaled_dot_product_attention.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.sin.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.sym_size.int,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.upsample_nearest2d.vec,
        aten.view.default,
        operator.add,
        operator.floordiv,
        operator.getitem,
        operator.mul,
        operator.sub,
    }
)
"""Operators that have an ONNX function or a rewrite here; none writes to its inputs."""


def lower(program: ExportedProgram) -> bool:
    """Rewrite the composite operators in place; False if the program needs decomposing."""
    graph = program.graph_module.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.target not in DIRECT for node in calls) or any(map(_needs_decomposing, calls)):
        return False
    for node in calls:
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.contiguous.default, aten.dropout.default):
            _forward(graph, node)
        elif node.target is aten.concat.default:
            node.target = aten.cat.default
        elif (position := _CASTS.get(node.target)) is not None:
            given = len(node.args) > position
            dtype = node.args[position] if given else node.kwargs["dtype"]
            if node.args[0].meta["val"].dtype == dtype:
                _forward(graph, node)
            else:
                node.target = aten._to_copy.default
                node.args, node.kwargs = node.args[:1], {"dtype": dtype}
        elif node.target is aten.chunk.default:
            source, chunks, dim = (*node.args, 0)[:3]
            size = source.meta["val"].shape[dim]
            node.target, node.args = aten.split.Tensor, (source, -(-size // chunks), dim)
    program.graph_module.recompile()
    # The exporter decomposes by calling this method, and does nothing else with the program.
    program.run_decompositions = _already_lowered(program)
    return True


def _already_lowered(program: ExportedProgram) -> Callable[..., ExportedProgram]:
    def run_decompositions(*_: object) -> ExportedProgram:
        return program

    return run_decompositions


def _needs_decomposing(node: Any) -> bool:
    """Whether the node is a dropout that is on, or splits a size that is not known yet."""
    if node.target is aten.dropout.default:
        return bool(node.args[2])
    if node.target is aten.chunk.default:
        dim = node.args[2] if len(node.args) > 2 else 0
        return not isinstance(node.args[0].meta["val"].shape[dim], int)
    return False


def _forward(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)
