"""The smallest set of modules to keep, found by measuring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

Keep = frozenset[str]


@dataclass(frozen=True)
class Trial:
    """One keep-list that was tried: its entries and the error that was left."""

    keep: tuple[str, ...]
    error: float


class Tree:
    """The modules of a graph; a list of them (``down_blocks``) is passed over to its members."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._own = set(paths)
        self._below: dict[str, list[str]] = {}
        for path in dict.fromkeys(paths):
            parts = path.split(".")
            for count in range(len(parts)):
                above, one = ".".join(parts[:count]), ".".join(parts[: count + 1])
                members = self._below.setdefault(above, [])
                if one not in members:
                    members.append(one)

    def below(self, path: str = "") -> list[str]:
        """The modules right below one, or below the root."""
        found = []
        for one in self._below.get(path, ()):
            members = self._below.get(one, ())
            numbered = members and all(m.rpartition(".")[2].isdigit() for m in members)
            found += self.below(one) if numbered and one not in self._own else [one]
        return found


class Bisection:
    """Finds a keep-list that no entry can be left out of.

    Args:
        measure: the error that is left with a keep-list.
        tolerance: the error that is allowed.
        tree: the modules.
        told: is given each trial.

    It begins with a guess if one is enough, else with whole blocks. Each block is measured alone
    in half (all others kept), they are sorted by the error they make, and the shortest beginning
    of that order is bisected with which the whole stays within the tolerance. What can be left out
    one by one is; what is left is replaced by its parts where these do, and so on down to single
    modules.
    """

    def __init__(
        self,
        measure: Callable[[Keep], float],
        tolerance: float,
        tree: Tree,
        told: Callable[[Trial], None],
    ) -> None:
        self._measure, self._tolerance, self._tree, self._told = measure, tolerance, tree, told
        self._known: dict[Keep, float] = {}

    def error(self, keep: Collection[str]) -> float:
        """The error with a keep-list, measured once."""
        key = frozenset(keep)
        if key not in self._known:
            self._known[key] = self._measure(key)
            self._told(Trial(tuple(sorted(key)), self._known[key]))
        return self._known[key]

    def within(self, keep: Collection[str]) -> bool:
        """Whether it is within the tolerance; not if it is no number."""
        return self.error(keep) <= self._tolerance

    def run(self, guesses: Sequence[Sequence[str]] = ()) -> list[str] | None:
        """The keep-list, sorted; None if keeping every module is not enough.

        ``guesses`` are lists that may be enough: modules whose values are out of range, say.
        """
        if self.within([]):
            return []
        chosen = next((self._pruned(one, []) for one in guesses if self.within(one)), None)
        if chosen is None:
            units = self._tree.below()
            if not self.within(units):
                return None
            chosen = self._smallest(units, [])
        done: list[str] = []
        while chosen:
            one = chosen.pop()
            parts = self._tree.below(one)
            others = [*chosen, *done]
            if parts and self.within([*others, *parts]):
                chosen += self._smallest(parts, others)
            else:
                done.append(one)
        return sorted(self._pruned(sorted(done), []))

    def _smallest(self, units: Sequence[str], fixed: Sequence[str]) -> list[str]:
        """Few of ``units`` that are enough beside ``fixed``, as all of them are."""
        if self.within(fixed):
            return []
        harm = {
            one: self.error([*fixed, *(other for other in units if other != one)]) for one in units
        }
        order = sorted(units, key=lambda one: -_comparable(harm[one]))
        low, high = 1, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.within([*fixed, *order[:middle]]):
                high = middle
            else:
                low = middle + 1
        return self._pruned(order[:low], fixed)

    def _pruned(self, chosen: Sequence[str], fixed: Sequence[str]) -> list[str]:
        """Without those that it does without, the least harmful (last) one tried first."""
        left = list(chosen)
        for one in reversed(chosen):
            rest = [other for other in left if other != one]
            if self.within([*fixed, *rest]):
                left = rest
        return left


def _comparable(error: float) -> float:
    return error if error == error else float("inf")
