"""``pad_align``: make a UNet traced at a multiple of 64 pixels right at every multiple of 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _padding, _sizes, _unflatten, _upsamplers
from sdopt.passes.base import Numerics, Pass, PassContext, Role

_REPEAT = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
"""How torch's nearest interpolation picks pixels, for a doubling as for any other size."""


@dataclass(frozen=True)
class PadAlign(Pass):
    """Let an adopted UNet take any multiple of 8 pixels, not just those it was traced for.

    Three stride-2 convolutions make ``ceil(n / 8)`` of a latent side, three doublings make at
    most 7 too many of it. diffusers gives the upsampler the skip's size when a side is no multiple
    of 8, in a Python ``if`` that tracing at a multiple freezes to False. Then ORT says
    ``/up_blocks.1/Concat: 16 != 15``, and what flattens and restores tokens may hold frozen
    arithmetic such as ``2*((H-1)//8)+2`` (torch's dynamo exporter).

    Before / After:
        Resize(x, scales=2) -> Conv -> Concat(skip)   ->  Resize(x, sizes of x and skip)
        Reshape(x, [B, frozen, C])                    ->  Reshape(x, [B, -1, C])
        Reshape(x, [B, frozen, frozen, C])            ->  ... H and W of what was flattened

    Applies when: a nearest doubling meets a skip in a Concat over channels. Left alone: other
    interpolation, upsamplers without a skip (a VAE's), arithmetic that is exact (``crop`` slices
    a Resize to the skip's size too), and everything where height and width are fixed.

    Numerics: exact; ``mode=pad`` is another function and lossy.

    Options:
        mode: ``resize`` to the skip's size; ``crop`` by 2 and slice to it, the same result, for
            compilers that want constant scales; ``pad`` the latent, crop the output.

    Counts: ``upsampler``, and ``baked_size``, a Reshape whose sizes hold only where it was traced.

    Example:
        sdopt optimize unet.onnx -o aligned.onnx --passes clean,pad_align
    """

    mode: Literal["resize", "crop", "pad"] = "resize"

    numerics: ClassVar[Numerics] = Numerics.EXACT
    roles: ClassVar[frozenset[Role]] = frozenset((Role.DENOISER, Role.MODEL))

    def exactness(self) -> Numerics:
        """Padding the latent changes what the network sees at its border."""
        return Numerics.LOSSY if self.mode == "pad" else self.numerics

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Align the upsamplers first; a graph without any is no UNet and stays as it is."""
        upsamplers = _upsamplers.find(model)
        sizes, free = _sizes.of_inputs(model), bool(_sizes.latents(model))
        faults = [_upsamplers.fault(upsampler, sizes, model) for upsampler in upsamplers]
        wrong = []
        for upsampler, fault in zip(upsamplers, faults, strict=True):
            if isinstance(fault, str):
                ctx.skip(fault, upsampler.node, "upsampler")
            elif free and (fault or (self.mode == "crop" and _takes_sizes(upsampler.node))):
                wrong.append(upsampler)
            else:
                ctx.already("upsampler")
        if True in faults and not free:
            ctx.note("height and width are fixed in this graph, so its tensors always meet")
        if self.mode == "pad":
            if wrong:
                _pad(model, wrong, ctx)
        elif upsamplers and free:
            stale = _align(wrong, self.mode, ctx)
            stale += _unflatten.restore(model, sizes, ctx)
            _forget_sizes(model, stale)


def _takes_sizes(node: ir.Node) -> bool:
    """Whether a Resize that meets its skip does so by a size: pixel by pixel that doubled, cut."""
    modes = {key: graph.attribute(node, key) for key in _REPEAT}
    return len(node.inputs) > 3 and modes == _REPEAT


def _pad(model: ir.Model, upsamplers: list[_upsamplers.Upsampler], ctx: PassContext) -> None:
    """Give the upsamplers a latent that they double exactly."""
    reason = _padding.pad(model, len(upsamplers), ctx)
    for upsampler in upsamplers:
        if reason is None:
            ctx.count("upsampler")
        else:
            ctx.skip(reason, upsampler.node, "upsampler")


def _align(upsamplers: list[_upsamplers.Upsampler], mode: str, ctx: PassContext) -> list[ir.Value]:
    """Give each upsampler its skip's size; returns the new outputs."""
    opset, aligned = graph.opset(ctx.model), []
    for upsampler in upsamplers:
        node, skip = upsampler.node, upsampler.skip
        if opset < (11 if mode == "resize" else 10):
            hint = "pad_align=crop" if opset == 10 else "a newer opset"
            reason = f"opset {opset} has no Resize to a computed size: use {hint}"
            ctx.skip(reason, node, "upsampler")
            continue
        emit = ctx.emitter(node, "pad_align")
        source, result = node.inputs[0], node.outputs[0]
        sides = _sizes.part(emit, emit("Shape", skip), 2, 4)
        modes = _REPEAT if opset > 10 else {"mode": "nearest"}
        # Resize 11 and 12 want unused inputs as empty tensors; 10 has no roi, 13 may leave it out.
        empty = emit.const([], np.float32) if opset in (11, 12) else None
        if mode == "resize":
            target = emit("Concat", _sizes.part(emit, emit("Shape", source), 0, 2), sides, axis=0)
            new = emit("Resize", source, empty, empty, target, **modes)
        else:
            roi = [empty] if opset > 10 else []
            doubled = emit("Resize", source, *roi, emit.const([1, 1, 2, 2], np.float32), **modes)
            doubled.type = result.type
            new = emit("Slice", doubled, emit.const([0, 0]), sides, emit.const([2, 3]))
        new.type, new.shape = result.type, result.shape
        graph.replace_uses(result, new)
        graph.remove_dead([node])
        ctx.count("upsampler")
        aligned.append(new)
    return aligned


def _forget_sizes(model: ir.Model, changed: list[ir.Value]) -> None:
    """Drop symbolic heights and widths that no longer hold from all that follows ``changed``.

    ORT's memory planner lets tensors with equal symbols share a buffer, so a symbol must not lie.
    """
    named = {str(dim) for v in model.graph.inputs for dim in v.shape or ()}
    stale = set(changed)
    for node in model.graph:
        if any(value in stale for value in node.inputs if value is not None):
            stale.update(node.outputs)
    for value in stale:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) or str(d) in named else None for d in value.shape]
            )
