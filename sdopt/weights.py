"""Weights that never pass through memory: byte ranges of files, and tensors computed block-wise.

Two kinds of initializer exist in sdopt: a range of a file (``onnx_ir.ExternalTensor``) and a
``BlockTensor`` whose bytes are produced in blocks of at most ``BLOCK_BYTES`` while it is streamed
to disk. Nothing here holds a whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdopt.blocks import (
    BLOCK_BYTES,
    INLINE_BYTES,
    UNKNOWN,
    Blocks,
    BlockTensor,
    Recipe,
    byte_blocks,
    check_location,
    identity,
    made_by,
    read_blocks,
    rechunk,
)

__all__ = [
    "BLOCK_BYTES",
    "INLINE_BYTES",
    "UNKNOWN",
    "BlockTensor",
    "Blocks",
    "Recipe",
    "byte_blocks",
    "cast",
    "channels_last",
    "check_location",
    "concat",
    "extremes",
    "full",
    "identity",
    "interleave",
    "largest",
    "made_by",
    "read_blocks",
    "rechunk",
    "release",
    "reshape",
    "reshaped",
    "transpose",
]


def cast(
    tensor: ir.TensorProtocol, dtype: ir.DataType, *, saturate: bool = False
) -> ir.TensorProtocol:
    """``tensor`` in another float type, computed block by block when written.

    With ``saturate`` what the type cannot hold becomes its largest finite number (an attention
    mask of ``-inf``, say); without it, infinity, as a plain cast does.
    """
    if tensor.dtype == dtype:
        return tensor
    target = dtype.numpy()
    limit = largest(dtype)

    def blocks() -> Blocks:
        with np.errstate(over="ignore"):
            for block in read_blocks(tensor):
                clipped = np.clip(block, -limit, limit) if saturate else block
                yield clipped.astype(target)

    options = (("to", int(dtype)), ("saturate", saturate))
    recipe = Recipe("cast", (tensor,), options)
    return BlockTensor(blocks, dtype, tensor.shape.numpy(), tensor.name or "", recipe)


def concat(
    tensors: Sequence[ir.TensorProtocol], axis: int = 0, name: str = ""
) -> ir.TensorProtocol:
    """Concatenate along ``axis``, block by block; along 0 the bytes simply follow each other.

    Raises:
        ValueError: the tensors differ in dtype or in a dimension other than ``axis``.
    """
    shapes = [list(tensor.shape.numpy()) for tensor in tensors]
    dtype = tensors[0].dtype
    others = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if len(others) != 1 or any(tensor.dtype != dtype for tensor in tensors):
        raise ValueError(f"cannot concatenate {shapes} along axis {axis}")
    total = sum(shape[axis] for shape in shapes)
    rows = math.prod(shapes[0][:axis])
    widths = [math.prod(shape[axis:]) for shape in shapes]

    def blocks() -> Blocks:
        if rows == 1:
            for tensor in tensors:
                yield from read_blocks(tensor)
            return
        step = max(1, BLOCK_BYTES // (sum(widths) * dtype.numpy().itemsize))
        parts = [rechunk(read_blocks(t), step * w) for t, w in zip(tensors, widths, strict=True)]
        for group in zip(*parts, strict=True):
            columns = [part.reshape(-1, w) for part, w in zip(group, widths, strict=True)]
            yield np.concatenate(columns, axis=1).reshape(-1)

    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    recipe = Recipe("concat", tuple(tensors), (("axis", axis),))
    return BlockTensor(blocks, dtype, shape, name, recipe)


def add(a: ir.TensorProtocol, b: ir.TensorProtocol, name: str = "") -> ir.TensorProtocol:
    """The sum of two tensors of one shape and float type, computed when it is written.

    Raises:
        ValueError: they differ in shape or dtype.
    """
    if a.dtype != b.dtype or list(a.shape.numpy()) != list(b.shape.numpy()):
        raise ValueError(f"cannot add {list(b.shape.numpy())} to {list(a.shape.numpy())}")

    def blocks() -> Blocks:
        for left, right in zip(read_blocks(a), read_blocks(b), strict=True):
            yield (left.astype(np.float32) + right.astype(np.float32)).astype(left.dtype)

    return BlockTensor(blocks, a.dtype, a.shape.numpy(), name, Recipe("add", (a, b)))


def channels_last(tensor: ir.TensorProtocol, name: str = "") -> ir.TensorProtocol:
    """A convolution's ``[O, I, kH, kW]`` as ``[O, kH, kW, I]``, some output channels at a time.

    A 1x1 kernel has the same bytes in both orders: where it is a range of a file it stays one.
    """
    outs, ins, *kernel = (int(size) for size in tensor.shape.numpy())
    shape = (outs, *kernel, ins)
    if math.prod(kernel) == 1 and isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
    width = math.prod((ins, *kernel))
    step = max(1, BLOCK_BYTES // (width * tensor.dtype.numpy().itemsize))

    def blocks() -> Blocks:
        for part in rechunk(read_blocks(tensor), step * width):
            yield np.moveaxis(part.reshape(-1, ins, *kernel), 1, -1).reshape(-1)

    return BlockTensor(blocks, tensor.dtype, shape, name, Recipe("channels_last", (tensor,)))


def transpose(tensor: ir.TensorProtocol, name: str = "") -> BlockTensor:
    """A matrix ``[R, C]`` as ``[C, R]``: some columns at a time, each time reading it all."""
    rows, columns = (int(size) for size in tensor.shape.numpy())
    dtype = tensor.dtype.numpy()
    wide = max(1, BLOCK_BYTES // max(1, rows * dtype.itemsize))
    tall = max(1, BLOCK_BYTES // max(1, columns * dtype.itemsize))

    def blocks() -> Blocks:
        for first in range(0, columns, wide):
            block = np.empty((min(wide, columns - first), rows), dtype)
            row = 0
            for part in rechunk(read_blocks(tensor), tall * columns):
                taken = part.reshape(-1, columns)[:, first : first + wide]
                block[:, row : row + len(taken)] = taken.T
                row += len(taken)
            yield block.reshape(-1)

    recipe = Recipe("transpose", (tensor,))
    return BlockTensor(blocks, tensor.dtype, (columns, rows), name, recipe)


def interleave(
    tensors: Sequence[ir.TensorProtocol], groups: int, axis: int = 0
) -> ir.TensorProtocol:
    """Concatenate along ``axis`` group by group: the first of each tensor, the second of each.

    With the weights of q, k and v and the heads as ``groups``, the rows of one head's q, k and v
    follow each other.

    Raises:
        ValueError: the tensors differ in dtype or shape, or do not divide into ``groups``.
    """
    shape = list(tensors[0].shape.numpy())
    if any(list(tensor.shape.numpy()) != shape for tensor in tensors) or shape[axis] % groups:
        raise ValueError(f"cannot interleave {groups} groups of tensors of the shape {shape}")
    apart = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    whole = concat([reshape(tensor, apart) for tensor in tensors], axis + 1)
    return reshape(whole, (*shape[:axis], shape[axis] * len(tensors), *shape[axis + 1 :]))


def reshape(tensor: ir.TensorProtocol, shape: Sequence[int]) -> BlockTensor:
    """The same elements in another shape, block by block."""
    dims = tuple(int(size) for size in shape)
    recipe = Recipe("reshape", (tensor,), (("shape", dims),))
    name = tensor.name or ""
    return BlockTensor(lambda: read_blocks(tensor), tensor.dtype, dims, name, recipe)


def reshaped(tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.TensorProtocol:
    """The same elements under another shape; a range of a file stays that range.

    Raises:
        ValueError: ``shape`` holds another number of elements.
    """
    if math.prod(shape) != tensor.size:
        raise ValueError(f"{list(shape)} does not hold the elements of {tensor.shape}")
    if isinstance(tensor, ir.ExternalTensor):
        dims = ir.Shape(tuple(shape))
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        return ir.ExternalTensor(
            *place, shape=dims, name=tensor.name or "", base_dir=tensor.base_dir
        )
    if isinstance(tensor, ir.LazyTensor):
        return reshape(tensor, shape)
    array = tensor.numpy().reshape(tuple(shape))
    made = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
    return made_by(made, Recipe("reshape", (tensor,), (("shape", tuple(shape)),)))


def full(shape: Sequence[int], value: float, dtype: ir.DataType, name: str = "") -> BlockTensor:
    """A tensor of ``shape`` filled with ``value``, block by block."""
    size = math.prod(shape)
    step = max(1, BLOCK_BYTES // dtype.numpy().itemsize)

    def blocks() -> Blocks:
        for start in range(0, size, step):
            yield np.full(min(step, size - start), value, dtype.numpy())

    recipe = Recipe("full", (), (("shape", tuple(shape)), ("value", value), ("to", int(dtype))))
    return BlockTensor(blocks, dtype, shape, name, recipe)


def largest(dtype: ir.DataType) -> float:
    """The largest finite number of a float type (65504 for float16)."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def extremes(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """The smallest and the largest value of a float tensor, or 0 if that is further out.

    Reads block by block.
    """
    low = high = 0.0
    for block in read_blocks(tensor):
        if block.size:
            wide = block if block.dtype.itemsize > 2 else block.astype(np.float32)
            low, high = min(low, float(wide.min())), max(high, float(wide.max()))
    return low, high


def release(tensor: ir.TensorProtocol) -> None:
    """Drop the mapping that ``numpy()`` of an external tensor leaves behind."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
