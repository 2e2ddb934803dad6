"""``precision``: a component in float32, its ranges, and the smallest keep-list for half."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import companions, datafile, graph
from sdopt.bundle import OPTIMIZED, Bundle, Stage
from sdopt.compare.figures import figures
from sdopt.compare.hooks import Hooks
from sdopt.compare.inputs import TRAINED_TIMESTEPS
from sdopt.compare.pairing import SAMPLES, Asked, Feeds
from sdopt.compare.sides import Opened, side
from sdopt.compare.stepping import Stepper
from sdopt.errors import UsageError
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.precision.bisection import Bisection, Tree, Trial
from sdopt.precision.emulation import HALF, Halves, emulated, halves_of, name_nodes
from sdopt.precision.ranges import limits_of, measure
from sdopt.precision.report import PrecisionReport
from sdopt.report import Progress
from sdopt.tolerance import HALF as ALLOWED

FOLDER = "recipes"
"""The folder of a bundle that recipes are written to."""


def choose(
    bundle: str | Path | Bundle,
    component: str,
    *,
    dtype: str = "fp16",
    tolerance: float | None = None,
    stage: str | None = None,
    recording: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    io: bool = True,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> PrecisionReport:
    """Find the fewest modules that must stay in float32, and write them down as a recipe.

    The stage is run in float32 and every value that a cast would make half is held against what
    half can hold. Then keep-lists are tried: attention is written out (its scores are values as
    well), and every value that is half is rounded before anything reads it, as on a card.

    Args:
        bundle: the bundle or its directory.
        component: which one.
        dtype: ``fp16`` or ``bf16``.
        tolerance: the relative L2 from float32 that is allowed; by default what ``compare``
            allows for the type.
        stage: the float32 stage to start from; the optimized one if there is one, else the raw.
        recording: a folder that ``record`` wrote, so that real activations are looked at.
        samples: of the recorded ones at most so many, evenly chosen; of seeded ones exactly,
            at timesteps from the first to the last.
        seed: of seeded inputs.
        sizes: of their dynamic dimensions by name.
        io: whether inputs and outputs stay in float32.
        output: where to write the recipe; ``BUNDLE/recipes/COMPONENT-DTYPE.recipe`` by default.
        progress: is told what is being tried.

    Raises:
        UsageError: a stage in half precision already, with companions, or that gives NaN in
            float32; inputs that do not fit.
        UnknownNameError, BundleError, BuildError, StorageError: see ``compare``.
    """
    began = time.perf_counter()
    if dtype not in HALF:
        raise UsageError(f"{dtype!r} is no half type", hint="--dtype fp16 or --dtype bf16")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = opened.stage(component, stage) if stage else opened.current(component, OPTIMIZED)
    found = _Candidate(chosen, dtype)
    asked = Asked.of(seed, sizes, None, recording, samples)
    feeds, names = _inputs(opened, chosen, asked, samples)
    tell = progress or (lambda what, share: None)
    tell("ranges in float32", 0.0)
    limits = limits_of(dtype)
    ranges, wanted = measure(found.proto, chosen.path.parent, found.halves, feeds, limits)
    if not all(np.isfinite(array).all() for one in wanted for array in one.values()):
        raise UsageError(
            "this stage gives NaN or infinity in float32",
            where=str(chosen.path),
            hint="sdopt inspect --weights tells whether a weight is; compare --layers where it "
            "begins",
        )
    allowed = tolerance if tolerance is not None else ALLOWED[HALF[dtype].numpy().name]
    trials: list[Trial] = []

    def told(one: Trial) -> None:
        trials.append(one)
        tell(f"trial {len(trials)}: {one.error:.1e}", min(0.99, len(trials) / 100))

    def error(keep: Collection[str]) -> float:
        return found.error(found.halves, found.halves.kept(keep), feeds, wanted)

    search = Bisection(error, allowed, found.tree(), told)
    over = [one.value for one in ranges if one.overflows(limits)]
    everywhere, keep = search.error([]), search.run(found.guesses(over))
    kept = found.halves.kept(keep if keep is not None else found.tree().below())
    if keep is not None:
        # The cast itself with this keep-list, not the estimate that the search went by.
        left = found.error(_Candidate(chosen, dtype, keep).halves, (), feeds, wanted)
    else:
        left = search.error(found.tree().below())
    history = [step.spec for step in chosen.record.history if step.changed]
    entries = [*(["io"] if io else []), *(keep or ())]
    cast = f"cast_{dtype}" + (f":keep={'+'.join(entries)}" if entries else "")
    report = PrecisionReport(
        bundle=str(opened.path),
        component=component,
        stage=chosen.name,
        dtype=dtype,
        tolerance=allowed,
        inputs=f"{len(feeds)} {'recorded' if recording else 'seeded'} sample(s)",
        samples=tuple(names),
        limits=limits,
        ranges=tuple(ranges),
        everywhere=everywhere,
        keep=tuple(keep) if keep is not None else None,
        error=left,
        without={one: search.error([k for k in keep or () if k != one]) for one in keep or ()},
        nodes=len(found.halves.nodes),
        kept=len(kept),
        trials=tuple(trials),
        seconds=time.perf_counter() - began,
        passes=",".join([*history, cast]),
    )
    return _written(report, opened, output)


class _Candidate:
    """A stage in float32 with its attentions written out, and what a cast makes half of it."""

    def __init__(self, stage: Stage, dtype: str, keep: Collection[str] = ()) -> None:
        model = stage.load()
        if companions.of(model) is not None:
            raise UsageError(
                "this stage has companions beside its graph",
                where=str(stage.path),
                hint="choose precision before hoist and deep_cache: --stage optimized",
            )
        tensors = (value.const_value for value in model.graph.initializers.values())
        if any(t is not None and t.dtype in HALF.values() and t.size > 1 for t in tensors):
            raise UsageError(
                "this stage is in half precision already",
                where=str(stage.path),
                why="what float32 would give is not known any more",
                hint="export with --dtype fp32, and start from that: --stage model",
            )
        role = Role(stage.record.role)
        Pipeline.parse("lower_attention").run(model, RunContext(role=role))
        name_nodes(model)
        self._named = any(graph.MODULE_KEY in node.metadata_props for node in model.graph)
        self._folder = stage.path.parent
        self.proto: onnx.ModelProto = ir.to_proto(model)
        self.halves = halves_of(model, dtype, role, keep)
        if not self.halves.nodes:
            raise UsageError("a cast changes nothing of this stage", where=str(stage.path))

    def tree(self) -> Tree:
        """The modules; the operators in a graph that knows no modules."""
        halves = self.halves
        return Tree((halves.nodes if self._named else halves.ops).values())

    def guesses(self, values: Collection[str]) -> list[list[str]]:
        """Modules that may be enough: those that give these values, and with them what reads."""
        paths = self.halves.nodes if self._named else self.halves.ops
        gives = {
            paths[node.name]: None
            for node in self.proto.graph.node
            if node.name in paths and not set(node.output).isdisjoint(values)
        }
        reads = {
            paths[node.name]: None
            for node in self.proto.graph.node
            if node.name in paths and not set(node.input).isdisjoint(values)
        }
        return [list(gives), list({**gives, **reads})] if gives else []

    def error(
        self,
        halves: Halves,
        kept: Collection[str],
        feeds: Sequence[Feeds],
        wanted: Sequence[Mapping[str, np.ndarray]],
    ) -> float:
        """The largest relative L2 of any output in any sample; infinite with NaN or infinity."""
        proto = emulated(self.proto, halves, kept)
        worst = 0.0
        for index, found in enumerate(Stepper(proto, self._folder, nodes=None).results(feeds)):
            for name, array in found.items():
                one = figures(name, array, wanted[index][name])
                worst = max(worst, one.relative_l2 if one.finite else float("inf"))
        return worst


def _inputs(
    bundle: Bundle, stage: Stage, asked: Asked, samples: int
) -> tuple[list[Feeds], list[str]]:
    """What the stage is fed, and of each sample a name for people."""
    one: Opened = side(f"{bundle.path}@{stage.name}", "ort").components[stage.component](
        stage.component
    )
    if asked.recording is not None:
        feeds = asked.feeds(one, one)
        return feeds, [f"recorded sample {n}{_time(feed)}" for n, feed in enumerate(feeds)]
    feeds = []
    for number in range(samples):
        seeded = Asked(asked.seed + number, asked.sizes, Hooks(""))
        (feed,) = seeded.feeds(one, one)
        for name in (name for name in feed if "timestep" in name and feed[name].ndim < 2):
            last = TRAINED_TIMESTEPS - 1
            when = last - round(number * (last - 1) / max(1, samples - 1))
            feed[name] = np.full_like(feed[name], when)
        feeds.append(feed)
    return feeds, [f"seed {asked.seed + n}{_time(feed)}" for n, feed in enumerate(feeds)]


def _time(feed: Feeds) -> str:
    return f" at timestep {float(feed['timestep'].reshape(-1)[0]):g}" if "timestep" in feed else ""


def _written(
    report: PrecisionReport, bundle: Bundle, output: str | Path | None
) -> PrecisionReport:
    """The same report, with its recipe on disk if it has one."""
    if not report.passed:
        return report
    name = f"{report.component}-{report.dtype}.recipe"
    path = Path(output) if output is not None else bundle.path / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# {report.component}: relative L2 {report.error:.2e} from float32, allowed "
        f"{report.tolerance:g}; {report.inputs}",
        *(f"# without {one}: {error:.2e}" for one, error in report.without.items()),
        *report.passes.split(","),
    ]
    datafile.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return PrecisionReport(**{**vars(report), "recipe": str(path)})
