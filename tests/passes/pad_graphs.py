"""Small UNet-like graphs for the tests of ``pad_align``, and graphs as lines of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.fingerprint import fingerprint
from sdopt.passes.base import PassContext
from sdopt.passes.pad_align import PadAlign
from tests import toolkit

SKIP_CONV = """
  skip = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (latent, k3)
  down = Conv <kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]> (skip, k3)
"""
UPSAMPLE = "up = Resize <mode='nearest', {modes}> (down, {none}, scales)"
ASYMMETRIC = "coordinate_transformation_mode='asymmetric', nearest_mode='floor'"
JOIN = """
  conv = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (up, k3)
  out = Concat <axis=1> (conv, skip)
"""


def build(
    body: str,
    *,
    opset: int = 18,
    sides: str = "h, w",
    dtype: str = "float",
    scales: str = "1, 1, 2, 2",
) -> ir.Model:
    """A model around ``body``: it may read latent, k3 (a 3x3 kernel) and scales, and makes out."""
    count = len(scales.split(","))
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[b, 2, {sides}] latent, {dtype}[2, 2, 3, 3] k3) => ({dtype}[b, c, hh, ww] out)
        <float[{count}] scales = {{{scales}}}> {{
        {body.replace("'", '"')}
        }}""")


def unet(
    modes: str = ASYMMETRIC, *, joined: str = JOIN, none: str = '""', **options: Any
) -> ir.Model:
    """One halving, one doubling, one skip."""
    upsample = UPSAMPLE.format(modes=modes, none=none).replace('"",', ",")
    return build(SKIP_CONV + upsample + joined, **options)


FRESH = """
  s = Shape(latent) h = Slice(s, i2, i3) w = Slice(s, i3, i4) bc = Slice(s, i0, i2)
"""
NUMBERS = ", ".join(f"int64[1] i{n} = {{{n}}}" for n in range(9)) + ", int64[1] m1 = {-1}"


def tokens(body: str) -> ir.Model:
    """``body`` may read latent, k3, scales, h, w (of the latent), i0 to i8 and m1 (-1)."""
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[b, 2, h, w] latent, float[2, 2, 3, 3] k3, float[4, 4] k)
          => (float[b, c, y, x] out)
        <float[4] scales = {{1, 1, 2, 2}}, {NUMBERS}> {{
        {(SKIP_CONV + FRESH + body).replace("'", '"')}
        }}""")


UP = UPSAMPLE.format(modes=ASYMMETRIC, none="")
HALVES = """
  hm = Sub(h, i1) hd = Div(hm, i2) hh = Add(hd, i1)
  wm = Sub(w, i1) wd = Div(wm, i2) ww = Add(wd, i1)
"""
FROZEN = HALVES + "fh = Mul(hh, i2) fw = Mul(ww, i2) fhw = Mul(fh, fw)"
BLOCK = """
  joined = Concat <axis=1> (up, skip)
  nhwc = Transpose <perm=[0,2,3,1]> (joined)
  b = Slice(s, i0, i1)
  flat = Concat <axis=0> (b, fhw, i4)
  t = Reshape(nhwc, flat)
  split = Concat <axis=0> (b, m1, i2, i2)
  heads = Reshape(t, split)
  swapped = Transpose <perm=[0,1,2,3]> (heads)
  merge = Concat <axis=0> (b, m1, i4)
  merged = Reshape(swapped, merge)
  projected = MatMul(merged, k)
  r = Add(projected, t)
  whole = Concat <axis=0> (b, fh, fw, i4)
  image = Reshape(r, whole)
  out = Transpose <perm=[0,3,1,2]> (image)
"""


def feeds(model: ir.Model, height: int, width: int, dtype: Any = np.float32) -> toolkit.Arrays:
    """Seeded inputs: one latent of that size, and the kernels that the graph declares."""
    rng = np.random.default_rng(0)
    shapes = {str(value.name): tuple(value.shape or ()) for value in model.graph.inputs} | {
        "latent": (1, 2, height, width)
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def run(model: ir.Model, height: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    """The output on a seeded latent of that size, ORT's optimisations off."""
    return toolkit.run(model, feeds(model, height, width, dtype))[0]


def align(model: ir.Model, mode: str = "resize") -> PassContext:
    """Apply the pass; the result passes onnx's checker."""
    return toolkit.apply(PadAlign(mode), model)  # type: ignore[arg-type]


def lines(model: ir.Model) -> list[str]:
    """Each node as ``name = Op(inputs)``; small constants by value, attributes left out."""

    def name(value: ir.Value | None) -> str:
        array = graph.constant(value)
        if array is not None:
            return str(array.tolist()).replace(" ", "")
        return (value.name or "").removeprefix("pad_align/") if value is not None else ""

    return [
        f"{name(node.outputs[0])} = {node.op_type}({', '.join(map(name, node.inputs))})"
        for node in model.graph
    ]


def left_alone(model: ir.Model, mode: str = "resize") -> list[str]:
    """The reasons, after checking that nothing changed."""
    before = fingerprint(model)
    ctx = align(model, mode)
    assert fingerprint(model) == before
    assert ctx.rewrites == {}
    return [*(skip.reason for skip in ctx.skips), *ctx.notes]
