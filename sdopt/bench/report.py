"""What ``bench`` found, as one report; ``docs/bench.md`` describes its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdopt.bench import charts
from sdopt.bench.tables import ComponentBench, Data, ImageBench, Row, known
from sdopt.drawing.charts import Chart
from sdopt.errors import UsageError

SCHEMA = 1
"""Raised whenever the meaning of a key changes; new keys do not raise it."""


@dataclass(frozen=True)
class Machine:
    """Where it was measured; what the system does not say is empty or None.

    Attributes:
        cpu: the processor's name.
        cores: logical cores of the machine.
        usable_cores: those that this process may use.
        memory_bytes: of the machine.
        cards: NVIDIA cards, as NVML names them; none where NVML is not installed.
        os: name and release.
        python: version.
        load: load average of the last minute when the run began.
        environment: variables that set numbers of threads or hide cards.
        versions: of sdopt, the runtimes and the targets' compilers.
    """

    cpu: str
    cores: int
    usable_cores: int
    memory_bytes: int | None
    cards: tuple[str, ...]
    os: str
    python: str
    load: float | None
    environment: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, data: Data) -> Machine:
        """What ``to_json`` wrote."""
        return cls(**{**known(cls, data), "cards": tuple(data["cards"])})


Kind = Literal["bench"]


@dataclass(frozen=True)
class BenchReport:
    """Rows side by side: components, whole images, memory.

    Attributes:
        bundle: its folder.
        origin: what it was exported from.
        family: of the model.
        date: when the run began, ISO 8601 in UTC.
        command: as it was typed; empty where it was called from Python.
        settings: the options.
        machine: where it was measured.
        rows: what was measured, the reference of the ratios first.
        components: in the bundle's order.
        images: whole images, where they were timed.
        notes: what a reader should know: noise, what was left out and why.
    """

    bundle: str
    origin: str
    family: str
    date: str
    command: str
    settings: Mapping[str, Any]
    machine: Machine
    rows: tuple[Row, ...]
    components: tuple[ComponentBench, ...]
    images: ImageBench | None = None
    notes: tuple[str, ...] = ()
    kind: Kind = "bench"
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for ``json.dumps``: every round, and the figures."""
        return {
            **dataclasses.asdict(self),
            "components": [one.to_json() for one in self.components],
            "images": self.images.to_json() if self.images else None,
        }

    @classmethod
    def from_json(cls, data: Data) -> BenchReport:
        """What ``to_json`` gave, also after a way through a file.

        Raises:
            UsageError: it is no report of ``bench``, or of a newer sdopt.
        """
        if data.get("kind") != "bench" or not isinstance(data.get("schema"), int):
            raise UsageError("this is no report of sdopt bench", hint="sdopt bench BUNDLE --json")
        if data["schema"] > SCHEMA:
            raise UsageError(
                "this report was written by a newer sdopt",
                why=f"its schema is {data['schema']}; this sdopt reads up to {SCHEMA}",
            )
        plain = known(cls, data)
        try:
            plain["machine"] = Machine.from_json(plain["machine"])
            plain["rows"] = tuple(map(Row.from_json, plain["rows"]))
            plain["components"] = tuple(map(ComponentBench.from_json, plain["components"]))
            images = plain.get("images")
            plain["images"] = ImageBench.from_json(images) if images else None
            plain["notes"] = tuple(plain.get("notes", ()))
            return cls(**plain)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                "this report of sdopt bench is not whole",
                why=f"{type(error).__name__}: {error}",
                hint="measure again: sdopt bench BUNDLE --json",
            ) from error

    def charts(self) -> list[Chart]:
        """Times with their p95, rounds in order, what an image is made of, memory."""
        return charts.of(self.rows, self.components, self.images)

    def row(self, label: str) -> Row:
        """The row of that label."""
        return next(one for one in self.rows if one.label == label)
