"""A weight with low-rank updates added while it is written: ``W + sum(factor * up @ down)``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import weights
from sdopt.adapters.files import Adapter
from sdopt.errors import WeightsError
from sdopt.origins import Leaf
from sdopt.safetensors_header import Entry


@dataclass(frozen=True)
class Update:
    """One adapter at one weight; ``inputs_first`` says that the weight lies as ``[in, out]``.

    ``digest`` is that of the adapter's file.
    """

    adapter: Adapter
    scale: float
    inputs_first: bool
    digest: str

    def factors(self, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
        """``left [rows, rank]`` and ``right [rank, columns]`` whose product is the update.

        They are held whole: the rank bounds them, and it is small beside the weight's sides.
        """
        one = self.adapter
        ratio = one.ratio
        if one.alpha is not None:
            ratio = float(_read(one.alpha, one.key, np.float64).reshape(-1)[0]) / one.rank
        up = _read(one.up, one.key, dtype).reshape(one.up.shape[0], -1) * dtype(self.scale * ratio)
        down = _read(one.down, one.key, dtype).reshape(one.rank, -1)
        if one.mid is not None:
            mid = _read(one.mid, one.key, dtype)
            down = np.tensordot(mid, down, axes=(1, 0))  # [rank, kh, kw, in]
            down = np.moveaxis(down, -1, 1).reshape(mid.shape[0], -1)
        return (down.T, up.T) if self.inputs_first else (up, down)


def updates(
    pairs: Iterable[tuple[Leaf, Adapter]], scale: float, digest: str, where: str
) -> list[tuple[Leaf, Update]]:
    """An update for each weight; ``where`` is the adapter's file, ``digest`` its digest.

    Raises:
        WeightsError: factors that do not fit their weights.
    """
    found = [(leaf, Update(one, scale, leaf.inputs_first, digest)) for leaf, one in pairs]
    wrong = [why for leaf, update in found if (why := misfit(leaf.shape, update))]
    if wrong:
        raise WeightsError(
            f"{len(wrong)} of the adapter's {len(found)} updates do not fit their weights",
            where=where,
            why="\n".join(wrong[:3]),
            hint="the adapter was made for a model of another size",
        )
    return found


def rounded(sums: np.ndarray, dtype: ir.DataType, name: str | None, lower: str) -> np.ndarray:
    """Sums of a weight and updates in the weight's own type; ``lower`` says how to lower a scale.

    Raises:
        WeightsError: one is not finite in it.
    """
    with np.errstate(over="ignore"):
        done: np.ndarray = sums.astype(dtype.numpy())
    if not np.isfinite(done).all():
        raise WeightsError(
            f"{name}: with its adapters it is no longer finite in {dtype}",
            why="an adapter holds inf or NaN, or its scale is too large",
            hint=f"lower the scale: {lower}",
        )
    return done


class Merged(weights.BlockTensor):
    """``base`` with updates, computed in blocks of rows and rounded once, to the base's dtype."""

    def __init__(self, base: ir.TensorProtocol, updates: Sequence[Update]) -> None:
        self.base, self.updates = base, tuple(updates)
        adapters = tuple((one.digest, one.adapter.key, one.scale) for one in updates)
        recipe = weights.Recipe("lora", (base,), (("adapters", adapters),))
        super().__init__(self._rows, base.dtype, base.shape.numpy(), base.name or "", recipe)

    def _rows(self) -> weights.Blocks:
        wide = np.float64 if self.base.dtype == ir.DataType.DOUBLE else np.float32
        shape = self.base.shape.numpy()
        columns = math.prod(shape[1:])
        step = max(1, weights.BLOCK_BYTES // max(1, columns * np.dtype(wide).itemsize))
        factors = [update.factors(wide) for update in self.updates]
        row = 0
        for block in weights.rechunk(weights.read_blocks(self.base), step * columns):
            rows: np.ndarray = block.astype(wide).reshape(-1, columns)
            for left, right in factors:
                rows += left[row : row + len(rows)] @ right
            row += len(rows)
            done = rounded(rows, self.base.dtype, self.name, "lora=FILE:scale=0.5")
            yield done.reshape(-1)


def total(
    shape: Sequence[int], updates: Sequence[Update], dtype: ir.DataType, name: str
) -> weights.BlockTensor:
    """The sum of updates of a weight of that shape, without the weight, in blocks of rows."""
    wide, columns = dtype.numpy(), math.prod(shape[1:])
    step = max(1, weights.BLOCK_BYTES // max(1, columns * wide.itemsize))

    def blocks() -> weights.Blocks:
        factors = [update.factors(wide.type) for update in updates]
        for row in range(0, shape[0], step):
            first, *others = (left[row : row + step] @ right for left, right in factors)
            for one in others:
                first += one
            yield first.reshape(-1)

    return weights.BlockTensor(blocks, dtype, shape, name)


def merge(base: ir.TensorProtocol, update: Update) -> Merged:
    """``base`` with one more update; several are added up before they are rounded."""
    if isinstance(base, Merged):
        return Merged(base.base, (*base.updates, update))
    return Merged(base, (update,))


def misfit(shape: Sequence[int], update: Update) -> str | None:
    """Why an adapter's factors do not fit a weight of that shape, or None."""
    one = update.adapter
    outputs, inputs = shape[0], tuple(shape[1:])
    if update.inputs_first:
        outputs, inputs = shape[1], (shape[0],)
    down, up = one.down.shape, one.up.shape
    ranks: tuple[int, ...] = (one.rank, one.rank)
    kernel = down[1:]
    if one.mid is not None:
        # The kernel is mid's: two kernels in a row are no update of one.
        kernel = (*down[1:2], *one.mid.shape[2:]) if not _trimmed(down[2:]) else ()
        ranks = one.mid.shape[:2]
    fits = (
        one.rank > 0
        and len(ranks) == 2
        and ranks[1] == one.rank
        and _trimmed(up) == _trimmed((outputs, ranks[0]))
        and _trimmed(kernel) == _trimmed(inputs)
        and (one.alpha is None or math.prod(one.alpha.shape) == 1)
    )
    if fits:
        return None
    factors = {"up": one.up, "mid": one.mid, "down": one.down, "alpha": one.alpha}
    shapes = [f"{name} {list(e.shape)}" for name, e in factors.items() if e is not None]
    return f"{one.key} has {', '.join(shapes)}; the weight is {list(shape)}"


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end, so that 1x1 kernels and matrices compare."""
    dims = list(shape)
    while dims and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def _read(entry: Entry, name: str, dtype: type[np.floating]) -> np.ndarray:
    blocks = list(weights.read_blocks(entry.external(name)))
    flat = np.concatenate(blocks) if blocks else np.empty(0)
    return flat.astype(dtype).reshape(entry.shape)
