"""What is measured side by side: which stage on which target, and how its graphs are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdopt import modelfile, spec
from sdopt.bundle import OPTIMIZED, RAW, Bundle, Stage
from sdopt.companions import PLAN_KEY, Plan, Schedule
from sdopt.errors import UnknownNameError, UsageError
from sdopt.passes.base import Role
from sdopt.runtime.parallel import on_halves
from sdopt.runtime.pipeline import is_halved
from sdopt.runtime.scheduled import open_stage
from sdopt.runtime.session import opener
from sdopt.session import Session
from sdopt.targets.base import Target


@dataclass(frozen=True)
class Contestant:
    """A stage on a target, with the components of the bundle that have the stage."""

    label: str
    stage: str
    text: str
    target: Target
    stages: Mapping[str, Stage]

    def open(self, component: str) -> Session:
        """A component as the runtime would open it.

        Raises:
            SdoptError: the target cannot open it, or cannot run here; in its own words.
        """
        stage = self.stages[component]
        session = open_stage(self.target, stage.path)
        if Role(stage.record.role) is not Role.DENOISER:
            return session
        return on_halves([session], halved=is_halved(stage), where=str(stage.path))


def contestants(
    bundle: Bundle, stages: Sequence[str], targets: Sequence[str], components: Sequence[str]
) -> list[Contestant]:
    """The rows that were asked for: every stage on every target that runs it, targets first.

    A stage that a target's build wrote is for the targets of that build only, and a target with a
    compiler runs its own build only: its session opens the artifact, whatever graph lies beside.

    Args:
        bundle: the bundle.
        stages: by name; without any the raw one, the optimized one and the targets' builds,
            those of them that are there.
        targets: specs.
        components: those that are measured.

    Raises:
        UnknownNameError: no component has a stage, or there is no such target.
        UsageError: a stage that none of the targets runs, or nothing was built for a target.
        MissingDependencyError: a target's packages are not installed.
    """
    chosen = {text: _target(text) for text in dict.fromkeys(targets)}
    known = {one for name in components for one in bundle.stages(name)}
    for stage in stages:
        if stage not in known:
            raise UnknownNameError(
                f"no component has a stage {stage!r}",
                where=str(bundle.path),
                hint=spec.suggest(stage, known) or _how(stage, chosen),
            )
    built = {target.stage_name() for target in chosen.values()}
    wanted = list(dict.fromkeys(stages)) or [
        one for one in (RAW, OPTIMIZED, *sorted(built)) if one in known
    ]
    pairs: list[tuple[str, str]] = []
    for text, target in chosen.items():
        own = target.stage_name()
        if target.compiled and own not in known:
            raise UsageError(
                f"nothing was built for {text} here",
                where=str(bundle.path),
                hint=f"sdopt build {bundle.path} --target {text}",
            )
        names = [own] if target.compiled else [s for s in wanted if s == own or s not in built]
        pairs += [(stage, text) for stage in names]
    idle = [one for one in stages if one not in {stage for stage, _ in pairs}]
    if idle:
        raise UsageError(
            f"none of the targets runs the stage {idle[0]!r}",
            where=str(bundle.path),
            why="a target with a compiler runs what was built for it: "
            + ", ".join(f"{text} runs {one.stage_name()}" for text, one in chosen.items()),
            hint=f"leave out --stage {idle[0]}, or name a target for it: --target ort",
        )
    names = [stage for stage, _ in pairs]
    return [
        Contestant(
            stage if names.count(stage) == 1 else f"{stage} on {text}",
            stage,
            text,
            chosen[text],
            {
                name: bundle.stage(name, stage)
                for name in components
                if stage in bundle.stages(name)
            },
        )
        for stage, text in pairs
    ]


def plan_of(stage: Stage) -> Plan | None:
    """The plan of a stage's companions, if it has any."""
    text = modelfile.metadata(stage.path).get(PLAN_KEY)
    return Plan.loads(text, str(stage.path)) if text else None


def replaces_steps(plan: Plan | None) -> bool:
    """Whether some steps are computed by another graph, so that calls differ in what they cost."""
    return plan is not None and any(Schedule(one.schedule).in_place for one in plan.graphs)


def _target(text: str) -> Target:
    found = opener(text)
    if not isinstance(found, Target):
        raise UsageError(f"{text} is no target that can be measured", hint="sdopt targets")
    return found


def _how(stage: str, targets: Mapping[str, Target]) -> str:
    for text, target in targets.items():
        if target.stage_name() == stage:
            return f"build it: sdopt build BUNDLE --target {text}"
    return f"make it: sdopt optimize BUNDLE --passes ... --stage {stage}"
