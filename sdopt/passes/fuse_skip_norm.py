"""``fuse_skip_norm``: the residual Add, and the bias before it, inside the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._skip_norm import MICROSOFT, sides, without_bias
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Let onnxruntime's skip norms add the residual (and a bias) that they then normalise.

    Before / After:
        s = Add(x, skip); LayerNormalization(s)   ->  SkipLayerNormalization(x, skip)
        s = Add(Add(x, b), skip); LayerNorm...    ->  SkipLayerNormalization(x, skip, b)
        s = Add(NhwcConv(., W, b), skip); Group.. ->  SkipGroupNorm(NhwcConv(., W), skip, b)
        s = Add(x, t of [B, 1, 1, C]); GroupNorm  ->  SkipGroupNorm(x, t)

    Applies when: both sides of the Add have one shape, or the skip of a group norm is one number a
    channel; the norm runs over the last axis (LayerNormalization) or is com.microsoft's
    channels-last GroupNorm, as ``lower_channels_last`` makes it. Others may still read the sum.
    onnxruntime has SkipLayerNormalization for CPU and CUDA, SkipGroupNorm for CUDA.

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
            if kind is None or node.graph is None:
                continue
            add = graph.producer(node.inputs[0], "Add")
            if add is None:
                continue
            if reason := _fuse(add, node, kind, ctx):
                ctx.skip(reason, node, kind)
            else:
                model.opset_imports[MICROSOFT] = 1
                ctx.count(kind)


def _kind(node: ir.Node) -> str | None:
    if node.op_type == "LayerNormalization" and node.domain in ("", "ai.onnx"):
        return "layer_norm"
    last = graph.attribute(node, "channels_last", 0)
    is_group_norm = node.op_type == "GroupNorm" and node.domain == MICROSOFT and last
    return "group_norm" if is_group_norm else None


def _fuse(add: ir.Node, norm: ir.Node, kind: str, ctx: PassContext) -> str | None:
    """Fuse, or say why not."""
    total = add.outputs[0]
    found = sides(add, kind)
    if isinstance(found, str):
        return found
    if kind == "layer_norm":
        if graph.attribute(norm, "axis", -1) not in (-1, (graph.rank(total) or 0) - 1):
            return "it does not run over the last axis alone"
        if len(norm.outputs) > 1 and any(out.uses() for out in norm.outputs[1:]):
            return "its mean or deviation is read"
    scale = norm.inputs[1]
    if any(v is not None and v.producer() is not None for v in norm.inputs[1:]):
        return "its scale or bias is computed, not a weight"
    emit = ctx.emitter(add, f"{graph.module_path(norm)}/fuse_skip_norm")
    main, bias = without_bias(found[0], kind, emit)
    skip, shift = found[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    epsilon = float(graph.attribute(norm, "epsilon", 1e-5))
    read = total.is_graph_output() or len(list(total.consumers())) > 1
    if kind == "layer_norm":
        made = emit.many(
            "SkipLayerNormalization",
            *(main, skip, scale, shift, *([bias] if bias is not None else [])),
            outputs=4 if read else 1,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
    else:
        kept = {name: attr.value for name, attr in norm.attributes.items()}
        made = emit.many(
            "SkipGroupNorm",
            *(main, scale, shift, skip, *([bias] if bias is not None else [])),
            outputs=2 if read else 1,
            domain=MICROSOFT,
            **kept,
        )
    for value, old in ((made[0], norm.outputs[0]), (made[-1], total)):
        value.type, value.shape = old.type, old.shape
    made[0].type, made[0].shape = norm.outputs[0].type, norm.outputs[0].shape
    for unused in made[1:-1]:
        unused.name = ""
    graph.replace_uses(norm.outputs[0], made[0])
    if read:
        graph.replace_uses(total, made[-1])
    graph.remove_dead([norm, add])
    return None
