"""``pad_align=pad``: the latent is padded to a multiple that a UNet takes, its output cropped."""

from __future__ import annotations

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _sizes
from sdopt.passes.base import PassContext


def pad(model: ir.Model, levels: int, ctx: PassContext) -> str | None:
    """Repeat the latent's last row and column up to the next multiple of ``2**levels``.

    ``levels`` is how often the UNet halves and doubles its sides. Left alone, with the reason
    returned: a graph with several images in or out (a ControlNet's residuals have sizes of their
    own), one padded already.
    """
    latent, *others = _sizes.latents(model)
    readers = list(latent.uses())
    images = [
        at for at, v in enumerate(model.graph.outputs) if v.shape is None or len(v.shape) == 4
    ]
    reason = None
    if others or len(images) != 1:
        reason = "mode=pad needs a single image input and a single image output"
    elif graph.opset(model) < 11:
        reason = "Pad takes a computed amount from opset 11 on: convert the graph"
    elif any(user.op_type == "Pad" for user, _ in readers):
        reason = "the latent is padded already"
    if reason:
        return reason
    users = {user for user, _ in readers}
    emit = ctx.emitter(next(node for node in model.graph if node in users), "pad_align")
    sides = _sizes.part(emit, emit("Shape", latent), 2, 4)
    multiple = emit.const([2**levels, 2**levels])
    missing = emit("Mod", emit("Sub", multiple, emit("Mod", sides, multiple)), multiple)
    pads = emit("Concat", emit.const([0, 0, 0, 0, 0, 0]), missing, axis=0)
    padded = emit("Pad", latent, pads, mode="edge")
    padded.type = latent.type
    for user, index in readers:
        user.replace_input_with(index, padded)
    ctx.count("padded input")
    _crop(model, images[0], [emit.const([0, 0]), sides, emit.const([2, 3])], ctx)
    return None


def _crop(model: ir.Model, index: int, slicing: list[ir.Value], ctx: PassContext) -> None:
    """Slice a graph output; the slice takes over its name."""
    output = model.graph.outputs[index]
    name, output.name = output.name, ctx.unique(f"{output.name}_padded")
    node = ir.node("Slice", [output, *slicing], name=ctx.unique("pad_align/crop"))
    cropped = node.outputs[0]
    cropped.name, cropped.type, cropped.shape = name, output.type, output.shape
    model.graph.append(node)
    model.graph.outputs[index] = cropped
    ctx.count("cropped output")
