"""Which tasks a candidate takes; what several have in common is one task, by its key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdopt import provenance, registry
from sdopt.bench.images import drawing
from sdopt.bundle import RAW, Bundle
from sdopt.evaluating.gallery import deciding
from sdopt.pipeline import Pipeline
from sdopt.runtime.runners import runner_of
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.provenance import versions
from sdopt.sweep.records import Kind, Task
from sdopt.sweep.scoring import DISTANCE, single_threaded
from sdopt.sweep.settings import Settings
from sdopt.targets.base import Target

Prefix = tuple[str, ...]
"""The first passes of a recipe."""


@dataclass(frozen=True)
class Plan:
    """The keys of what a candidate takes.

    Attributes:
        key: of the candidate itself.
        build: of its build.
        time: of its timing; empty where nothing is timed.
        probe: of the images that decide whether it is given up.
        rest: of the others; empty where ``probe`` has all.
    """

    key: str
    build: str
    time: str = ""
    probe: str = ""
    rest: str = ""


class Planner:
    """Makes tasks of candidates.

    Args:
        bundle: what is swept; its raw stages decide every key.
        settings: likewise.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self._settings = settings
        self.components = drawing(bundle)
        self.denoiser = runner_of(bundle).denoiser
        raw = {name: bundle.stage(name, RAW) for name in self.components}
        known = deciding(bundle, raw, {})
        self.base: dict[str, Any] = {
            "stages": known["stages"],
            "configuration": known["configuration"],
            "versions": versions(),
        }
        self.tasks: dict[str, Task] = {}
        self._stages: dict[Prefix, str] = {}

    def plan(self, candidates: Sequence[Candidate]) -> list[Plan]:
        """Tasks for some candidates, into ``tasks``; what earlier ones made is taken up."""
        recipes = [_prefix(one.recipe) for one in candidates]
        kept = shared(recipes, self._stages)
        return [
            self._candidate(one, recipe, kept)
            for one, recipe in zip(candidates, recipes, strict=True)
        ]

    def key(self, candidate: Candidate) -> str:
        """A digest of everything that decides what a candidate comes to."""
        settings = self._settings.deciding()
        reads = Pipeline.parse(candidate.recipe).reads()
        point = [candidate.recipe, reads, candidate.target, candidate.shape, candidate.batch]
        return provenance.key([self.base, point, settings])

    def _candidate(self, one: Candidate, recipe: Prefix, kept: frozenset[Prefix]) -> Plan:
        settings, target = self._settings, registry.make("targets", one.target)
        device = _device(target)
        build = self._build(one, target, self._stage(recipe, kept))
        time = probe = rest = ""
        if settings.times:
            work = {
                "build": build,
                "target": one.target,
                "shape": one.shape,
                "batch": one.batch,
                "denoiser": self.denoiser,
                "drawing": settings.drawing(),
                "bench": settings.bench(),
            }
            time = self._add("time", work, (build,), device, _label(one))
        if "score" in settings.measure:
            first = settings.probe if settings.probes else len(settings.prompts)
            prompts = list(enumerate(settings.prompts))
            probe = self._score(one, build, target, prompts[:first])
            rest = self._score(one, build, target, prompts[first:]) if prompts[first:] else ""
        return Plan(self.key(one), build, time, probe, rest)

    def _stage(self, recipe: Prefix, kept: frozenset[Prefix]) -> str:
        """The key of the last stage of a chain that ends in the whole recipe; empty for raw."""
        source, key, first = RAW, "", 0
        for count in range(1, len(recipe) + 1):
            prefix = recipe[:count]
            if prefix not in kept:
                continue
            text = ",".join(prefix)
            reads = Pipeline.parse(text).reads()
            deciding = ["stage", self.base, prefix, reads]
            made, needs = provenance.key(deciding), (key,) if key else ()
            work = {
                "recipe": text,
                "first": first,
                "source": source,
                "stage": f"stage-{made}",
                "components": self.components,
                "seed": 0,
                "reads": reads,
            }
            self.tasks.setdefault(made, Task("stage", made, needs, "cpu", work, text))
            self._stages[prefix] = made
            source, key, first = f"stage-{made}", made, count
        return key

    def _build(self, one: Candidate, target: Target, stage: str) -> str:
        # Only what is compiled, or lowered by its sizes, is another one at another size.
        fixed = target.compiled or type(target).sized is not Target.sized
        work = {
            "source": f"stage-{stage}" if stage else RAW,
            "target": one.target,
            "shape": one.shape if fixed else "",
            "batch": one.batch if fixed else 1,
            "components": self.components,
        }
        device = _device(target) if target.compiled else "cpu"
        label = f"{one.recipe or 'raw'} for {one.target}"
        return self._add("build", work, (stage,) if stage else (), device, label)

    def _score(
        self, one: Candidate, build: str, target: Target, prompts: list[tuple[int, str]]
    ) -> str:
        scoring, reference = self._settings.scoring, ""
        if scoring.kind == DISTANCE:
            raw = Candidate("", "ort", one.shape, one.batch)
            reference = self._drawn(raw, "", registry.make("targets", "ort"), prompts, "")
        return self._drawn(one, build, target, prompts, reference)

    def _drawn(
        self,
        one: Candidate,
        build: str,
        target: Target,
        prompts: list[tuple[int, str]],
        reference: str,
    ) -> str:
        scoring = asdict(self._settings.scoring)
        work = {
            "build": build,
            "target": str(single_threaded(target)),
            "shape": one.shape,
            "batch": one.batch,
            "drawing": self._settings.drawing(),
            "prompts": [list(pair) for pair in prompts],
            "seeds": list(self._settings.seeds),
            "scorer": {name: scoring[name] for name in ("kind", "place", "digest")},
            "reference": [reference] if reference else [],
        }
        needs = tuple(filter(None, (build, reference)))
        return self._add("score", work, needs, _device(target), _label(one))

    def _add(
        self, kind: Kind, work: Mapping[str, Any], needs: tuple[str, ...], device: str, label: str
    ) -> str:
        # Where a scorer lies decides nothing: its digest does.
        scorer = {"scorer": work["scorer"]["digest"]} if "scorer" in work else {}
        key = provenance.key([kind, self.base, {**work, **scorer}])
        self.tasks.setdefault(key, Task(kind, key, needs, device, work, label))
        return key


def shared(recipes: Iterable[Prefix], known: Iterable[Prefix]) -> frozenset[Prefix]:
    """The prefixes that are worth a stage: whole recipes, where recipes part, and known ones."""
    kept = {*known}
    following: dict[Prefix, set[str]] = {}
    for recipe in recipes:
        kept.add(recipe)
        for count in range(1, len(recipe)):
            following.setdefault(recipe[:count], set()).add(recipe[count])
    return frozenset(kept | {prefix for prefix, after in following.items() if len(after) > 1})


def _prefix(recipe: str) -> Prefix:
    return tuple(map(str, Pipeline.parse(recipe).passes))


def _device(target: Target) -> str:
    card = target.cuda_device()
    return "cpu" if card is None else f"cuda:{card}"


def _label(one: Candidate) -> str:
    return f"{one.recipe or 'raw'} on {one.target}, {one.shape}, batch {one.batch}"
