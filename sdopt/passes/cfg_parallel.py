"""``cfg_parallel``: a graph for one half of guidance's doubled batch, for two devices at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _batch_axes, _batch_rules
from sdopt.passes._batch_axes import Batch, Unproven
from sdopt.passes.base import Interface, Numerics, Pass, PassContext, Role

KIND = "batch"


@dataclass(frozen=True)
class CfgParallel(Pass):
    """Compute one half of the batch that classifier-free guidance doubles.

    Before / After:
        sample [2n, C, H, W], prompts [2n, S, E]  ->  [n, C, H, W], [n, S, E]
        Reshape(x, [2n, S, heads, D])             ->  Reshape(x, [n, S, heads, D])
        a graph with a dynamic batch              ->  the same; the stage's record says the rest

    ``sdopt run --device A,B`` hands the unconditional half to A and the conditional one to B,
    and both compute at the same time. With one device such a stage computes its halves in turn.

    Applies when: the first input ``[B, C, H, W]`` has a fixed, even batch. The batch is followed
    from there through every operator, and each constant that is proven to hold it is halved: a
    2 that is no batch stays. Where it cannot be followed (an operator of another domain, a
    constant that differs along the batch, arithmetic on shapes that ``clean`` would fold) the
    graph is left as it is.

    Numerics: reassociated: a product of fewer rows may sum in another order.

    Options: none.

    Counts: ``batch``.

    Example:
        sdopt optimize BUNDLE --passes clean,cfg_parallel
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.MODEL})
    interface: ClassVar[Interface] = Interface.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean", "raise_ops")
    once: ClassVar[bool] = True

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Follow the batch from the latents; change nothing unless that succeeds."""
        latents = next((v for v in model.graph.inputs if len(v.shape or ()) == 4), None)
        if latents is None or latents.shape is None:
            ctx.skip("no input is [B, C, H, W]", "the whole graph", KIND)
            return
        size = latents.shape[0]
        if not isinstance(size, int):
            ctx.already(KIND)
            ctx.note(f"{latents.name} has a dynamic batch: every half of one fits this graph")
            return
        if size % 2:
            ctx.skip(f"a batch of {size} has no halves", latents.name or "", KIND)
            return
        batch = Batch(model)
        try:
            batch.start(latents)
            _batch_rules.follow(batch)
        except Unproven as error:
            ctx.skip(error.reason, error.node, KIND)
            return
        _halve_constants(batch, ctx)
        _halve_entries(batch, ctx)
        for value, axis in batch.axes.items():
            _halve_shape(value, axis)
        graph.drop_unused_initializers(model)
        ctx.count(KIND)
        count = sum(value in batch.axes for value in model.graph.inputs)
        ctx.note(f"{count} inputs and {len(batch.entries)} shapes hold half of {size} now")


def _halve_constants(batch: Batch, ctx: PassContext) -> None:
    """Where the batch meets a constant, let it read the first of that one's equal halves."""
    for value, axis in list(batch.axes.items()):
        half = _batch_axes.halved(value, axis) if _batch_axes.is_constant(value) else None
        if half is None:
            continue
        del batch.axes[value]
        for user, index in tuple(value.uses()):
            if any(output in batch.axes for output in user.outputs):
                emit = ctx.emitter(user, value.name or "constant")
                user.replace_input_with(index, emit.weight(ir.tensor(half), "half"))


def _halve_entries(batch: Batch, ctx: PassContext) -> None:
    for (node, slot), entries in batch.entries.items():
        vector = graph.constant(node.inputs[slot])
        if vector is None:
            raise TypeError("a shape that was read is a constant")
        flat = vector.reshape(-1)
        flat[list(entries)] //= 2
        emit = ctx.emitter(node, f"{node.name}/half")
        node.replace_input_with(slot, emit.const(flat.reshape(vector.shape), np.int64))


def _halve_shape(value: ir.Value, axis: int) -> None:
    if value.shape is None:
        return
    dims = list(value.shape)
    if isinstance(size := dims[axis], int):
        dims[axis] = size // 2
        value.shape = ir.Shape(dims)
