"""A size of a tensor as a product of a number and unknowns, and arithmetic with such sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir


class Dim(NamedTuple):
    """``number`` times unknown sizes; equal ones are equal at every input."""

    number: int
    unknowns: tuple[Hashable, ...] = ()

    @property
    def known(self) -> int | None:
        """The number if there is no unknown in it."""
        return None if self.unknowns else self.number


Dims = Sequence[Dim]
ONE = Dim(1)


def named(name: str) -> Dim:
    """A size that has a name; torch's dynamo exporter calls a product ``2*s77*s53``."""
    parts = name.split("*")
    if not all(part.isidentifier() or (part.isdigit() and int(part)) for part in parts):
        return Dim(1, (("name", name),))
    size = ONE
    for part in parts:
        size = times(size, Dim(int(part)) if part.isdigit() else Dim(1, (("name", part),)))
    return size


def times(a: Dim, b: Dim) -> Dim:
    """The product."""
    return Dim(a.number * b.number, tuple(sorted((*a.unknowns, *b.unknowns), key=repr)))


def over(a: Dim, b: Dim) -> Dim:
    """The quotient; an unknown of its own where it does not come out even."""
    rest = list(a.unknowns)
    for unknown in b.unknowns:
        if unknown not in rest:
            return Dim(1, (("over", a, b),))
        rest.remove(unknown)
    if b.number == 0 or (a.number % b.number and (rest or a.number < 0 or b.number < 0)):
        return Dim(1, (("over", a, b),))
    return Dim(a.number // b.number, tuple(rest))


def arithmetic(op: str, first: Dims, second: Dims) -> Dims | None:
    """Mul, Div, Add or Sub, element by element."""
    size = max(len(first), len(second))
    if any(len(side) not in (1, size) for side in (first, second)):
        return None
    pairs = [(first[i % len(first)], second[i % len(second)]) for i in range(size)]
    if op == "Mul":
        return [times(a, b) for a, b in pairs]
    if op == "Div":
        return [over(a, b) for a, b in pairs]
    sign = 1 if op == "Add" else -1
    return [
        Dim(a.number + sign * b.number)
        if a.known is not None and b.known is not None
        else Dim(1, ((op, a, b),))
        for a, b in pairs
    ]


def sliced(first: Dims, given: Sequence[Dims | None]) -> Dims | None:
    """A vector from a start to an end, which must be known, in steps of 1."""
    if any(part is None or len(part) != 1 or part[0].known is None for part in given):
        return None
    numbers = [part[0].number for part in given if part is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return list(first)[numbers[0] : numbers[1]] if step == 1 and len(numbers) > 1 else None


def broadcast(a: Dims, b: Dims, new: Callable[[int], Dim]) -> Dims:
    """The shape of ``a + b``; ``new`` makes an unknown for an axis that may be either."""
    size = max(len(a), len(b))
    a, b = [[ONE] * (size - len(side)) + list(side) for side in (a, b)]
    out = []
    for axis, (x, y) in enumerate(zip(a, b, strict=True)):
        if x == y or y == ONE:
            out.append(x)
        elif x == ONE or y.number > 1:  # a multiple of 2 or more is never 1
            out.append(y)
        else:
            out.append(x if x.number > 1 else new(axis))
    return out


def equal(first: Dims | None, second: Dims | None) -> Dims | None:
    """1 where two vectors of sizes hold the same one, 0 where they never do.

    A size of a tensor is not negative, so it is never the -1 that exporters ask for.
    """
    if first is None or second is None or len(first) != len(second):
        return None
    found = []
    for a, b in zip(first, second, strict=True):
        never = any(
            x.known is not None and x.number < 0 and y.unknowns for x, y in ((a, b), (b, a))
        )
        if a != b and not never and (a.known is None or b.known is None):
            return None
        found.append(Dim(int(a == b)))
    return found


def _is_size(dim: Dim) -> bool:
    """Whether it is a product of sizes of tensors, and no difference or other computed number."""
    return dim.number >= 0 and all(
        isinstance(one, tuple) and one[0] in ("name", "dim") for one in dim.unknowns
    )


def filled(length: Dims | None, fill: ir.TensorProtocol | None) -> Dims | None:
    """ConstantOfShape: a short vector of one whole number."""
    count = length[0].known if length is not None and len(length) == 1 else None
    if fill is None or count is None or not fill.dtype.is_integer() or count > 16:
        return None
    return [Dim(int(fill.numpy().reshape(-1)[0]))] * count


def chosen(parts: Sequence[Dims | None]) -> Dims | None:
    """Where: of two vectors the elements that a vector of 1 and 0 chooses."""
    whole = [part for part in parts if part is not None]
    if len(whole) != 3 or len({len(part) for part in whole}) > 1:
        return None
    condition, a, b = whole
    if any(c.known not in (0, 1) for c in condition):
        return None
    return [x if c.number else y for c, x, y in zip(condition, a, b, strict=True)]


def einsum_dims(
    equation: str, dims: Sequence[Dims | None], new: Callable[[int], Dim]
) -> Dims | None:
    """The shape of an Einsum without an ellipsis; what broadcasts gets a size of its own."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    sizes: dict[str, Dim | None] = {}
    for side, found in zip(inputs.split(","), dims, strict=False):
        if found is None or len(found) != len(side):
            return None
        for letter, dim in zip(side, found, strict=True):
            other = sizes.get(letter, dim)
            if other is None or other == dim:
                sizes[letter] = other
            elif dim.number > 1 or other.number > 1:
                sizes[letter] = dim if dim.number > 1 else other
            else:
                sizes[letter] = None
    return [sizes.get(letter) or new(axis) for axis, letter in enumerate(out)]


def resized(
    first: Dims, sizes: Dims | None, scales: np.ndarray | None, new: Callable[[int], Dim]
) -> Dims:
    """The shape behind a Resize of every axis: its sizes, or what whole scales make."""
    if sizes is not None and len(sizes) == len(first):
        return sizes
    if scales is None or scales.size != len(first):
        return [new(axis) for axis in range(len(first))]
    return [
        times(dim, Dim(int(scale))) if scale == int(scale) else new(axis)
        for axis, (dim, scale) in enumerate(zip(first, scales, strict=True))
    ]
