"""What ``bench`` was asked for, as plain data: it goes into the report and to other processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.passes.base import Role
from sdopt.recorded import Recording, open_recording
from sdopt.runtime.request import image_size
from sdopt.shapes import PIXELS_PER_LATENT, Size, parse_sizes

DEFAULT_PROMPTS = (
    "a red apple on a wooden table",
    "a lighthouse in a storm",
    "a cat asleep on a windowsill",
    "a bicycle against a brick wall",
    "an old map of an island",
    "a bowl of soup",
)
"""More than a stage with companions keeps results of, so that each counts as a new prompt.

What is drawn decides nothing else about how long it takes.
"""


@dataclass(frozen=True)
class Settings:
    """The options of one run; see ``sdopt.bench.bench``."""

    stages: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("ort",)
    components: tuple[str, ...] = ()
    shapes: str = ""
    batch: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    recorded: str = ""
    rounds: int = 20
    warm_up: int = 3
    pause: float = 0.1
    images: bool | None = None
    image_rounds: int = 5
    memory: bool = True
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    steps: int = 25
    guidance: float = 7.5
    scheduler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        for name in ("batch", "rounds", "warm_up", "image_rounds", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.pause < float("inf"):
            raise UsageError(f"the pause must be 0 or more seconds, not {self.pause}")
        if not self.prompts:
            raise UsageError("no prompt to draw", hint='--prompt "..."')
        if not self.targets:
            raise UsageError("no target to measure", hint="--target ort")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it is also after a way through a file."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """What ``to_json`` gave."""
        lists = ("stages", "targets", "components", "prompts")
        return cls(**{**data, **{name: tuple(data[name]) for name in lists}})

    def recording(self) -> Recording | None:
        """What was recorded, if a folder was named.

        Raises:
            BundleError: there is no recording.
        """
        return open_recording(self.recorded) if self.recorded else None

    def size(self, bundle: Bundle) -> Size:
        """The images' size: asked for, else that of the recorded run, else the model's own.

        Raises:
            UsageError: text that is no size, or several of them.
        """
        if self.shapes:
            # Of a model about which nothing is known, sides are any number of pixels.
            roles = {entry.role for entry in bundle.manifest.components.values()}
            multiple = 1 if roles == {Role.MODEL.value} else PIXELS_PER_LATENT
            (found, *more) = parse_sizes(self.shapes, multiple=multiple)
            if more or not found.fixed:
                raise UsageError(
                    "one size at a time can be measured",
                    where=self.shapes,
                    hint=f"--shapes {found.usual}, and a run for each other one",
                )
            return found.usual
        recording = self.recording()
        given = recording.settings if recording else {}
        width, height = image_size(
            given.get("width"),
            given.get("height"),
            None,
            _config(bundle, "vae_decoder"),
            _config(bundle, "unet") or _config(bundle, "transformer"),
        )
        return Size(height, width)

    def doubled(self, config: Mapping[str, Any]) -> bool:
        """Whether a denoiser of that configuration computes both halves of guidance at once.

        One that takes guidance as an input (a latent consistency model) computes one.
        """
        return self.guidance > 1 and not config.get("time_cond_proj_dim")


def _config(bundle: Bundle, name: str) -> dict[str, Any]:
    return bundle.config(name) if name in bundle.components else {}
