"""Building a bundle for a target: lower each component, then let the target's compiler have it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sdopt import artifacts, datafile, modelfile, provenance
from sdopt.bundle import OPTIMIZED, Bundle, Stage
from sdopt.errors import BuildError, SdoptError, UsageError
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline
from sdopt.report import ComponentReport, Progress, Report, part
from sdopt.shapes import PIXELS_PER_LATENT, Extent, Request, Size, parse_sizes
from sdopt.stage_report import BUNDLE
from sdopt.staging import Job
from sdopt.targets.base import Order, Target


@dataclass(frozen=True)
class Plan:
    """What is to be built, and how far.

    Attributes:
        shapes: ``--shapes`` as it was typed; the model's own size where it is empty.
        batch: images at once, from least to greatest.
        dims: least and greatest size of axes that neither decides.
        emit_only: lower, and write the compiler's commands instead of running it.
        check_only: lower, and see whether the compiler takes the graphs, without compiling.
        force: build although the same artifact is there.
        dry_run: lower in memory and report, write nothing.
    """

    shapes: str = ""
    batch: tuple[int, int] = (1, 1)
    dims: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    emit_only: bool = False
    check_only: bool = False
    force: bool = False
    dry_run: bool = False

    def command(self, target: Target) -> tuple[str, ...]:
        """The words of ``sdopt build`` that say the same of a target."""
        words = ["build", BUNDLE, "--target", str(target)]
        words += ["--shapes", self.shapes] * bool(self.shapes)
        words += ["--batch", _extent(self.batch)] * (self.batch != (1, 1))
        for name, extent in self.dims.items():
            words += ["--dim", f"{name}={_extent(extent)}"]
        words += ["--emit-only"] * self.emit_only + ["--check"] * self.check_only
        return tuple(words)


def build(
    bundle: Bundle,
    target: Target,
    plan: Plan,
    *,
    components: Sequence[str] | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Lower components for a target and compile them, or write down how to.

    Raises:
        MissingDependencyError: what the target needs is not installed; with ``emit_only`` nothing
            is needed.
        BuildError: the graph is illegal for the target, or its compiler failed.
        UsageError: sizes that cannot be.
    """
    _refuse_name(bundle, target, components, source)
    request = _request(bundle, plan)
    if target.compiled:
        _refuse_unsaid(bundle, request, components, source)
    asked, target = target, target.sized(request)
    if not (plan.emit_only or plan.check_only):
        target.check_available()
    job = Job(
        bundle,
        Pipeline(()),
        source,
        target.stage_name(),
        0,
        plan.force,
        plan.dry_run,
        part(progress, 0, 2),
        target=target,
        prove=not (plan.emit_only or plan.check_only),
        command=plan.command(asked),
    )
    report = job.run("build", components)
    report.notes += target.notes()
    if plan.dry_run:
        return report
    start = time.perf_counter()
    with bundle.lock():
        orders = [
            _order(
                bundle, one, target, request, part(part(progress, 1, 2), i, len(report.components))
            )
            for i, one in enumerate(report.components)
        ]
        if plan.check_only:
            report.notes += [note for order in orders for note in target.check(order)]
        elif plan.emit_only:
            report.notes += _emit(bundle, target, orders)
        else:
            for one, order in zip(report.components, orders, strict=True):
                _compile(one, order, target, plan.force)
    report.seconds += time.perf_counter() - start
    return report


def _refuse_name(
    bundle: Bundle, target: Target, components: Sequence[str] | None, source: str | None
) -> None:
    """Refuse a name for the build that is its source's, or that the target makes nothing of."""
    name = target.stage_name()
    if target.stage and name != target.stage:
        raise UsageError(
            f"a build for {target.name()} cannot be given a name",
            why=f"it is always called {name}",
            hint="leave out --name",
        )
    names = components or bundle.components
    sources = {source or bundle.current(one, OPTIMIZED).name for one in names}
    if name in sources:
        raise UsageError(
            f"the build cannot be called {name!r}",
            why="that is the stage that it is made from",
            hint="choose another --name, or another --from",
        )


def _extent(extent: tuple[int, int]) -> str:
    low, high = extent
    return str(low) if low == high else f"{low}..{high}"


def _request(bundle: Bundle, plan: Plan) -> Request:
    """The sizes that were asked for; of adopted graphs any number of pixels, and no usual one."""
    roles = {entry.role for entry in bundle.manifest.components.values()}
    if roles == {Role.MODEL.value} and plan.shapes:
        return Request(parse_sizes(plan.shapes, multiple=1), plan.batch, plan.dims)
    side = PIXELS_PER_LATENT * int(_sample_size(bundle) or 64)
    native = Size(side, side)
    sizes = parse_sizes(plan.shapes or str(native), native)
    return Request(sizes, plan.batch, plan.dims, asked=bool(plan.shapes))


def _refuse_unsaid(
    bundle: Bundle, request: Request, components: Sequence[str] | None, source: str | None
) -> None:
    """Refuse, before a size is built into anything, adopted graphs whose axes nobody gave one."""
    for name in components or bundle.components:
        if bundle.entry(name).role == Role.MODEL.value:
            stage = bundle.stage(name, source) if source else bundle.current(name, OPTIMIZED)
            _profiles(stage, request)


def _profiles(stage: Stage, request: Request) -> list[dict[str, list[Extent]]]:
    """The extents of every axis of a stage's inputs, each profile once."""
    inputs = {
        value.name or "": [
            dim if isinstance(dim, int) else str(dim.value) for dim in (value.shape or ())
        ]
        for value in stage.load().graph.inputs
    }
    role, where = Role(stage.record.role), stage.component
    doubled, pixels = role in (Role.DENOISER, Role.CONTROLNET), role is Role.MODEL
    found = request.profiles(inputs, doubled=doubled, pixels=pixels, where=where)
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _order(
    bundle: Bundle, one: ComponentReport, target: Target, request: Request, progress: Progress
) -> Order:
    stage = bundle.stage(one.component, target.stage_name())
    profiles = _profiles(stage, request) if target.compiled else []
    role, family = Role(stage.record.role), stage.record.family
    return Order(
        one.component,
        role,
        stage.path,
        profiles,
        request.sizes,
        request.batch,
        progress,
        family,
    )


def _sample_size(bundle: Bundle) -> int | None:
    """The latent's side that the denoiser was trained at, as its configuration says."""
    names = [n for n, e in bundle.manifest.components.items() if e.role == Role.DENOISER.value]
    found = [bundle.config(name).get("sample_size") for name in names]
    return next((int(size) for size in found if isinstance(size, int)), None)


def _compile(report: ComponentReport, order: Order, target: Target, force: bool) -> None:
    path = target.artifact_path(order)
    if path is None:
        return
    artifacts.tidy(path)
    versions = dict(target.compiler())
    deciding = [report.digest, target.deciding(), versions, [dict(p) for p in order.profiles]]
    key = provenance.key(deciding)
    if not force and (found := artifacts.known(path, key)) is not None:
        report.artifact = dataclasses.asdict(found) | {"up_to_date": True}
        return
    start = time.perf_counter()
    with artifacts.writing(path) as folder:
        made = folder / path.name
        try:
            facts = target.compile(order, made)
        except SdoptError as error:
            error.where = error.where or order.component
            raise
        if not made.is_file():
            raise BuildError(
                f"the compiler of {target.name()} ended without an artifact",
                where=str(path),
                hint="run it by hand: --emit-only writes the commands",
            )
        seconds = time.perf_counter() - start
        about = {"target": str(target), **facts}
        found = artifacts.commit(made, path, key, seconds, versions, about)
    report.artifact = dataclasses.asdict(found)


def _emit(bundle: Bundle, target: Target, orders: Sequence[Order]) -> list[str]:
    """Write the commands and what to copy for them; returns notes that say where."""
    lines, stem = target.commands(orders), f"build-{target.stage_name()}"
    files = _files(bundle, orders)
    text = f"# {target}\n\nCopy these files, keeping their folders, to the machine that is to "
    if lines:
        script = "#!/bin/sh\n# Makes the artifacts from the lowered graphs.\nset -eu\n"
        script += 'cd "$(dirname "$0")"\n' + "\n".join(lines) + "\n"
        datafile.write_bytes(bundle.path / f"{stem}.sh", script.encode())
        (bundle.path / f"{stem}.sh").chmod(0o755)
        files.insert(0, f"{stem}.sh")
        text += f"compile them, and run `sh {stem}.sh` there"
    else:
        text += "run them"
    text += ":\n\n" + "".join(f"    {name}\n" for name in files)
    if lines:
        text += "\nThen copy the artifacts back, keeping their folders.\n"
    text += "".join(f"\n{remark}\n" for remark in target.remarks(orders))
    datafile.write_bytes(bundle.path / f"{stem}.md", text.encode())
    return [f"what to copy where is in {bundle.path / f'{stem}.md'}"]


def _files(bundle: Bundle, orders: Sequence[Order]) -> list[str]:
    found: list[str] = []
    for order in orders:
        names = [order.lowered.name, *sorted(modelfile.files_of(order.lowered))]
        found += [str((order.lowered.parent / n).relative_to(bundle.path)) for n in names]
    return list(dict.fromkeys(found))
