"""Adapters on the stages of a run: which weights of which component are loaded changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdopt.adapters import matching, requests
from sdopt.adapters.replaying import Replaced, replay
from sdopt.adapters.requests import Lora
from sdopt.bundle import Bundle, Stage
from sdopt.errors import WeightsError


@dataclass(frozen=True)
class Adapted:
    """The stages of a run, and what replaces their weights when they are opened."""

    stages: Mapping[str, Stage]
    replaced: Mapping[str, Replaced]
    loras: tuple[Lora, ...] = ()


def adapt(bundle: Bundle, stages: Mapping[str, Stage], asked: Sequence[requests.Asked]) -> Adapted:
    """Apply adapters to the stages; no weight is read before a stage is opened.

    Raises:
        WeightsError: an adapter for no component of the bundle, or that does not fit one; a stage
            that it cannot be applied to.
        BundleError, UsageError: see ``sdopt.adapters.replaying.replay``.
    """
    loras = requests.read(asked)
    replaced: dict[str, Replaced] = {}
    used: set[str] = set()
    for name, stage in stages.items() if loras else ():
        role, config = stage.record.role, bundle.config(name)
        mine = [one for one in loras if matching.choose(one.adapters, {}, role, config)]
        if mine:
            used |= {one.digest for one in mine}
            replaced[name] = replay(stage.load(), mine, role, config, str(stage.path))
    for lora in loras:
        if lora.digest not in used:
            parts = sorted({one.part.value for one in lora.adapters})
            raise WeightsError(
                "the adapter holds nothing for a component of this bundle",
                where=str(lora.path),
                why=f"it is for a {' and a '.join(parts)}; this runs {', '.join(stages)}",
            )
    return Adapted(stages, replaced, loras)
