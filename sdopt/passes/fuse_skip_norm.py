"""``fuse_skip_norm``: the residual Add, and the bias before it, inside the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._skip_norm import MICROSOFT, bias_as_skip, gathered_bias, sides, without_bias
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Let onnxruntime's skip norms add the residual (and a bias) that they then normalise.

    Before / After:
        s = Add(x, skip); LayerNormalization(s)   ->  SkipLayerNormalization(x, skip)
        s = Add(Add(x, b), skip); LayerNorm...    ->  SkipLayerNormalization(x, skip, b)
        s = Add(NhwcConv(., W, b), skip); Group.. ->  SkipGroupNorm(NhwcConv(., W), skip, b)
        s = Add(x, t of [B, 1, 1, C]); GroupNorm  ->  SkipGroupNorm(x, t)
        LayerNormalization(Reshape(NhwcConv(., W, b)))
            ->  SkipLayerNormalization(Reshape(NhwcConv(., W)), b of [S, C])

    Applies when: both sides of the Add have one shape, or the skip of a group norm is one number a
    channel; the norm runs over the last axis (LayerNormalization) or is com.microsoft's
    channels-last GroupNorm, as ``lower_channels_last`` makes it. Others may still read the sum.
    Biases on both sides are added up. onnxruntime's CPU has SkipLayerNormalization only.

    Numerics: reassociated.

    Options: none.
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "tome",
        "cast_fp16",
        "cast_bf16",
        "lower_channels_last",
    )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Fuse every norm of the main graph whose input is a sum."""
        for node in list(model.graph):
            kind = _kind(node)
            source = node.inputs[0].producer() if kind is not None and node.inputs[0] else None
            if kind is None or source is None or node.graph is None:
                continue
            reason: str | None = "nothing is added in front of it"
            if source.op_type == "Add":
                if reason := _fuse(source, node, kind, ctx):
                    ctx.skip(reason, node, kind)
            elif source.op_type == "Reshape" and _fuse_bias(source, node, kind, ctx):
                reason = None
            if reason is None:
                model.opset_imports[MICROSOFT] = 1
                ctx.count(kind)


def _kind(node: ir.Node) -> str | None:
    if node.op_type == "LayerNormalization" and node.domain in ("", "ai.onnx"):
        return "layer_norm"
    last = graph.attribute(node, "channels_last", 0)
    is_group_norm = node.op_type == "GroupNorm" and node.domain == MICROSOFT and last
    return "group_norm" if is_group_norm else None


def _unfit(norm: ir.Node, kind: str) -> str | None:
    """Why the kernel cannot compute this norm, or None."""
    if kind == "layer_norm":
        last = (graph.rank(norm.inputs[0]) or 0) - 1
        if graph.attribute(norm, "axis", -1) not in (-1, last):
            return "it does not run over the last axis alone"
        if len(norm.outputs) > 1 and any(out.uses() for out in norm.outputs[1:]):
            return "its mean or deviation is read"
    if any(v is not None and v.producer() is not None for v in norm.inputs[1:]):
        return "its scale or bias is computed, not a weight"
    return None


def _fuse(add: ir.Node, norm: ir.Node, kind: str, ctx: PassContext) -> str | None:
    """Fuse, or say why not."""
    found = sides(add, kind)
    if isinstance(found, str):
        return found
    if reason := _unfit(norm, kind):
        return reason
    emit = ctx.emitter(add, f"{graph.module_path(norm)}/fuse_skip_norm")
    main, bias = without_bias(found[0], kind, emit)
    skip = found[1]
    if kind == "group_norm":
        skip, bias = gathered_bias(bias, skip, emit)
    _write(add, norm, kind, (main, skip, bias), emit)
    return None


def _fuse_bias(flat: ir.Node, norm: ir.Node, kind: str, ctx: PassContext) -> bool:
    """Let the norm of a convolution's pixels add its bias, which others then read as its sum."""
    if kind != "layer_norm" or _unfit(norm, kind) is not None:
        return False
    emit = ctx.emitter(flat, f"{graph.module_path(norm)}/fuse_skip_norm")
    if (found := bias_as_skip(norm, emit)) is None:
        return False
    _write(flat, norm, kind, (*found, None), emit)
    return True


def _write(
    source: ir.Node,
    norm: ir.Node,
    kind: str,
    operands: tuple[ir.Value, ir.Value, ir.Value | None],
    emit: graph.Emitter,
) -> None:
    """The skip norm in the place of ``norm`` and of ``source``, whose sum others may read."""
    main, skip, bias = operands
    total, scale = source.outputs[0], norm.inputs[1]
    shift = norm.inputs[2] if len(norm.inputs) > 2 else None
    read = total.is_graph_output() or len(list(total.consumers())) > 1
    last = [bias] if bias is not None else []
    if kind == "layer_norm":
        made = emit.many(
            "SkipLayerNormalization",
            *(main, skip, scale, shift, *last),
            outputs=4 if read else 1,
            domain=MICROSOFT,
            epsilon=float(graph.attribute(norm, "epsilon", 1e-5)),
        )
    else:
        kept = {name: attr.value for name, attr in norm.attributes.items()}
        made = emit.many(
            "SkipGroupNorm",
            *(main, scale, shift, skip, *last),
            outputs=2 if read else 1,
            domain=MICROSOFT,
            **kept,
        )
    for value, old in ((made[-1], total), (made[0], norm.outputs[0])):
        value.type, value.shape = old.type, old.shape
    for unused in made[1:-1]:
        unused.name = ""
    graph.replace_uses(norm.outputs[0], made[0])
    if read:
        graph.replace_uses(total, made[-1])
    graph.remove_dead([norm, source])
