"""The space of a sweep: recipes and targets with ranges and alternatives in them, sizes, batches.

``tome=0..5`` is six values, ``cast_fp16|quantize=w8`` one of two passes, ``|cast_fp16`` that pass
or none. A pass that takes no zero, as ``tome=0``, is left out where a range gives it one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from sdopt import registry, spec
from sdopt.errors import SpecError, UsageError
from sdopt.pipeline import Pipeline
from sdopt.shapes import parse_sizes
from sdopt.sweep.candidate import Candidate

MOST = 10_000
"""Points that are listed and checked at most."""

_RANGE = re.compile(r"(?P<low>-?\d+(\.\d+)?)\.\.(?P<high>-?\d+(\.\d+)?)(/(?P<step>\d+(\.\d+)?))?")
_QUOTED = re.compile(r"""("[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class Slot:
    """One place where something is to be chosen.

    Attributes:
        name: for people and for the table of effects: ``tome``, ``cast_fp16|quantize``.
        values: what may be chosen, as text; empty text for a pass that is left out.
    """

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A spec with slots, one per item; an item that is always the same has one value."""

    slots: tuple[Slot, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a spec with ranges and alternatives.

        Raises:
            SpecError: a range that is none, or too many values.
        """
        found = []
        for item in _split(text, ","):
            parts = _split(item, "|")
            values = [one for part in parts for one in _expanded(part, text)]
            names = dict.fromkeys(re.split(r"[=:]", part)[0] for part in parts)
            found.append(Slot("|".join(filter(None, names)), tuple(dict.fromkeys(values))))
        return cls(tuple(found))

    def text(self, choice: Sequence[str]) -> str:
        """The spec with one value per slot."""
        return ",".join(filter(None, choice))


@dataclass(frozen=True)
class Space:
    """All that may be tried.

    Attributes:
        recipes: templates of passes, one for each alternative recipe.
        targets: templates of targets.
        shapes: HEIGHTxWIDTH in pixels.
        batches: images at once.
    """

    recipes: tuple[Template, ...]
    targets: tuple[Template, ...]
    shapes: tuple[str, ...]
    batches: tuple[int, ...]

    @classmethod
    def of(
        cls,
        passes: Sequence[str],
        targets: Sequence[str],
        shapes: Sequence[str],
        batches: Sequence[int],
    ) -> Space:
        """Read the parts of a space.

        Raises:
            SpecError: a spec that cannot be read.
            UsageError: a size or batch that cannot be, or nothing to try.
        """
        for name, given in (
            ("passes", passes), ("target", targets), ("shapes", shapes), ("batch", batches),
        ):  # fmt: skip
            if not given:
                raise UsageError("there is nothing to try", hint=f"--{name} ...")
        sizes = [one for text in shapes for one in parse_sizes(text)]
        if moving := [one for one in sizes if not one.fixed]:
            raise UsageError(
                "a point of a sweep is of one size",
                why=f"{moving[0]} is a range",
                hint="list the sizes: --shapes 512x512,768x768",
            )
        if wrong := [one for one in batches if one < 1]:
            raise UsageError(f"a batch must be 1 or more, not {wrong[0]}")
        return cls(
            tuple(map(Template.parse, dict.fromkeys(passes))),
            tuple(map(Template.parse, dict.fromkeys(targets))),
            tuple(dict.fromkeys(str(one.low) for one in sizes)),
            tuple(dict.fromkeys(batches)),
        )

    @property
    def size(self) -> int:
        """How many combinations there are; some may come to the same candidate."""
        of_templates = [
            sum(math.prod(len(slot.values) for slot in one.slots) for one in some)
            for some in (self.recipes, self.targets)
        ]
        return math.prod((*of_templates, len(self.shapes), len(self.batches)))

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What there is to choose, by name: what a sampler that asks is told."""
        found: dict[str, tuple[str, ...]] = {}
        for kind, some in (("recipe", self.recipes), ("target", self.targets)):
            found[kind] = tuple(map(str, range(len(some))))
            for index, template in enumerate(some):
                for place, slot in enumerate(template.slots):
                    found[f"{kind} {index} {place} {slot.name}"] = slot.values
        found["shape"], found["batch"] = self.shapes, tuple(map(str, self.batches))
        return {name: values for name, values in found.items() if len(values) > 1}

    def at(self, chosen: Mapping[str, str]) -> Candidate:
        """The candidate where those values of ``axes`` were chosen.

        Raises:
            SdoptError: see ``candidates``.
        """

        def picked(kind: str, some: Sequence[Template]) -> tuple[Template, list[str]]:
            index = int(chosen.get(kind, "0"))
            values = [
                chosen.get(f"{kind} {index} {place} {slot.name}", slot.values[0])
                for place, slot in enumerate(some[index].slots)
            ]
            return some[index], values

        recipe, target = picked("recipe", self.recipes), picked("target", self.targets)
        shape = chosen.get("shape", self.shapes[0])
        return self._candidate(recipe, target, shape, int(chosen.get("batch", self.batches[0])))

    def candidates(self) -> tuple[Candidate, ...]:
        """Every candidate once, in the order of the templates; all are checked.

        Raises:
            UnknownNameError: an unknown pass, preset or target.
            SpecError: a wrong option or value, or passes in a wrong order.
            UsageError: there are too many to list.
        """
        if self.size > MOST:
            raise UsageError(
                f"these are {self.size} points",
                why=f"at most {MOST} are listed and checked",
                hint="leave values out, or give several --passes in place of many ranges in one",
            )
        return tuple(dict.fromkeys(self._all()))

    def _all(self) -> Iterator[Candidate]:
        for recipe, target in itertools.product(self.recipes, self.targets):
            for passes in itertools.product(*(slot.values for slot in recipe.slots)):
                for options in itertools.product(*(slot.values for slot in target.slots)):
                    for shape, batch in itertools.product(self.shapes, self.batches):
                        yield self._candidate((recipe, passes), (target, options), shape, batch)

    def _candidate(
        self,
        recipe: tuple[Template, Sequence[str]],
        target: tuple[Template, Sequence[str]],
        shape: str,
        batch: int,
    ) -> Candidate:
        """A candidate in canonical spelling, from templates and the values of their slots."""
        passes, text = recipe[0].text(recipe[1]), target[0].text(target[1])
        made = registry.make("targets", text)
        if made.stage:
            raise UsageError(
                "a target of a sweep has no name", where=text, why="the sweep names its builds"
            )
        choices = {
            slot.name: _label(slot, value)
            for slot, value in zip(recipe[0].slots, recipe[1], strict=True)
            if len(slot.values) > 1
        }
        if len(self.recipes) > 1:
            choices["recipe"] = ",".join(slot.name for slot in recipe[0].slots) or "raw"
        if len(self.targets) > 1 or any(len(slot.values) > 1 for slot in target[0].slots):
            choices["target"] = text
        choices |= {"shape": shape} if len(self.shapes) > 1 else {}
        choices |= {"batch": str(batch)} if len(self.batches) > 1 else {}
        return Candidate(str(Pipeline.parse(passes)), str(made), shape, batch, choices)


def _label(slot: Slot, value: str) -> str:
    """A value without the pass's name, where that is the same for all: ``3`` of ``tome=3``."""
    named = f"{slot.name}="
    if "|" not in slot.name and value.startswith(named):
        return value.removeprefix(named)
    return value or "without"


def _split(text: str, mark: str) -> list[str]:
    """Parts between marks that stand outside quotes."""
    parts = [""]
    for index, piece in enumerate(_QUOTED.split(text)):
        first, *rest = [piece] if index % 2 else piece.split(mark)
        parts[-1] += first
        parts += rest
    return [part.strip() for part in parts]


def _expanded(item: str, whole: str) -> list[str]:
    """An item with each value of its ranges in turn."""
    ranges: list[list[str]] = []
    pieces: list[str] = [""]
    for index, part in enumerate(_QUOTED.split(item)):
        for piece in [part] if index % 2 else re.split(r"([=+:])", part):
            if index % 2 == 0 and (found := _RANGE.fullmatch(piece.strip())):
                ranges.append(_values(found, whole))
                pieces.append("")
            else:
                pieces[-1] += piece
    made = []
    for values in itertools.product(*ranges):
        one = "".join(itertools.chain(*itertools.zip_longest(pieces, values, fillvalue="")))
        made.append("" if "0" in values and _stands_for_nothing(one) else one)
    return made


def _stands_for_nothing(item: str) -> bool:
    """Whether a pass takes no zero where it takes a one: then none of it is meant."""
    (parsed,) = spec.parse(item)
    if parsed.name not in registry.table("passes") or parsed.value != ("0",):
        return False
    cls = registry.resolve("passes", parsed.name)
    try:
        spec.bind(cls, parsed)
    except SpecError:
        spec.bind(cls, spec.Item(parsed.name, ("1",), parsed.options, parsed.span, parsed.text))
        return True
    return False


def _values(found: re.Match[str], whole: str) -> list[str]:
    low, high, step = (Decimal(found[name] or "1") for name in ("low", "high", "step"))
    if high < low or not step:
        raise SpecError(
            f"{found[0]} is no range", where=whole, hint="LOW..HIGH, or LOW..HIGH/STEP"
        )
    count = int((high - low) / step) + 1
    if count > MOST:
        raise SpecError(f"{found[0]} has {count} values", where=whole, hint="a larger step")
    return [str(low + step * index) for index in range(count)]
