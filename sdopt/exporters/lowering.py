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

_RENAMED = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.concat.default: aten.cat.default,
    aten.min.other: aten.minimum.default,
}
"""Spellings of an operator to the one that has an ONNX function."""

_COMPOSITE = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.chunk.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.einsum.default,
        *_CASTS,
        *_RENAMED,
    }
)
DIRECT = _COMPOSITE | frozenset(
    {
        aten._to_copy.default,
        aten.abs.default,
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
        aten.full_like.default,
        aten.gelu.default,
        aten.group_norm.default,
        aten.gt.Scalar,
        aten.index.Tensor,
        aten.layer_norm.default,
        aten.le.Tensor,
        aten.linear.default,
        aten.log.default,
        aten.lt.Scalar,
        aten.minimum.default,
        aten.mul.Tensor,
        aten.pad.default,
        aten.permute.default,
        aten.reshape.default,
        aten.rms_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.sin.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.sub.Tensor,
        aten.sym_size.int,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.upsample_nearest2d.vec,
        aten.view.default,
        aten.where.self,
        operator.add,
        operator.floordiv,
        operator.getitem,
        operator.mul,
        operator.sub,
    }
)
"""Operators that have an ONNX function or a rewrite here; none writes to its inputs."""


_OF_FLOATS = frozenset(
    {
        *(aten.cos.default, aten.div.Tensor, aten.exp.default, aten.log.default),
        *(aten.sigmoid.default, aten.sin.default),
    }
)
"""Operators that give floats whatever they are given."""
_ELEMENTWISE = _OF_FLOATS | frozenset(
    {
        *(aten.add.Tensor, aten.cat.default, aten.eq.Scalar, aten.gelu.default),
        *(aten.gt.Scalar, aten.le.Tensor, aten.lt.Scalar, aten.minimum.default),
        *(aten.mul.Tensor, aten.silu.default, aten.sub.Tensor, aten.where.self),
    }
)


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
        elif node.target in _RENAMED:
            node.target = _RENAMED[node.target]
        elif (position := _CASTS.get(node.target)) is not None:
            given = len(node.args) > position
            dtype = node.args[position] if given else node.kwargs["dtype"]
            if node.args[0].meta["val"].dtype == dtype:
                _forward(graph, node)
            else:
                node.target = aten._to_copy.default
                node.args, node.kwargs = node.args[:1], {"dtype": dtype}
        elif node.target is aten.einsum.default:
            axes = _permutation(*node.args[:2])
            node.target, node.args = aten.permute.default, (node.args[1][0], axes)
            node.kwargs = {}
        elif node.target is aten.chunk.default:
            source, chunks, dim = (*node.args, 0)[:3]
            size = source.meta["val"].shape[dim]
            node.target, node.args = aten.split.Tensor, (source, -(-size // chunks), dim)
    program.graph_module.recompile()
    # The exporter decomposes by calling this method, and does nothing else with the program.
    program.run_decompositions = _already_lowered(program)
    if not any(map(_promotes, graph.nodes)):
        # Then the exporter interprets each of these once more to make the types of operands equal
        # (torch 2.13: a quarter of the time), which they are.
        program.graph_module.modules = lambda: iter(())
    return True


def _promotes(node: torch.fx.Node) -> bool:
    """Whether an elementwise operator has operands whose types torch would have to make equal."""
    if node.op != "call_function" or node.target not in _ELEMENTWISE:
        return False
    given: Any = node.args[0] if node.target is aten.cat.default else node.args
    values = list(given)
    values = values[1:] if node.target is aten.where.self else values
    found = [value.meta["val"] if isinstance(value, torch.fx.Node) else value for value in values]
    dtypes = {one.dtype for one in found if isinstance(one, torch.Tensor)}
    floating = any(dtype.is_floating_point for dtype in dtypes)
    wide = any(isinstance(one, float | torch.SymFloat) for one in found)
    return len(dtypes) > 1 or (not floating and (wide or node.target in _OF_FLOATS))


def _already_lowered(program: ExportedProgram) -> Callable[..., ExportedProgram]:
    def run_decompositions(*_: object) -> ExportedProgram:
        return program

    return run_decompositions


def _needs_decomposing(node: Any) -> bool:
    """Whether the node is a dropout that is on, a real product of an einsum, or an odd split."""
    if node.target is aten.dropout.default:
        return bool(node.args[2])
    if node.target is aten.add_.Tensor:
        # Into a value of its own that nobody else reads, it is a plain sum.
        return len(node.args[0].users) > 1 or node.args[0].target is not aten.add.Tensor
    if node.target is aten.einsum.default:
        return _permutation(*node.args[:2]) is None
    if node.target is aten.chunk.default:
        dim = node.args[2] if len(node.args) > 2 else 0
        return not isinstance(node.args[0].meta["val"].shape[dim], int)
    return False


def _permutation(equation: str, operands: list[Any]) -> list[int] | None:
    """The axes of an einsum that only reorders those of its one operand, else None."""
    before, _, after = equation.replace(" ", "").partition("->")
    if len(operands) != 1 or "." in before or len(set(before)) != len(before):
        return None
    return [before.index(letter) for letter in after] if sorted(before) == sorted(after) else None


def _forward(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)
