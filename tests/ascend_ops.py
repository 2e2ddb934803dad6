"""Ascend's operators as onnx's ReferenceEvaluator can run them, with the limits of the kernels.

Written from the operator prototypes, in numpy, without knowledge of how sdopt emits them:
``FlashAttentionTik`` (Ascend/MindIE-SD, csrc/ops/tik), ``UnpadFlashAttentionMix``,
``SliceTransGeluMul``, ``FindMax``, ``TomeMerged``, ``TomeUnmerge`` and ``TomeUnmerged`` (MindIE),
``AscendQuant`` and ``AscendDequant`` (ops-nn) with the int8 products between them.
They live in the standard domain and have no attributes. A kernel that is given what it cannot
take raises, as Ascend's compiler would refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv as reference_conv

SLICES = 8
"""TomeMerged hands out this many partial sums; the first holds the destinations themselves."""


class _Kernel(OpRun):
    op_domain = ""
    real = np.float16
    """What the kernels compute in; ``precise`` makes twins in float32."""

    def check_real(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            assert array.dtype == self.real, f"{type(self).__name__} was given {array.dtype}"


def _within(value: int, low: int, high: int, what: str) -> None:
    assert low <= value <= high, f"{what} is {value}, not {low} to {high}"


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Attention of ``[..., S, D]`` in float64, rounded once."""
    wide = [array.astype(np.float64) for array in (q, k, v)]
    scores = wide[0] @ np.swapaxes(wide[1], -1, -2) * scale
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True) @ wide[2]).astype(q.dtype)


class FlashAttentionTik(_Kernel):
    """``[B, heads, S, D]``; does not scale."""

    def _run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray]:
        self.check_real(q, k, v)
        assert q.ndim == k.ndim == v.ndim == 4
        assert k.shape == v.shape
        assert q.shape[:2] == k.shape[:2]
        assert q.shape[3] == k.shape[3]
        _within(q.shape[0], 1, 64, "batch")
        _within(q.shape[1], 1, 4096, "heads")
        _within(max(q.shape[2], k.shape[2]), 1, 131072, "length")
        assert q.shape[3] in {40, 48, 64, 72, 80, 128, 160, 512}
        return (_attend(q, k, v, 1.0),)


class UnpadFlashAttentionMix(_Kernel):
    """``[B, S, heads, D]``; scales by ``1 / sqrt(D)``."""

    def _run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray]:
        self.check_real(q, k, v)
        assert q.shape == k.shape == v.shape
        batch, length, heads, size = q.shape
        _within(batch, 1, 2, "batch")
        _within(length, 1024, 4096, "length")
        _within(heads, 5, 10, "heads")
        assert size in (40, 64)
        first = [np.swapaxes(array, 1, 2) for array in (q, k, v)]
        return (np.ascontiguousarray(np.swapaxes(_attend(*first, size**-0.5), 1, 2)),)


class SliceTransGeluMul(_Kernel):
    """``[B, S, 2C]`` to ``[B, S, C]``: the first half times the quick-GELU of the second."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        self.check_real(x)
        assert x.ndim == 3
        assert x.shape[1] % 16 == 0
        assert x.shape[2] % 32 == 0
        left, gate = np.split(x.astype(np.float64), 2, axis=-1)
        return ((left * gate / (1 + np.exp(-1.702 * gate))).astype(x.dtype),)


class FindMax(_Kernel):
    """The maximum over the last axis, and where it is first."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.check_real(x)
        return x.max(-1), x.argmax(-1).astype(np.int64)


def _check_tome(
    batch: int, a: int, b: int, width: int, order: np.ndarray, match: np.ndarray
) -> int:
    _within(batch, 1, 64, "batch")
    _within(max(a, b), 1, 4096, "sources or destinations")
    assert width % 16 == 0
    assert order.dtype == match.dtype == np.int64
    assert order.shape == match.shape == (batch, a)
    assert match.min() >= 0
    assert match.max() < b
    assert (np.sort(order, -1) == np.arange(a)).all(), "not a permutation of the sources"
    return (a + b) // 2


class TomeMerged(_Kernel):
    """Adds the first half of all tokens, in ``order``, to the destinations that they match."""

    def _run(
        self, a: np.ndarray, b: np.ndarray, order: np.ndarray, match: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.check_real(a, b)
        batch, sources, width = a.shape
        merged = _check_tome(batch, sources, b.shape[1], width, order, match)
        sums = np.zeros((batch, SLICES, *b.shape[1:]), np.float64)
        counts = np.zeros((batch, SLICES, b.shape[1]), np.float32)
        sums[:, 0], counts[:, 0] = b, 1
        for entry in range(batch):
            for rank, source in enumerate(order[entry, :merged]):
                place = (entry, rank % SLICES, match[entry, source])
                sums[place] += a[entry, source]
                counts[place] += 1
        kept = np.take_along_axis(a, order[:, merged:, None], axis=1)
        return kept, sums.astype(a.dtype), counts


class TomeUnmerge(_Kernel):
    """Copies what was computed for kept tokens and destinations back to every token."""

    def _run(
        self,
        x: np.ndarray,
        index_a: np.ndarray,
        index_b: np.ndarray,
        order: np.ndarray,
        match: np.ndarray,
    ) -> tuple[np.ndarray]:
        self.check_real(x)
        batch, a, b = x.shape[0], index_a.shape[1], index_b.shape[1]
        merged = _check_tome(batch, a, b, x.shape[2], order, match)
        assert index_a.dtype == index_b.dtype == np.int64
        assert index_a.shape[0] == index_b.shape[0] == batch
        assert x.shape[1] == a - merged + b
        out = np.full((batch, a + b, x.shape[2]), np.nan, x.dtype)
        for entry in range(batch):
            first, last = order[entry, :merged], order[entry, merged:]
            kept, means = x[entry, : a - merged], x[entry, a - merged :]
            out[entry, index_b[entry]] = means
            out[entry, index_a[entry, last]] = kept
            out[entry, index_a[entry, first]] = means[match[entry, first]]
        assert not np.isnan(out).any(), "the indices do not cover every token"
        return (out,)


class TomeUnmerged(TomeUnmerge):
    """The name since CANN 8.0."""


class AscendQuant(OpRun):
    """``round(x * scale + offset)`` as int8."""

    op_domain = ""

    def _run(self, x: np.ndarray, scale: float, offset: float, **_: Any) -> tuple[np.ndarray]:
        assert x.dtype in (np.float16, np.float32)
        whole = np.rint(x.astype(np.float32) * np.float32(scale) + np.float32(offset))
        return (np.clip(whole, -128, 127).astype(np.int8),)


class AscendDequant(OpRun):
    """An int32 times a float32 that lies in the low bits of a uint64, for each channel."""

    op_domain = ""

    def _run(self, x: np.ndarray, deq_scale: np.ndarray, dtype: int = 0) -> tuple[np.ndarray]:
        assert x.dtype == np.int32
        assert deq_scale.dtype == np.uint64
        assert deq_scale.ndim == 1
        assert not (deq_scale >> np.uint64(32)).any()
        scale = deq_scale.astype(np.uint32).view(np.float32)
        column = scale.reshape(-1, 1, 1) if x.ndim == 4 else scale
        return ((x * column.astype(np.float64)).astype([np.float32, np.float16][dtype]),)


class MatMul(OpRun):
    """The product of int8 is int32, as the cube unit sums it."""

    op_domain = ""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        wide = np.int32 if a.dtype == np.int8 else a.dtype
        return (np.matmul(a.astype(wide), b.astype(wide)),)


class Gemm(OpRun):
    """The same, or ``alpha * a @ b + beta * c`` of floats."""

    op_domain = ""

    def _run(
        self,
        a: np.ndarray,
        b: np.ndarray,
        c: np.ndarray | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        **transposed: int,
    ) -> tuple[np.ndarray]:
        left = a.T if transposed.get("transA") else a
        right = b.T if transposed.get("transB") else b
        if a.dtype == np.int8:
            assert c is None
            return (left.astype(np.int32) @ right.astype(np.int32),)
        out = (left @ right) * np.asarray(alpha, a.dtype)
        return (out if c is None else out + c * np.asarray(beta, a.dtype),)


class Conv(reference_conv.Conv):
    """The same; float64 holds these sums exactly."""

    op_domain = ""

    def _run(self, x: np.ndarray, w: np.ndarray, *rest: Any, **given: Any) -> tuple[np.ndarray]:
        if x.dtype != np.int8:
            return super()._run(x, w, *rest, **given)  # type: ignore[no-any-return]
        (out,) = super()._run(x.astype(np.float64), w.astype(np.float64), *rest, **given)
        return (np.asarray(out).astype(np.int32),)


KERNELS = (
    FlashAttentionTik,
    UnpadFlashAttentionMix,
    SliceTransGeluMul,
    FindMax,
    TomeMerged,
    TomeUnmerge,
    TomeUnmerged,
)

QUANTIZED = (AscendQuant, AscendDequant, MatMul, Gemm, Conv)


class Cast(OpRun):
    """A Cast that keeps float32 where float16 is asked for."""

    op_domain = ""

    def _run(self, x: np.ndarray, to: int, **_: Any) -> tuple[np.ndarray]:
        wanted = ir.DataType.FLOAT if to == ir.DataType.FLOAT16 else ir.DataType(to)
        return (x.astype(wanted.numpy()),)


def run(
    model: ir.Model, feeds: Mapping[str, np.ndarray], *, precise: bool = False
) -> list[np.ndarray]:
    """The outputs of a model with Ascend's operators.

    With ``precise`` nothing is rounded to float16, so that a float32 graph shows what it computes
    to the last bits: kernels take float32, and a Cast to float16 does nothing.
    """
    ops: list[type[OpRun]] = [*KERNELS, *QUANTIZED]
    if precise:
        ops = [type(op.__name__, (op,), {"real": np.float32}) for op in KERNELS]
        ops.append(Cast)
    proto = onnx.load_from_string(ir.to_proto(model).SerializeToString())
    return [
        np.asarray(out) for out in ReferenceEvaluator(proto, new_ops=ops).run(None, dict(feeds))
    ]
