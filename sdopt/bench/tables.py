"""What rows that took turns took: every round is kept, and each figure is computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdopt.bench.figures import Ratio, Spread

Data = Mapping[str, Any]


def known(cls: type, data: Data) -> dict[str, Any]:
    """The fields of a dataclass that are in the data; others are figures, or of a newer sdopt."""
    names: Sequence[str] = [one.name for one in dataclasses.fields(cls)]
    return {name: data[name] for name in names if name in data}


@dataclass(frozen=True)
class Memory:
    """What one row takes in a process of its own; None is never zero, ``why`` says why.

    Attributes:
        doing: what that process computed.
        base_bytes: resident when everything was imported and nothing opened.
        loaded_bytes: resident when all graphs were open.
        peak_bytes: the largest resident size of the process until it ended.
        why: why those three are None.
        device_bytes: the most that the card held above what it held before the graphs were opened.
        device: how that was measured, or why it was not.
    """

    doing: str
    base_bytes: int | None = None
    loaded_bytes: int | None = None
    peak_bytes: int | None = None
    why: str = ""
    device_bytes: int | None = None
    device: str = ""


@dataclass(frozen=True)
class Row:
    """One of the things that were measured side by side: a stage on a target.

    ``digests`` are those of the stage, by the components that have it.
    """

    label: str
    stage: str
    target: str
    digests: Mapping[str, str]
    memory: Memory | None = None

    @classmethod
    def from_json(cls, data: Data) -> Row:
        """What ``dataclasses.asdict`` gave."""
        plain = known(cls, data)
        if plain.get("memory"):
            plain["memory"] = Memory(**known(Memory, plain["memory"]))
        return cls(**plain)


@dataclass(frozen=True)
class Measured:
    """One row's rounds.

    Attributes:
        row: the row's label.
        load_seconds: to open the graphs, once.
        warm_up: the durations that do not count, the very first call among them.
        rounds: the durations that count, in the order they were taken.
        calls: how often each graph was computed in the rounds that count, by the component's or
            the companion's name.
        inside: whole images only: of each round, the seconds inside each component.
    """

    row: str
    load_seconds: float
    warm_up: tuple[float, ...]
    rounds: tuple[float, ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    inside: tuple[Mapping[str, float], ...] = ()

    @property
    def spread(self) -> Spread:
        """The figures of the rounds."""
        return Spread.of(self.rounds)

    @classmethod
    def from_json(cls, data: Data) -> Measured:
        """What ``to_json`` of its table wrote; the figures are computed again."""
        plain = known(cls, data)
        for name in ("warm_up", "rounds", "inside"):
            plain[name] = tuple(plain.get(name, ()))
        return cls(**plain)


class Table:
    """Rows that took turns, the first of which is the reference of the ratios."""

    rows: tuple[Measured, ...]
    unit: ClassVar[str]
    per_second: ClassVar[float]
    """Units in a second."""

    @property
    def reference(self) -> str:
        """The label of the row that ratios are to."""
        return self.rows[0].row

    def ratio(self, row: Measured) -> Ratio:
        """A row's time over the reference's, round by round."""
        return Ratio.between(row.rounds, self.rows[0].rounds)

    def throughput(self, row: Measured) -> float:
        """How many a second: calls of a component, or images."""
        return self.per_second / row.spread.mean

    def to_json(self) -> dict[str, Any]:
        """Plain data: every round, and the figures."""
        plain = dataclasses.asdict(self)  # type: ignore[call-overload]
        for row, data in zip(self.rows, plain["rows"], strict=True):
            data["spread"] = {**dataclasses.asdict(row.spread), "iqr": row.spread.iqr}
            data["noisy"] = row.spread.noisy
            data["throughput"] = self.throughput(row)
            data["ratio"] = dataclasses.asdict(self.ratio(row))
        return {**plain, "unit": self.unit, "reference": self.reference}


@dataclass(frozen=True)
class ComponentBench(Table):
    """One component in every row that has it; durations are milliseconds per call.

    Attributes:
        component: its name.
        role: what it is for.
        feeds: where the inputs came from.
        shapes: of the first row's inputs.
        dtypes: likewise.
        calls_per_round: a round is the mean of that many calls, one after another.
        settled: whether an untimed call went before each round.
        rows: the rows.
    """

    component: str
    role: str
    feeds: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    calls_per_round: int
    settled: bool
    rows: tuple[Measured, ...]

    unit: ClassVar = "ms"
    per_second: ClassVar = 1000.0

    @classmethod
    def from_json(cls, data: Data) -> ComponentBench:
        """What ``to_json`` wrote."""
        plain = known(cls, data)
        plain["shapes"] = {name: tuple(shape) for name, shape in plain["shapes"].items()}
        plain["rows"] = tuple(map(Measured.from_json, plain["rows"]))
        return cls(**plain)


HOST = "host"
"""What of an image is spent outside the components: scheduler, tokenizer, copies, Python."""


@dataclass(frozen=True)
class ImageBench(Table):
    """Whole images in every row; durations are seconds per image.

    Attributes:
        width: pixels.
        height: pixels.
        batch: images that are computed together; a round is one such batch, divided by it.
        steps: of denoising.
        guidance: scale.
        scheduler: its class.
        prompts: what was drawn, in turn.
        seed: of the first image.
        stages: by row and component the stage that ran, raw where a component has no other.
        rows: the rows.
    """

    width: int
    height: int
    batch: int
    steps: int
    guidance: float
    scheduler: str
    prompts: tuple[str, ...]
    seed: int
    stages: Mapping[str, Mapping[str, str]]
    rows: tuple[Measured, ...]

    unit: ClassVar = "s"
    per_second: ClassVar = 1.0

    def breakdown(self, row: Measured) -> dict[str, float]:
        """Mean seconds per image inside each component, and ``host``; they sum to the mean."""
        names = dict.fromkeys(name for one in row.inside for name in one)
        count = len(row.rounds)
        parts = {name: sum(one.get(name, 0.0) for one in row.inside) / count for name in names}
        return {**parts, HOST: row.spread.mean - sum(parts.values())}

    def calls_per_image(self, row: Measured) -> dict[str, float]:
        """How often each component was computed for one image."""
        images = len(row.rounds) * self.batch
        return {name: count / images for name, count in row.calls.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data, what an image is made of too."""
        plain = super().to_json()
        for row, data in zip(self.rows, plain["rows"], strict=True):
            data["breakdown"] = self.breakdown(row)
            data["calls_per_image"] = self.calls_per_image(row)
        return plain

    @classmethod
    def from_json(cls, data: Data) -> ImageBench:
        """What ``to_json`` wrote."""
        plain = known(cls, data)
        plain["prompts"] = tuple(plain["prompts"])
        plain["rows"] = tuple(map(Measured.from_json, plain["rows"]))
        return cls(**plain)
