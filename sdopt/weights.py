"""Weights that never pass through memory: byte ranges of files, and tensors computed block-wise.

Two kinds of initializer exist in sdopt: a range of a file (``onnx_ir.ExternalTensor``) and a
``BlockTensor`` whose bytes are produced in blocks of at most ``BLOCK_BYTES`` while it is streamed
to disk. Nothing here holds a whole weight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdopt.errors import WeightsError

BLOCK_BYTES = 16 << 20
"""The most bytes of one tensor that are in memory at once."""

INLINE_BYTES = 1024
"""Tensors up to this size live inside the ONNX file, as tools expect of shapes and scalars."""

Blocks = Iterator[np.ndarray]


class BlockTensor(ir.LazyTensor):
    """A computed tensor that yields its elements in row-major order as flat arrays.

    ``blocks`` is called once per evaluation and must yield exactly ``shape``'s elements. Writing
    (``tofile``) holds one block; ``numpy`` holds the whole tensor and is meant for tests. Two
    tensors of one ``recipe`` hold the same elements, so that one of them is written.
    """

    def __init__(
        self,
        blocks: Callable[[], Blocks],
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str = "",
        recipe: Hashable = None,
    ) -> None:
        self._blocks = blocks
        self.recipe = recipe
        dims = ir.Shape(tuple(shape))
        super().__init__(self._gather, dtype=dtype, shape=dims, name=name)

    def blocks(self) -> Blocks:
        """The elements, in order, as flat arrays of the tensor's dtype."""
        return self._blocks()

    def _gather(self) -> ir.TensorProtocol:
        parts = list(self._blocks())
        flat = np.concatenate(parts) if parts else np.empty(0, self.dtype.numpy())
        array = flat.reshape(self.shape.numpy())
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


def identity(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for two tensors only if they hold the same elements: range, recipe, or object."""
    if isinstance(tensor, ir.ExternalTensor):
        place = (os.path.realpath(tensor.path), tensor.offset or 0)
        return (*place, tensor.dtype, tuple(tensor.shape.numpy()))
    if isinstance(tensor, BlockTensor) and tensor.recipe is not None:
        return tensor.recipe
    return id(tensor)


def read_blocks(tensor: ir.TensorProtocol, block_bytes: int = BLOCK_BYTES) -> Blocks:
    """Yield ``tensor``'s elements as flat arrays of at most ``block_bytes`` bytes.

    An external tensor is read with plain reads at its offset, so no mapping of the file stays
    resident (mapping it would count the whole file into RSS and, under a limit on the address
    space, fail for large files).

    Raises:
        WeightsError: the file is shorter than the tensor says.
    """
    if isinstance(tensor, BlockTensor):
        yield from tensor.blocks()
        return
    dtype = tensor.dtype.numpy()
    step = max(1, block_bytes // dtype.itemsize)
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        flat = tensor.numpy().reshape(-1)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]
        return
    check_location(tensor)
    with open(tensor.path, "rb", buffering=0) as file:
        position, left = tensor.offset or 0, tensor.nbytes
        while left:
            count = min(left, step * dtype.itemsize)
            data = os.pread(file.fileno(), count, position)
            data = data[: len(data) - len(data) % dtype.itemsize]
            if not data:
                raise WeightsError(
                    f"{tensor.name}: the weights file ends before the tensor does",
                    where=tensor.path,
                    why=f"{left} bytes are missing at offset {position}",
                    hint="the file is truncated: download or copy it again",
                )
            yield np.frombuffer(data, dtype)
            position += len(data)
            left -= len(data)


def byte_blocks(tensor: ir.TensorProtocol) -> Blocks:
    """``tensor``'s bytes as a file holds them, block by block: 4-bit numbers two to a byte.

    The first of two is in the low half (ONNX, ``TensorProto.raw_data``).
    """
    blocks = read_blocks(tensor)
    if tensor.dtype.bitwidth == 4:
        # Blocks of an even number of elements, so that no byte lies in two of them.
        for block in rechunk(blocks, BLOCK_BYTES):
            halves = np.zeros(block.size + block.size % 2, np.uint8)
            halves[: block.size] = block.view(np.uint8) & 0x0F
            yield halves[0::2] | (halves[1::2] << 4)
        return
    for block in blocks:
        yield np.ascontiguousarray(block).view(np.uint8)


def check_location(tensor: ir.ExternalTensor) -> None:
    """Refuse an external tensor that leaves its folder or does not fit in its file.

    Raises:
        WeightsError: absolute or ``..`` location, link out of the folder, missing or short file.
    """
    location, folder = str(tensor.location), Path(tensor.base_dir or ".")
    path = folder / location
    inside = not os.path.isabs(location) and os.path.realpath(path).startswith(
        os.path.join(os.path.realpath(folder), "")
    )
    if not inside:
        raise WeightsError(
            f"{tensor.name}: its external data lies outside the model's folder",
            where=location,
            why="a model may only read weights beside its own ONNX file",
            hint="put the data file beside the ONNX file and store its bare name as location",
        )
    if not path.is_file():
        raise WeightsError(
            f"{tensor.name}: its external data file is missing",
            where=str(path),
            hint="copy the data file beside the ONNX file",
        )
    end = (tensor.offset or 0) + tensor.nbytes
    if (tensor.offset or 0) < 0 or end > path.stat().st_size:
        raise WeightsError(
            f"{tensor.name}: its bytes lie past the end of the weights file",
            where=f"{path} ({path.stat().st_size} bytes, {end} needed)",
            hint="the file is truncated or belongs to another model: copy it again",
        )


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

    recipe = ("cast", _kept(tensor), dtype, saturate)
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
    recipe = ("concat", tuple(map(_kept, tensors)), axis)
    return BlockTensor(blocks, dtype, shape, name, recipe)


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

    return BlockTensor(blocks, tensor.dtype, shape, name=name)


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
    return BlockTensor(lambda: read_blocks(tensor), tensor.dtype, shape, name=tensor.name or "")


def rechunk(blocks: Iterable[np.ndarray], count: int) -> Blocks:
    """The same elements in flat arrays of exactly ``count``, the last one shorter."""
    held: list[np.ndarray] = []
    size = 0
    for block in blocks:
        held.append(block)
        size += block.size
        if size >= count:
            joined = np.concatenate(held)
            whole = joined.size - joined.size % count
            for start in range(0, whole, count):
                yield joined[start : start + count]
            held, size = [joined[whole:]], joined.size - whole
    if size:
        yield np.concatenate(held)


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
        return BlockTensor(lambda: read_blocks(tensor), tensor.dtype, shape, tensor.name or "")
    return ir.Tensor(tensor.numpy().reshape(tuple(shape)), dtype=tensor.dtype, name=tensor.name)


def full(shape: Sequence[int], value: float, dtype: ir.DataType, name: str = "") -> BlockTensor:
    """A tensor of ``shape`` filled with ``value``, block by block."""
    size = math.prod(shape)
    step = max(1, BLOCK_BYTES // dtype.numpy().itemsize)

    def blocks() -> Blocks:
        for start in range(0, size, step):
            yield np.full(min(step, size - start), value, dtype.numpy())

    recipe = ("full", tuple(shape), value, dtype)
    return BlockTensor(blocks, dtype, shape, name, recipe)


def _kept(tensor: ir.TensorProtocol) -> Hashable:
    """The identity of an operand; an object stays alive with the recipe that names it."""
    known = identity(tensor)
    return _Object(tensor) if isinstance(known, int) else known


class _Object:
    """A tensor that is only itself; holding it keeps its ``id`` from being given away."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


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
