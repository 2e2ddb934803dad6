"""Recording what a bundle's components are given while they draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdopt import recorded
from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.recorded import Origin, Recording
from sdopt.report import Progress
from sdopt.runtime.generate import DEFAULT_GUIDANCE, DEFAULT_STEPS, generate
from sdopt.runtime.session import Opener, choose_stages, opener
from sdopt.session import Session, Wrapped

DENOISERS = ("unet", "transformer")
DEFAULT_KEEP = 8


class Tape:
    """Decides which calls are written, and says of each what it was for."""

    def __init__(self, writer: recorded.Writer, steps: int, keep: int) -> None:
        self._writer = writer
        # The first and the last step are among them, the others evenly between.
        gaps = max(1, min(keep, steps) - 1)
        self._chosen = {round(i * (steps - 1) / gaps) for i in range(min(keep, steps))}
        self.begin("", 0)

    def begin(self, prompt: str, seed: int) -> None:
        """The calls that follow draw another image."""
        self._prompt, self._seed = prompt, seed
        self._step, self._timestep = -1, float("nan")

    def heard(self, component: str, feeds: Mapping[str, np.ndarray]) -> None:
        """A component was given ``feeds``; no graph takes float64, which a timestep may be in."""
        feeds = {
            name: one.astype(np.float32) if one.dtype == np.float64 else one
            for name, one in feeds.items()
        }
        if component not in DENOISERS:
            self._writer.add(component, feeds, prompt=self._prompt, seed=self._seed)
            return
        timestep = float(np.asarray(feeds["timestep"]).reshape(-1)[0])
        if timestep == self._timestep:
            return  # a scheduler such as heun asks twice at one timestep
        self._step, self._timestep = self._step + 1, timestep
        if self._step in self._chosen:
            facts = {"step": self._step, "timestep": timestep}
            self._writer.add(component, feeds, prompt=self._prompt, seed=self._seed, **facts)


class Recorder(Wrapped):
    """A session that lets a tape hear what it is given."""

    def __init__(self, session: Session, component: str, tape: Tape) -> None:
        super().__init__(session)
        self._component, self._tape = component, tape

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session computes."""
        self._tape.heard(self._component, feeds)
        return self.session.run(feeds)


class _RecordingOpener:
    """A target whose sessions on some files are recorded."""

    def __init__(self, target: Opener, components: Mapping[Path, str], tape: Tape) -> None:
        self._target, self._components, self._tape = target, components, tape

    def check_available(self) -> None:
        self._target.check_available()

    def stage_name(self) -> str:
        return self._target.stage_name()

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        session = self._target.open(path, optimize=optimize)
        component = self._components.get(Path(path))
        return session if component is None else Recorder(session, component, self._tape)


def record(
    bundle: str | Path | Bundle,
    prompts: Sequence[str],
    *,
    output: str | Path | None = None,
    keep: int = DEFAULT_KEEP,
    negative: str = "",
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    seed: int = 0,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    stage: str | None = None,
    target: str = "ort",
    force: bool = False,
    progress: Progress | None = None,
) -> Recording:
    """Draw one image per prompt, and write what each component was given.

    Of the denoiser's calls ``keep`` per prompt are kept, evenly over the steps; of the others
    all that differ. A sample is written as it comes, and an earlier recording in the folder stays
    whole until this one is. Nothing is done if that is the same one already.

    Args:
        bundle: the bundle or its directory.
        prompts: what to draw; prompt number ``n`` from ``seed + n``.
        output: the folder; ``BUNDLE/recorded/default`` by default.
        keep: denoising steps to keep per prompt.
        negative: what not to draw.
        steps: of denoising.
        guidance: scale; 1 or less turns classifier-free guidance off, and halves the batch.
        seed: of the first image.
        scheduler: a short name; the bundle's by default.
        width: pixels, a multiple of 8; the model's own by default.
        height: likewise.
        stage: the stage to run; the newest that fits by default.
        target: what runs it.
        force: record although the same is there.
        progress: is told the image and the step.

    Raises:
        UsageError: a number that cannot be.
        StorageError: the disk is full or the folder cannot be written.
        BundleError, UnknownNameError, MissingDependencyError, BuildError: see ``generate``.
    """
    if keep < 1:
        raise UsageError(f"keep must be 1 or more, not {keep}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = opener(target)
    stages = choose_stages(opened, chosen, stage, image_to_image=False)
    origins = {name: Origin(one.name, one.digest) for name, one in stages.items()}
    settings = {
        "prompts": list(prompts),
        "keep": keep,
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "scheduler": scheduler,
        "width": width,
        "height": height,
    }
    digests = {name: one.digest for name, one in origins.items()}
    deciding = json.dumps([settings, digests, str(chosen)], sort_keys=True)
    key = hashlib.sha256(deciding.encode()).hexdigest()[:16]
    folder = opened.path / recorded.FOLDER / "default" if output is None else Path(output)
    if not force and (folder / recorded.INDEX).is_file():
        there = recorded.open_recording(folder)
        if there.key == key and all((folder / one.file).is_file() for one in there.samples):
            return there
    with opened.lock():
        writer = recorded.Writer(folder)
        tape = Tape(writer, steps, keep)
        files = {one.path: name for name, one in stages.items()}
        images = generate(
            opened,
            prompts,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scheduler=scheduler,
            width=width,
            height=height,
            stage=stage,
            target=_RecordingOpener(chosen, files, tape),
            progress=progress,
        )
        for index, prompt in enumerate(prompts):
            tape.begin(prompt, seed + index)
            next(images)
        return writer.commit(key, settings, origins)
