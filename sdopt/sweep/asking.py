"""What a sweep may be asked for: options of the command line, or the same in a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdopt import reading, spec
from sdopt.bench.settings import Settings as BenchSettings
from sdopt.bundle import Bundle
from sdopt.errors import UnknownNameError, UsageError
from sdopt.evaluating.prompts import read_prompts
from sdopt.report import Progress
from sdopt.sweep.engines import maker
from sdopt.sweep.result import Result
from sdopt.sweep.sampling import Sampling
from sdopt.sweep.settings import MEASURES, Scoring, Settings
from sdopt.sweep.space import Space
from sdopt.sweep.sweeping import Typed, run


@dataclass(frozen=True)
class Asked:
    """The options of ``sdopt sweep``; in a TOML file they have the same names.

    Attributes:
        passes: recipes with ranges and alternatives; empty text is the raw graph.
        target: specs, likewise.
        shapes: HEIGHTxWIDTH, comma between several; the model's own by default.
        batch: images at once.
        prompts: a file of them as ``eval`` takes, or the texts themselves.
        limit: only the first so many.
        seeds: images are drawn from.
        scorer: FILE.py:FUNCTION or MODULE:FUNCTION.
        clip: a folder of CLIP.
        distance: score by the likeness to the raw graph's images.
        measure: of ``time``, ``memory``, ``score``.
        probe: see ``Settings``; so are the following up to ``pause``.
        sampler: see ``Sampling``; so are ``budget`` and ``sampler_seed``.
        workers: processes of this machine; 0 is this process itself.
        ray: ``auto``, or the address of a cluster.
        allow_other_versions: whether nodes with other versions may take part.
    """

    passes: tuple[str, ...] = ("@fast",)
    target: tuple[str, ...] = ("ort",)
    shapes: str = ""
    batch: tuple[int, ...] = (1,)
    prompts: str | tuple[str, ...] = ()
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    scorer: str | None = None
    clip: str | None = None
    distance: bool = False
    measure: tuple[str, ...] = tuple(MEASURES)
    probe: int = 4
    steps: int = 25
    guidance: float = 7.5
    scheduler: str | None = None
    negative: str = ""
    rounds: int = 5
    pause: float = 0.1
    sampler: str = "grid"
    budget: int | None = None
    sampler_seed: int = 0
    workers: int = 0
    ray: str | None = None
    allow_other_versions: bool = False
    folder: Path = field(default_factory=Path)
    """What paths of prompts, scorers and CLIP are relative to: a TOML file's own folder."""

    def space(self, bundle: Bundle) -> Space:
        """What may be tried.

        Raises:
            SdoptError: see ``Space.of``.
        """
        size = self.shapes or str(BenchSettings().size(bundle))
        return Space.of(self.passes, self.target, [size], self.batch)

    def settings(self) -> Settings:
        """What all points have in common.

        Raises:
            UsageError: the scorer or the prompts are missing or cannot be read.
        """
        scored = "score" in self.measure
        names = {one.name for one in dataclasses.fields(Settings)} & {
            one.name for one in dataclasses.fields(self)
        }
        plain = {name: getattr(self, name) for name in names}
        plain |= {"seeds": tuple(self.seeds), "measure": tuple(self.measure), "prompts": ()}
        if not scored:
            return Settings(**plain)
        scorer = self._path(self.scorer, of_code=True)
        plain["scoring"] = Scoring.of(self._path(self.clip), scorer, self.distance)
        if self.prompts:
            source = self.prompts
            chosen = read_prompts(
                str(self._path(source)) if isinstance(source, str) else source, limit=self.limit
            )
            plain["prompts"] = tuple(one.text for one in chosen)
        return Settings(**plain)

    def sampling(self) -> Sampling:
        """How the space is searched.

        Raises:
            UsageError: see ``Sampling``.
        """
        return Sampling(self.sampler, self.budget, self.sampler_seed)

    def typed(self, command: str) -> Typed:
        """The words that say prompts, seeds and scorer again, paths absolute."""
        words: list[tuple[str, ...]] = []
        if "score" in self.measure:
            if isinstance(self.prompts, str):
                words.append(("--prompts", str(Path(self._path(self.prompts) or "").absolute())))
            else:
                words += [("--prompt", one) for one in self.prompts]
            words += [("--limit", str(self.limit))] * (self.limit is not None)
            words.append(("--seeds", ",".join(map(str, self.seeds))))
            for name in ("scorer", "clip"):
                if place := self._path(getattr(self, name), of_code=name == "scorer"):
                    file = Path(place.rpartition(":")[0] if name == "scorer" else place)
                    words.append(
                        (f"--{name}", str(Path(place).absolute()) if file.exists() else place)
                    )
            words += [("--distance",)] * self.distance
        return Typed(command, tuple(words))

    def _path(self, text: str | None, *, of_code: bool = False) -> str | None:
        """A path as it is from here; code that is named by its module stays as it is."""
        if text is None:
            return None
        file = Path(text.rpartition(":")[0] if of_code else text)
        return str(self.folder / text) if not of_code or file.suffix == ".py" else text


def asked(file: Path | None, given: Mapping[str, Any]) -> Asked:
    """The options of a TOML file, and over them those that were given.

    Args:
        file: the sweep file, if any.
        given: by name; None stands for not given.

    Raises:
        UnknownNameError: an option that does not exist; names the nearest.
        UsageError: the file cannot be read, or a value is of another type.
    """
    found = _read(file) if file is not None else {}
    mine = {name: value for name, value in given.items() if value is not None}
    if file is not None and {"prompts", "scorer", "clip"} & {*found}:
        # Those of the file are relative to it, those of the command line to where it is typed.
        for name in ("prompts", "scorer", "clip"):
            if name in mine and isinstance(mine[name], str):
                mine[name] = str(Path(mine[name]).absolute())
    for one in ("scorer", "clip", "distance"):
        if one in mine:
            found = {k: v for k, v in found.items() if k not in ("scorer", "clip", "distance")}
    folder = file.parent if file is not None else Path()
    return Asked(**{"folder": folder, **found, **mine})


def _read(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            "the sweep file cannot be read",
            where=str(path),
            why=why,
            hint='TOML: passes = ["@fast,tome=0..5"]',
        ) from error
    known = [one.name for one in dataclasses.fields(Asked) if one.name != "folder"]
    for name in data:
        if name not in known:
            raise UnknownNameError(
                f"a sweep has no option {name!r}", where=str(path), hint=spec.suggest(name, known)
            )
    for name in ("passes", "target", "batch", "seeds", "measure"):
        if name in data and not isinstance(data[name], list):
            data[name] = [data[name]]
    try:
        return reading.fields(Asked, data)
    except TypeError as error:
        raise UsageError(
            "a value of this sweep file is of another type", where=str(path), why=str(error)
        ) from error


def sweep(
    bundle: str | Path,
    output: str | Path,
    file: str | Path | None = None,
    *,
    command: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Try recipes on targets and sizes; the frontier of time, memory and quality.

    Args:
        bundle: the bundle's directory.
        output: the folder of the results; what is there already is not measured again.
        file: a TOML file of options.
        command: what was typed, for the report.
        progress: is told how far it is.
        options: those of ``Asked``, which go before the file's; None stands for not given.

    Raises:
        SdoptError: see ``sdopt.sweep.sweeping.run``.
    """
    wanted = asked(Path(file) if file is not None else None, options)
    return run(
        bundle,
        output,
        wanted.space(Bundle.open(bundle)),
        wanted.settings(),
        sampling=wanted.sampling(),
        engine=maker(wanted.workers, wanted.ray, other_versions=wanted.allow_other_versions),
        typed=wanted.typed(command),
        progress=progress,
    )
