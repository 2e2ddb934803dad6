"""Clocks, sessions, targets and a report whose durations are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sdopt.bench.report import BenchReport, Machine
from sdopt.bench.tables import ComponentBench, ImageBench, Measured, Memory, Row
from sdopt.session import Port, Session
from sdopt.targets.base import Dialect, Target
from sdopt.targets.ort import Ort

TICK = 1 / 1024
"""What a reading of the clock takes; sums of such fractions are exact."""


class Clock:
    """Stands still but for those who move it, and one tick at every reading."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self._tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self._tick
        return self.now


class Planted:
    """A session that takes the next of its durations, and remembers what it was fed."""

    def __init__(self, session: Session | None, clock: Clock, durations: Iterable[float]) -> None:
        self._session, self._clock, self._durations = session, clock, iter(durations)
        port = Port(np.dtype(np.float32), ("batch_size", 4))
        self.inputs = session.inputs if session else {"x": port}
        self.outputs = session.outputs if session else {"y": port}
        self.fed: list[Mapping[str, np.ndarray]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.fed.append(feeds)
        self._clock.now += next(self._durations)
        return self._session.run(feeds) if self._session else {}


@dataclass(frozen=True)
class Slow(Target):
    """ONNX Runtime, whose sessions move a clock: ``seconds`` by component, call by call."""

    clock: Clock = field(default_factory=Clock)
    seconds: Mapping[str, Iterable[float]] = field(default_factory=dict)
    opened: list[Planted] = field(default_factory=list)

    dialect: ClassVar = Dialect(26, 13)
    packages: ClassVar = {"onnxruntime": "onnxruntime"}
    extra: ClassVar = "ort"
    wants: ClassVar = "clean"

    def stage_name(self) -> str:
        return "slow"

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        session = Ort(threads=1).open(path, optimize=optimize)
        self.opened.append(Planted(session, self.clock, self.seconds[path.parent.name]))
        return self.opened[-1]

    def __str__(self) -> str:
        return "slow"


def report(**changes: Any) -> BenchReport:
    """Two rows, one component, images and memory."""
    rows = (
        Row("model", "model", "ort", {"unet": "a" * 16}, Memory("an image", *_mb(100, 200, 260))),
        Row(
            "fast",
            "fast",
            "ort:provider=cuda",
            {"unet": "b" * 16},
            Memory("an image", *_mb(100, 150, 160), "", 512_000_000, "NVML, a card, every 5 ms"),
        ),
    )
    unet = ComponentBench(
        component="unet",
        role="denoiser",
        feeds="seeded: seed 0",
        shapes={"sample": (2, 4, 8, 8), "timestep": ()},
        dtypes={"sample": "float32", "timestep": "float32"},
        calls_per_round=1,
        settled=True,
        rows=(
            Measured("model", 0.5, (40.0,), (20.0, 22.0, 24.0, 22.0), {"main": 4}),
            Measured("fast", 0.25, (30.0,), (10.0, 11.0, 12.0, 44.0), {"main": 4}),
        ),
    )
    calls = {"unet": 4}
    images = ImageBench(
        width=64,
        height=48,
        batch=1,
        steps=2,
        guidance=7.5,
        scheduler="DDIMScheduler",
        prompts=("a seven",),
        seed=3,
        stages={"model": {"unet": "model"}, "fast": {"unet": "fast"}},
        rows=(
            Measured("model", 2.0, (3.0,), (2.0, 4.0), calls, ({"unet": 1.5}, {"unet": 2.5})),
            Measured("fast", 1.0, (2.0,), (1.0, 2.0), calls, ({"unet": 0.5}, {"unet": 1.5})),
        ),
    )
    machine = Machine(
        "A processor", 4, 2, 8_000_000_000, (), "Linux", "3.11.7", 0.5, {}, {"sdopt": "0"}
    )
    given: dict[str, Any] = {
        "bundle": "b",
        "origin": "toy",
        "family": "sd1",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "sdopt bench b",
        "settings": {"rounds": 4},
        "machine": machine,
        "rows": rows,
        "components": (unet,),
        "images": images,
        "notes": ("noisy: unet of fast",),
    }
    return BenchReport(**(given | changes))


def _mb(*sizes: int) -> tuple[int, ...]:
    return tuple(size * 1_000_000 for size in sizes)
