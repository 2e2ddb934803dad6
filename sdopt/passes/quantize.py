"""``quantize``: weights, or weights and activations, as 8- or 4-bit numbers with scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt import graph, recorded
from sdopt.passes import _calibration, _layers, _placing, _quantizing
from sdopt.passes.base import Numerics, Pass, PassContext

_KINDS = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "w8": ir.DataType.INT8,
    "w4": ir.DataType.INT4,
}
_CALIBRATED = ("int8", "fp8")
_FEWEST = 16
"""Of inputs that share a scale in ``w4``: with fewer the scales would outweigh what is saved."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights as integers, and with ``int8`` or ``fp8`` the layers' inputs like them.

    Before / After:
        MatMul(x, Transpose(W))  ->  MatMul(x, Transpose(DequantizeLinear(W', scales)))
        Conv(x, W, b)            ->  Conv(x, DequantizeLinear(W', scales), b)
        x of these, int8, fp8    ->  DequantizeLinear(QuantizeLinear(x))

    Applies when: a Conv, MatMul or Gemm of the main graph has a float weight. A layer that alone
    reads an input of the graph or alone makes an output stays, and so does what ``keep`` names.
    Integers and scales are computed while they are written; nothing else is read, but for
    ``int8`` and ``fp8``: these run the graph on recorded inputs, with a copy of its weights in a
    temporary folder (``TMPDIR``). Only inputs of layers get a QuantizeLinear, so a compiler finds
    the pairs around the matrix products and every other fusion as it was.

    Numerics: lossy. Every output channel has a scale in ``int8``, ``fp8`` and ``w8``, every
    ``block`` numbers along the inputs in ``w4``; an activation has one. Integers are symmetric
    around 0; ``fp8`` is E4M3 (ONNX's FLOAT8E4M3FN) up to 448, of cards from Ada on.

    Options:
        mode: ``int8`` or ``fp8`` (weights and activations), ``w8`` or ``w4`` (weights alone).
        data: what ``sdopt record`` made; ``int8`` and ``fp8`` need it.
        calibrate: an activation's range: the ``percentile`` of its magnitudes, or ``minmax``.
        percentile: that much of the numbers is not cut off.
        activations: ``symmetric``, as TensorRT takes them, or ``asymmetric`` (zero points).
        block: of ``w4``, numbers per scale.
        ends: whether first and last layers are quantized too.
        keep: what stays, joined by ``+``: an operator (``Conv``), or a module path, ``*`` for one
            level (``up_blocks.3+mid_block.attentions.*``).

    Counts: ``linear`` and ``conv``.

    Example:
        sdopt optimize BUNDLE --passes @fast,quantize=w8
    """

    mode: Literal["int8", "fp8", "w8", "w4"]
    data: str | None = None
    calibrate: Literal["percentile", "minmax"] = "percentile"
    percentile: float = 99.99
    activations: Literal["symmetric", "asymmetric"] = "symmetric"
    block: int = 64
    ends: bool = False
    keep: tuple[str, ...] = ()

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    once: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = (
        "lora",
        "clean",
        "raise_ops",
        "fuse_qkv",
        "pad_align",
        "tome",
        "cast_fp16",
        "cast_bf16",
    )

    def __post_init__(self) -> None:
        if self.mode in _CALIBRATED and self.data is None:
            raise ValueError(
                f"{self.mode} is calibrated with recorded data: write data=FOLDER, after "
                "sdopt record BUNDLE --prompts FILE --steps N"
            )
        if self.mode == "fp8" and self.activations == "asymmetric":
            raise ValueError("fp8 has no zero points: activations=symmetric")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and up to 100, not {self.percentile}")
        if self.block < _FEWEST or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two from {_FEWEST}, not {self.block}")

    def reads(self) -> tuple[str, ...]:
        """The digest of the recorded data that decides the activations' ranges."""
        if self.mode not in _CALIBRATED or self.data is None:
            return ()
        return (recorded.index_digest(self.data),)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Choose the layers, find the ranges of what they read, and put integers in."""
        layers = _layers.choose(model, self.keep, self.ends, self._unfit, ctx)
        if not layers:
            return
        if self.mode in _CALIBRATED and not self._quantize_inputs(model, layers, ctx):
            return
        for layer in layers:
            ctx.count(layer.kind)
        places = {(layer.holder, layer.slot): layer for layer in layers}
        for layer in places.values():
            axis, block = (layer.inputs, self.block) if self.mode == "w4" else (layer.outputs, 0)
            grid = _quantizing.Grid(_KINDS[self.mode], axis, block)
            _placing.weight(layer, grid, ctx)
        graph.drop_unused_initializers(model)

    def _unfit(self, layer: _layers.Layer, opset: int) -> str | None:
        """Why a layer cannot be quantized in this mode, or None."""
        least = 21 if self.mode == "w4" else 13
        if layer.tensor.dtype != ir.DataType.FLOAT or self.mode == "fp8":
            least = max(least, 19)
        if opset < least:
            return f"opset {opset} cannot say it, {least} can: raise_ops first"
        if self.mode == "w4" and (fewer := layer.shape[layer.inputs]) < _FEWEST:
            return f"only {fewer} inputs would share a scale"
        return None

    def _quantize_inputs(
        self, model: ir.Model, layers: Sequence[_layers.Layer], ctx: PassContext
    ) -> bool:
        """Put pairs in front of the layers; False if there is nothing recorded to do it with."""
        recording = recorded.open_recording(self.data or "")
        names = frozenset(value.name or "" for value in model.graph.inputs)
        samples = recording.of(names)
        if not samples:
            held = ", ".join(recording.counts()) or "nothing"
            ctx.skip(f"the recording holds {held}, and nothing for this graph", "the whole graph")
            return False
        values = list(dict.fromkeys(layer.x for layer in layers))
        percentile = self.percentile if self.calibrate == "percentile" else None
        symmetric = self.activations == "symmetric"
        found = _calibration.ranges(model, values, recording, samples, percentile, symmetric)
        limits = dict(zip(values, found, strict=True))
        _placing.activations(model, layers, limits, _KINDS[self.mode], ctx)
        ctx.note(f"{len(values)} activations calibrated on {len(samples)} samples")
        return True
