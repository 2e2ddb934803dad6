"""Token merging in the operators of Ascend's MindIE: FindMax, TomeMerged and TomeUnmerge(d).

The wiring is that of ``modify_onnx.py`` in Ascend/ModelZoo-PyTorch's stable_diffusion; the
prototypes are MindIE's. The operators live in the standard domain, have no attributes, take
float16 tokens and int64 indices, and merge half of all tokens (their ``topRRate``). Sizes are
constants of the graph: one graph, one size.

Letters in shapes as in ``_token_merging``: N tokens, S sources and D destinations, of which
``R = N // 2`` sources are merged.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from sdopt.graph import FLOAT32_KEY, Emitter
from sdopt.passes._self_attention import Site
from sdopt.passes._token_merging import PRIME, TINY

HALF, FLOAT, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
RATE = 0.5
MAX_BATCH, MAX_TOKENS, MULTIPLE = 64, 4096, 16
SLICES = 8
"""TomeMerged hands out its sums in this many parts."""

Generation = Literal["cann7", "cann8"]
UNMERGE: Mapping[Generation, str] = {"cann7": "TomeUnmerge", "cann8": "TomeUnmerged"}
"""The operator was renamed with CANN 8.0.RC1."""

OPERATORS = frozenset({"FindMax", "TomeMerged", *UNMERGE.values()})


@dataclass(frozen=True)
class Partition:
    """Which tokens are sources and destinations, as initializers that all blocks share.

    Attributes:
        sources, destinations: token numbers in order ``[S]`` and ``[D]``.
        per_batch: the same for every batch entry, ``[B, S]`` and ``[B, D]``.
        count: S, as TopK's k ``[1]``: all sources are ordered, the first R are merged.
        sizes: B, S and D.
        dtype: the element type of the tokens.
        unmerge: the operator that restores all tokens.
    """

    sources: ir.Value
    destinations: ir.Value
    per_batch: tuple[ir.Value, ir.Value]
    count: ir.Value
    sizes: tuple[int, int, int]
    dtype: ir.DataType
    unmerge: str

    @property
    def merged(self) -> int:
        """How many sources are merged."""
        return (self.sizes[1] + self.sizes[2]) // 2


def drawn(cells: int, seed: int) -> np.ndarray:
    """Which of its four tokens each 2x2 cell gives up, 0 to 3: as the standard spelling draws."""
    draw = random.Random(seed)
    value = np.arange(cells)
    for _ in range(2):
        value = (value + draw.randrange(PRIME)) % PRIME
        value = value * value % PRIME * value % PRIME
    return value * 4 // PRIME


def split_tokens(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources ``[S]`` and destinations ``[D]`` of a map, both in order."""
    rows, columns = height // 2, width // 2
    slot, cell = drawn(rows * columns, seed), np.arange(rows * columns)
    row, column = cell // columns * 2 + slot // 2, cell % columns * 2 + slot % 2
    destinations = np.sort(row * width + column)
    return np.setdiff1d(np.arange(height * width), destinations), destinations


def refusal(site: Site) -> str | None:
    """Why the kernels cannot merge around this attention."""
    known, size = _size(site), channels(site.tokens)
    if len(known) < 3:
        return (
            "its batch, height and width are not fixed, and Ascend's kernels hold one size: "
            "give the graph's inputs fixed sizes, or merge with spelling=standard"
        )
    if site.tokens.dtype not in (FLOAT, HALF):
        found = "not known" if site.tokens.dtype is None else site.tokens.dtype.name.lower()
        return f"its type is {found}, and Ascend's kernels merge in float16"
    batch, height, width = known
    if size is None or size % MULTIPLE:
        return f"its channels are {size}, and Ascend's kernels take multiples of {MULTIPLE}"
    destinations = (height // 2) * (width // 2)
    sources = height * width - destinations
    if batch > MAX_BATCH:
        return f"its batch size is {batch}, and Ascend's kernels take up to {MAX_BATCH}"
    if max(sources, destinations) > MAX_TOKENS:
        return f"it has {sources} sources, and Ascend's kernels take up to {MAX_TOKENS}"
    return None if destinations else "its map is thinner than a 2x2 cell"


def partition(emit: Emitter, site: Site, seed: int, generation: Generation) -> Partition:
    """The initializers for the size of the map that ``site`` works on."""
    batch, height, width = _size(site)
    a, b = split_tokens(height, width, seed)

    def tensor(array: np.ndarray, hint: str) -> ir.Value:
        return emit.weight(ir.tensor(np.ascontiguousarray(array, np.int64)), hint)

    return Partition(
        sources=tensor(a, "Gather_index_a"),
        destinations=tensor(b, "Gather_index_b"),
        per_batch=(
            tensor(np.tile(a, (batch, 1)), "index_a"),
            tensor(np.tile(b, (batch, 1)), "index_b"),
        ),
        count=tensor(np.array([len(a)]), "Topk_k"),
        sizes=(batch, len(a), len(b)),
        dtype=site.tokens.dtype or FLOAT,
        unmerge=UNMERGE[generation],
    )


def _size(site: Site) -> tuple[int, ...]:
    """What is known of batch, height and width."""
    shape = site.image.shape
    dims = [] if shape is None else [shape[axis] for axis in (0, 2, 3)]
    return tuple(dim for dim in dims if isinstance(dim, int))


def merge(
    emit: Emitter, part: Partition, hidden: ir.Value, tokens: ir.Value
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    """Nodes that match on ``hidden`` and merge ``tokens`` (both ``[B, N, C]``).

    Every source's best destination is found, all sources are ordered by how alike they are, the
    most alike first, and the first half of all tokens is averaged into its destinations. Norms
    and means are computed in float32, as in the standard spelling; the kernels take float16.

    Returns:
        The kept sources followed by the destinations ``[B, S - R + D, C]``; and the order of the
        sources with the destination of each, both ``[B, S]``, for ``unmerge``.
    """
    (b, s, d), kept = part.sizes, part.sizes[1] - part.merged
    kind, c, wide, n = part.dtype, channels(tokens), channels(hidden), s + d
    x = _cast(emit, hidden, FLOAT, b, n, wide)
    squares = _stay(emit("Mul", x, x), b, n, wide)
    total = _stay(emit("ReduceSum", squares, emit.const([-1]), keepdims=1), b, n, 1)
    norm = _stay(emit("Sqrt", total), b, n, 1)
    unit = _stay(emit("Div", x, _stay(emit("Max", norm, _tiny(emit)), b, n, 1)), b, n, wide)
    unit = _cast(emit, unit, HALF, b, n, wide)
    first = _say(emit("Gather", unit, part.sources, axis=1), HALF, b, s, wide)
    second = _say(emit("Gather", unit, part.destinations, axis=1), HALF, b, d, wide)
    second = _say(emit("Transpose", second, perm=[0, 2, 1]), HALF, b, wide, d)
    scores = _say(emit("MatMul", first, second), HALF, b, s, d)
    likeness, match = emit.many("FindMax", scores, outputs=2)
    _say(likeness, HALF, b, s)
    _say(match, INT64, b, s)
    best, order = emit.many("TopK", likeness, part.count, outputs=2, axis=-1, largest=1)
    _say(best, HALF, b, s)
    _say(order, INT64, b, s)

    a_tokens = _say(emit("Gather", tokens, part.sources, axis=1), kind, b, s, c)
    b_tokens = _say(emit("Gather", tokens, part.destinations, axis=1), kind, b, d, c)
    alone, sums, counts = emit.many(
        "TomeMerged",
        _cast(emit, a_tokens, HALF, b, s, c),
        _cast(emit, b_tokens, HALF, b, d, c),
        order,
        match,
        outputs=3,
    )
    _say(alone, HALF, b, kept, c)
    _say(sums, HALF, b, SLICES, d, c)
    _stay(counts, b, SLICES, d)
    axis = emit.const([1])
    parts = _cast(emit, sums, FLOAT, b, SLICES, d, c)
    whole = _stay(emit("ReduceSum", parts, axis, keepdims=0), b, d, c)
    count = _stay(emit("ReduceSum", counts, axis, keepdims=0), b, d)
    count = _stay(emit("Unsqueeze", count, emit.const([2])), b, d, 1)
    mean = _cast(emit, _stay(emit("Div", whole, count), b, d, c), kind, b, d, c)
    alone = _cast(emit, alone, kind, b, kept, c)
    merged = _say(emit("Concat", alone, mean, axis=1), kind, b, kept + d, c)
    return merged, (order, match)


def unmerge(
    emit: Emitter,
    part: Partition,
    value: ir.Value,
    found: tuple[ir.Value, ir.Value],
    c: int | None,
) -> ir.Value:
    """Nodes that give every token its merged value ``[B, N, C]``."""
    b, s, d = part.sizes
    half = _cast(emit, value, HALF, b, s - part.merged + d, c, given=part.dtype)
    full = _say(emit(part.unmerge, half, *part.per_batch, *found), HALF, b, s + d, c)
    return _cast(emit, full, part.dtype, b, s + d, c)


def channels(value: ir.Value) -> int | None:
    """The size of the last axis."""
    size = value.shape[-1] if value.shape is not None else None
    return size if isinstance(size, int) else None


def _tiny(emit: Emitter) -> ir.Value:
    return emit.const(TINY, np.float32)


def _say(value: ir.Value, dtype: ir.DataType, *shape: int | None) -> ir.Value:
    """Write type and shape down: nobody can infer them behind operators that ONNX lacks."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value


def _stay(value: ir.Value, *shape: int | None) -> ir.Value:
    """A float32 value that stays so when the graph is cast later."""
    node = value.producer()
    if node is not None:
        node.metadata_props[FLOAT32_KEY] = "similarities and means of merged tokens"
    return _say(value, FLOAT, *shape)


def _cast(
    emit: Emitter,
    value: ir.Value,
    to: ir.DataType,
    *shape: int | None,
    given: ir.DataType | None = None,
) -> ir.Value:
    if (given or value.dtype) == to:
        return value
    return _say(emit("Cast", value, to=int(to)), to, *shape)
