"""``raise_ops``: attention, norms and activations of any exporter in the form of opset 23."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_activations import raise_gelu
from sdopt.passes._raise_attention import raise_attention
from sdopt.passes._raise_gates import lower_swish, raise_logistic, raise_sigmoid
from sdopt.passes._raise_geglu import raise_geglu
from sdopt.passes._raise_group_norm import absorb_affine, raise_instance_norm
from sdopt.passes._raise_norms import raise_norm
from sdopt.passes._raise_opset import OPSET, upgrade
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import Numerics, Pass, PassContext

_CANONICAL = {
    "Attention": "attention",
    "GroupNormalization": "group_norm",
    "LayerNormalization": "layer_norm",
    "RMSNormalization": "rms_norm",
    "Gelu": "gelu",
}
"""Operators of opset 23 that are the wanted form already, and the kind they count as."""


@dataclass(frozen=True)
class RaiseOps(Pass):
    """Write what other exporters spell out in the one form that opset 23 has for it.

    Before / After:
        opset 9 to 22, local functions                        ->  opset 23, inlined
        MatMul(q, k^T), scale, mask, Softmax, MatMul(., v)    ->  Attention(q, k, v, mask)
        Reshape, InstanceNormalization, Reshape, Mul, Add     ->  GroupNormalization
        ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div      ->  LayerNormalization
        Pow, ReduceMean, Add, Sqrt, Div, Mul                  ->  RMSNormalization
        x * 0.5 * (1 + Erf(x / sqrt(2))), or with Tanh        ->  Gelu
        Slice(p) * Gelu(Slice(p))                             ->  Split(p), Mul(value, Gelu(gate))
        x / (1 + exp(-x)), Sigmoid(x) * x, Swish              ->  Mul(x, Sigmoid(x))

    Applies when: the dataflow is that, whatever its nodes are called; sizes may be numbers or
    computed. Attention is found in 4-D, and in 3-D with the heads in the batch; a norm between
    Casts to float32 becomes one in half precision, which computes in float32 by itself
    (``stash_type`` 1). What nearly matches stays, with the reason. A model with an operator that
    is not known to mean the same in opset 23 is left whole.

    Counts ``attention``, ``group_norm``, ``layer_norm``, ``rms_norm``, ``gelu``, ``geglu``,
    ``silu`` and ``quick_gelu``, those that were there already included. The Gelu of a GEGLU counts
    as both. SiLU and quick-GELU have no operator in opset 23: their form is Sigmoid and Mul with
    x first, which fresh exports have.

    Numerics: reassociated (one kernel sums in another order than several).

    Options: none.
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = ("clean",)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Bring the model to opset 23, then raise what the main graph spells out."""
        if graph.opset(model) < OPSET and not upgrade(model, ctx):
            return
        shapes = Shapes(model.graph)
        for node in list(model.graph):
            if node.graph is not None and node.domain in ("", "ai.onnx"):
                _raise(node, shapes, ctx)
        order = {node: index for index, node in enumerate(model.graph)}
        for node in list(order):
            if node.graph is not None and node.domain in ("", "ai.onnx"):
                _raise_gate(node, shapes, order, ctx)


def _raise(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    op = node.op_type
    if op == "Softmax":
        raise_attention(node, shapes, ctx)
    elif op == "InstanceNormalization":
        raise_instance_norm(node, shapes, ctx)
    elif op in ("Sqrt", "Pow"):
        raise_norm(node, shapes, ctx)
    elif op in ("Erf", "Tanh"):
        raise_gelu(node, shapes, ctx)
    elif op == "GroupNormalization" and absorb_affine(node, shapes, ctx):
        pass
    elif (kind := _CANONICAL.get(op)) is not None:
        ctx.already(kind)


def _raise_gate(
    node: ir.Node, shapes: Shapes, order: Mapping[ir.Node, int], ctx: PassContext
) -> None:
    if node.op_type == "Sigmoid":
        raise_sigmoid(node, shapes, ctx)
    elif node.op_type == "Exp":
        raise_logistic(node, shapes, ctx)
    elif node.op_type == "Swish":
        lower_swish(node, shapes, ctx)
    elif node.op_type == "Gelu":
        raise_geglu(node, shapes, order, ctx)
