"""A size of a tensor as a product of a number and unknowns, and arithmetic with such sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple


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
        elif x == ONE or (y.known or 0) > 1:
            out.append(y)
        else:
            out.append(x if (x.known or 0) > 1 else new(axis))
    return out
