"""What components are fed: seeded arrays of the asked-for sizes, or what ``record`` kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdopt.bench.settings import Settings
from sdopt.bundle import Bundle, Stage
from sdopt.compare import inputs
from sdopt.compare.sides import vocabularies
from sdopt.passes.base import Role
from sdopt.session import Port, checked_feeds
from sdopt.shapes import axis_numbers

Arrays = Mapping[str, np.ndarray]

TIMESTEP = "timestep"

LONGER = {"text_encoder_3": 256, "transformer": 77 + 256}
"""Tokens beside T5, where diffusers puts its 256 behind CLIP's 77 (StableDiffusion3Pipeline)."""


@dataclass(frozen=True)
class Feeds:
    """The inputs of one component, the same for every row.

    Attributes:
        said: where they came from, for the report.
        samples: what calls are given, in turn.
    """

    said: str
    samples: Sequence[Arrays]

    def for_ports(self, ports: Mapping[str, Port], where: str) -> list[dict[str, np.ndarray]]:
        """The samples in the types and ranks that a graph takes; nothing is cast while timing.

        Raises:
            UsageError: the graph takes other inputs or other sizes.
        """
        return [checked_feeds(ports, _ranked(ports, one), where) for one in self.samples]


def make(
    bundle: Bundle,
    stage: Stage,
    ports: Mapping[str, Port],
    settings: Settings,
    *,
    steps: bool,
) -> Feeds:
    """The inputs of a component.

    Args:
        bundle: where its configuration is.
        stage: the stage whose ports these are.
        ports: the inputs.
        settings: sizes, seed, and the recording to take samples from if it has some.
        steps: whether calls are to follow the timesteps of a run, for stages whose steps differ.

    Raises:
        UsageError: a size that no input has.
        BundleError: a recorded sample cannot be read.
    """
    recording = settings.recording()
    if recording is not None:
        found = [one for one in recording.of(frozenset(ports)) if one.component == stage.component]
        if found:
            samples = [recording.load(one) for one in found]
            return Feeds(f"recorded: {len(found)} samples of {settings.recorded}", samples)
    sizes = _sizes(bundle, stage, ports, settings)
    known = vocabularies(stage.load())
    made = inputs.make(ports, settings.seed, sizes, known)
    if not (steps and TIMESTEP in made):
        return Feeds(f"seeded: seed {settings.seed}", [made])
    times = np.linspace(inputs.TRAINED_TIMESTEPS - 1, 1, settings.steps)
    samples = [{**made, TIMESTEP: np.full_like(made[TIMESTEP], one)} for one in times]
    return Feeds(f"seeded: seed {settings.seed}, {settings.steps} timesteps", samples)


def _sizes(
    bundle: Bundle, stage: Stage, ports: Mapping[str, Port], settings: Settings
) -> dict[str, int]:
    """The numbers of the dynamic axes; of models about which nothing is known, those asked for."""
    role, config = Role(stage.record.role), bundle.config(stage.component)
    names = {dim for port in ports.values() for dim in port.dims if isinstance(dim, str)}
    guided = role in (Role.DENOISER, Role.CONTROLNET) and settings.doubled(config)
    batch = settings.batch * (2 if guided else 1)
    if role is Role.MODEL and not settings.shapes:
        found = {"batch": batch, "batch_size": batch}
    else:
        size = settings.size(bundle)
        found = axis_numbers(size, batch, {}, pixels=role is Role.MODEL)
    if stage.component in LONGER:
        found["sequence_length"] = LONGER[stage.component]
    limit = config.get("max_position_embeddings")
    if role is Role.TEXT_ENCODER and limit:
        found["sequence_length"] = min(found["sequence_length"], limit)
    found |= settings.dims
    return {name: number for name, number in found.items() if name in names}


def _ranked(ports: Mapping[str, Port], arrays: Arrays) -> dict[str, np.ndarray]:
    """One number with an axis, or without one, as the graph takes it (``lift_scalars``)."""
    return {
        name: array.reshape((1,) * len(ports[name].dims))
        if name in ports and array.size == 1 and array.ndim != len(ports[name].dims)
        else array
        for name, array in arrays.items()
    }
