"""Reading a tensor in blocks: ranges of files, computed tensors, and where a range may lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.errors import WeightsError

BLOCK_BYTES = 4 << 20
"""The most bytes of one tensor that are in memory at once.

Small enough that memory is used again and not mapped anew for each: reading, casting and writing
from a warm cache takes about a quarter less time than with 16 MiB.
"""

INLINE_BYTES = 1024
"""Tensors up to this size live inside the ONNX file, as tools expect of shapes and scalars."""

Blocks = Iterator[np.ndarray]


_RECIPE = "sdopt.recipe"
_LONGEST = 255
"""Characters of a file's name, as file systems have it."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a tensor is made of, and how: the word of an operation, its operands, its options.

    A stage records it for each of its weights (``sdopt.origins``); the words that can be replayed
    there are those of ``sdopt.weights``. Options are what JSON can hold, tuples for lists.
    """

    how: str
    of: tuple[ir.TensorProtocol, ...] = ()
    options: tuple[tuple[str, Hashable], ...] = ()

    def key(self) -> Hashable:
        """Equal for two recipes only if what they make is equal."""
        return (self.how, tuple(map(_kept, self.of)), self.options)


UNKNOWN = Recipe("unknown")
"""Of a tensor that a foreign tool made of nobody knows what."""


class BlockTensor(ir.LazyTensor):
    """A computed tensor that yields its elements in row-major order as flat arrays.

    ``blocks`` is called once per evaluation and must yield exactly ``shape``'s elements. Writing
    (``tofile``) holds one block; ``numpy`` holds the whole tensor and is meant for tests. Two
    tensors of one ``recipe`` hold the same elements, so that one of them is written; without one
    nobody can tell what it was made of, and no adapter can be applied to it later.
    """

    def __init__(
        self,
        blocks: Callable[[], Blocks],
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str = "",
        recipe: Recipe = UNKNOWN,
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
    if isinstance(tensor, BlockTensor) and tensor.recipe is not UNKNOWN:
        return tensor.recipe.key()
    return id(tensor)


def made_by(tensor: ir.TensorProtocol, recipe: Recipe) -> ir.TensorProtocol:
    """Note on a tensor in memory what it was made of; returns it."""
    if isinstance(tensor, ir.Tensor):
        tensor.meta[_RECIPE] = recipe
    return tensor


def recipe_of(tensor: ir.TensorProtocol) -> Recipe | None:
    """What a tensor was made of, or None for one that was not computed."""
    if isinstance(tensor, BlockTensor):
        return tensor.recipe
    found: Recipe | None = tensor.meta.get(_RECIPE) if isinstance(tensor, ir.Tensor) else None
    return found


def _kept(tensor: ir.TensorProtocol) -> Hashable:
    """The identity of an operand; an object stays alive with the key that names it."""
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
    if "\0" in location or len(location) > _LONGEST:
        raise WeightsError(
            f"{tensor.name}: its external data lies in a file that nothing can be called",
            where=repr(location[:80]),
            hint="put the data file beside the ONNX file and store its bare name as location",
        )
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
    if not os.path.isfile(os.path.join(folder, location)):  # a Path drops a slash at the end
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
