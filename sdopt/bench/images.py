"""Timing whole images: each row's pipeline, and the time inside each of its components."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdopt.bench.rows import Contestant, plan_of
from sdopt.bench.settings import Settings
from sdopt.bench.tables import ImageBench, Measured
from sdopt.bench.timing import Clock, Turns
from sdopt.bundle import Bundle, Stage
from sdopt.report import Progress
from sdopt.runtime.generate import generate
from sdopt.runtime.pipeline import pipeline_class
from sdopt.runtime.runners import INDEX, RUNNERS, Task, index_of, runner_of
from sdopt.runtime.scheduled import Holding
from sdopt.runtime.session import REFINER, Opener, choose_stages
from sdopt.session import Session, Wrapped

if TYPE_CHECKING:
    from sdopt.runtime.generate import Generated


class Stopwatch:
    """Adds up what components took and how often they were computed, since the last lap."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._seconds: dict[str, float] = {}
        self._calls: Counter[str] = Counter()

    def add(self, component: str, seconds: float) -> None:
        """One more call."""
        self._seconds[component] = self._seconds.get(component, 0.0) + seconds
        self._calls[component] += 1

    def lap(self) -> tuple[dict[str, float], Counter[str]]:
        """Seconds and calls by component since the last lap."""
        found = self._seconds, self._calls
        self._seconds, self._calls = {}, Counter()
        return found


class Timed(Wrapped):
    """A session whose calls a stopwatch times."""

    def __init__(self, session: Session, component: str, watch: Stopwatch) -> None:
        super().__init__(session)
        self._component, self._watch = component, watch

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session computes."""
        start = self._watch.clock()
        outputs = self.session.run(feeds)
        self._watch.add(self._component, self._watch.clock() - start)
        return outputs

    def holds(self) -> bool:
        """Whether the session can leave values on its device, as without a clock."""
        return isinstance(self.session, Holding) and self.session.holds()

    def run_held(
        self, feeds: Mapping[str, Any], held: Collection[str], *, keep: bool
    ) -> dict[str, Any]:
        """What the session computes and leaves on its device.

        Raises:
            TypeError: it cannot, as ``holds`` says.
        """
        if not isinstance(self.session, Holding):
            raise TypeError("this session leaves nothing on a device")
        start = self._watch.clock()
        outputs = self.session.run_held(feeds, held, keep=keep)
        self._watch.add(self._component, self._watch.clock() - start)
        return outputs


class _TimedOpener:
    """A target whose sessions on the files of a run are timed."""

    def __init__(self, target: Opener, components: Mapping[Path, str], watch: Stopwatch) -> None:
        self._target, self._components, self._watch = target, components, watch

    def check_available(self) -> None:
        self._target.check_available()

    def stage_name(self) -> str:
        return self._target.stage_name()

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        session = self._target.open(path, optimize=optimize)
        return Timed(session, self._components[Path(path)], self._watch)


class Drawing:
    """A pipeline that takes its turns with a batch of images."""

    def __init__(self, images: Iterator[Generated], batch: int, watch: Stopwatch) -> None:
        self._images, self._batch, self._watch = images, batch, watch
        self.scheduler = ""
        self.laps: list[tuple[dict[str, float], Counter[str]]] = []
        """Per round, the warm-up's counted too."""

    def settle(self) -> None:
        """Nothing: an image is long, and begins as the one before it did."""

    def run(self, index: int) -> None:
        """One batch; ``generate`` computes it when its first image is asked for."""
        for _ in range(self._batch):
            self.scheduler = next(self._images).scheduler
        self.laps.append(self._watch.lap())


def cannot_draw(bundle: Bundle) -> str:
    """Why whole images cannot be timed here; empty where they can.

    Raises:
        BundleError: the index cannot be read.
    """
    if not (bundle.path / INDEX).is_file():
        return f"there is no {INDEX}: this is no whole pipeline"
    name = str(index_of(bundle).get("_class_name"))
    if name not in RUNNERS:
        return f"sdopt does not run a {name}"
    if not RUNNERS[name].text_to_image or bundle.manifest.family == REFINER:
        return f"a {name} wants an image to start from"
    missing = [
        one for one in drawing(bundle) if one not in bundle.components or not bundle.stages(one)
    ]
    return f"there is no {missing[0]}" if missing else ""


def drawing(bundle: Bundle) -> list[str]:
    """The components that draw an image from a prompt.

    Raises:
        BundleError: the index cannot be read, or nothing runs its class.
    """
    runner, index = runner_of(bundle), index_of(bundle)
    # What a pipeline was saved without, its index holds as null.
    encoders = [one for one in runner.encoders if any(index.get(one, [one]) or ())]
    return [*encoders, runner.denoiser, "vae_decoder"]


def load_libraries(bundle: Bundle) -> None:
    """Import what drawing imports when it first happens: that is no part of loading a row.

    Raises:
        MissingDependencyError: diffusers or transformers is not installed.
    """
    pipeline_class(runner_of(bundle).class_name(Task()))
    for name in ("components", "control", "denoisers", "schedulers"):
        importlib.import_module(f"sdopt.runtime.{name}")


def draw(
    bundle: Bundle,
    row: Contestant,
    settings: Settings,
    *,
    batches: int,
    steps: int,
    target: Opener | None = None,
) -> Iterator[Generated]:
    """The images of a row, ``batches`` times a batch; all graphs are open when this returns.

    Raises:
        SdoptError: see ``sdopt.runtime.generate.generate``.
    """
    size = settings.size(bundle)
    prompts = [settings.prompts[n % len(settings.prompts)] for n in range(batches)]
    return generate(
        bundle,
        [prompt for prompt in prompts for _ in range(settings.batch)],
        steps=steps,
        guidance=settings.guidance,
        seed=settings.seed,
        scheduler=settings.scheduler,
        width=size.width,
        height=size.height,
        batch=settings.batch,
        stage=row.stage,
        target=target or row.target,
    )


def measure(
    bundle: Bundle, rows: Sequence[Contestant], settings: Settings, turns: Turns, tell: Progress
) -> ImageBench:
    """Let the rows' pipelines take turns with an image; in a round all draw the same one.

    Raises:
        SdoptError: a graph that cannot be opened, or a pipeline that fails.
    """
    load_libraries(bundle)
    drawings, seconds, stages = [], [], {}
    batches = turns.warm_up + turns.rounds
    for row in rows:
        found = choose_stages(bundle, row.target, row.stage, image_to_image=False)
        stages[row.label] = {name: one.name for name, one in found.items()}
        watch = Stopwatch(turns.clock)
        target = _TimedOpener(row.target, _files(found), watch)
        start = turns.clock()
        images = draw(bundle, row, settings, batches=batches, steps=settings.steps, target=target)
        seconds.append(turns.clock() - start)
        drawings.append(Drawing(images, settings.batch, watch))
    laps, _ = turns.take(drawings, tell, settle=False)
    size, batch = settings.size(bundle), settings.batch
    return ImageBench(
        width=size.width,
        height=size.height,
        batch=batch,
        steps=settings.steps,
        guidance=settings.guidance,
        scheduler=drawings[0].scheduler,
        prompts=settings.prompts,
        seed=settings.seed,
        stages=stages,
        rows=tuple(
            Measured(
                row=row.label,
                load_seconds=load,
                warm_up=tuple(one / batch for one in lap.warm_up),
                rounds=tuple(one / batch for one in lap.rounds),
                calls=dict(sum((calls for _, calls in drawing.laps[turns.warm_up :]), Counter())),
                inside=tuple(
                    {name: one / batch for name, one in inside.items()}
                    for inside, _ in drawing.laps[turns.warm_up :]
                ),
            )
            for row, drawing, lap, load in zip(rows, drawings, laps, seconds, strict=True)
        ),
    )


def _files(stages: Mapping[str, Stage]) -> dict[Path, str]:
    """The files that a pipeline opens, companions too, with the component of each."""
    found = {}
    for name, stage in stages.items():
        found[stage.path] = name
        if plan := plan_of(stage):
            found |= {stage.path.with_name(one.file): name for one in plan.graphs}
    return found
