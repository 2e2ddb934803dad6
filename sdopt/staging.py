"""Running a pipeline over a bundle's components, or over one file, and committing the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import companions, modelfile, origins, provenance, stage_report
from sdopt.bundle import OPTIMIZED, RAW, Bundle, Stage
from sdopt.errors import UsageError
from sdopt.manifest import RECORD_KEY, StageRecord
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.report import ComponentReport, Progress, Report, part
from sdopt.requirements import Requirement, judge, parse_requirements
from sdopt.runtime.scheduled import open_stage

if TYPE_CHECKING:
    import onnx_ir as ir

    from sdopt.targets.base import Target


Commit = Callable[[], None]
"""Writes a stage that was made, and completes its report."""


@dataclasses.dataclass
class Job:
    """One pipeline over the components of one bundle.

    ``command`` are the words of a build, but for where it starts and for which components.
    """

    bundle: Bundle
    pipeline: Pipeline
    source: str | None
    stage: str
    seed: int
    force: bool
    dry_run: bool
    progress: Progress | None
    target: Target | None = None
    prove: bool = True
    require: Sequence[Requirement] = ()
    command: tuple[str, ...] = ()
    _only: tuple[str, ...] = ()

    def run(self, verb: str, components: Sequence[str] | None) -> Report:
        """Run the pipeline over the components, under the bundle's lock."""
        report = Report(verb, str(self.bundle.path))
        names = list(components or self.bundle.components)
        self._only = stage_report.only(components)
        for name in names:
            self.bundle.entry(name)
        with timed(report):
            if self.dry_run:
                self._components(names, report)
            else:
                with self.bundle.lock():
                    self._components(names, report)
                    self.bundle.write_manifest()
        return report

    def _components(self, names: Sequence[str], report: Report) -> None:
        """Rewrite and commit each; with requirements all are judged before one is committed."""
        commits: list[Commit] = []
        for index, name in enumerate(names):
            tell = part(self.progress, index, len(names), name)
            component, commit = self._component(name, tell, report.verb)
            report.components.append(component)
            if commit is not None and not self.require:
                commit()
            elif commit is not None:
                commits.append(commit)
        report.requirements = judge(self.require, report.components)
        if report.met:
            for commit in commits:
                commit()

    def _component(
        self, name: str, tell: Progress, verb: str
    ) -> tuple[ComponentReport, Commit | None]:
        """The report of the passes, and what writes the stage unless that is there or not wanted.

        A requirement is judged by what the passes say, so they run although the stage is there.
        """
        start = time.perf_counter()
        source = (
            self.bundle.stage(name, self.source)
            if self.source
            else self.bundle.current(name, OPTIMIZED)
        )
        role = Role(source.record.role)
        pipeline = self._pipeline(role)
        pipeline.refuse_repeats(source.record.history, f"{name}, stage {source.name}")
        record = self._record(source, pipeline)
        path = self.bundle.file(name, self.stage)
        report = ComponentReport(name, self.stage, str(path))
        if not self.force and not self.dry_run and (done := self._done(name, record)):
            report.up_to_date, report.digest = True, done.digest
            if not self.require:
                report.seconds = time.perf_counter() - start
                return report, None
        model = source.load()
        context = RunContext(
            name, role, self.bundle.config(name), self.seed, self.stage_target(), tell
        )
        report.passes = pipeline.run(model, context)
        report.nodes = _node_count(model)
        if self.target is not None:
            for one in companions.family(model):
                self.target.check_legal(one)
        report.seconds = time.perf_counter() - start
        if self.dry_run or report.up_to_date:
            return report, None

        def commit() -> None:
            start = time.perf_counter()
            tell("write", 0.9)
            made = dataclasses.replace(
                record,
                dtype=provenance.dominant_dtype(model),
                history=(*source.record.history, *provenance.history_of(report.passes)),
            )
            committed, report.bytes_written = self.bundle.commit(model, made)
            report.digest = committed.digest
            report.seconds += time.perf_counter() - start
            stage_report.keep(path, verb, self._command(source), report)
            if self.target is not None and self.prove and not self.target.compiled:
                start = time.perf_counter()
                open_stage(self.target, committed.path)
                report.seconds += time.perf_counter() - start

        return report, commit

    def _command(self, source: Stage) -> tuple[str, ...]:
        """The words that the stage is made with, what was left to defaults spelled out."""
        words = self.command
        if self.target is None:
            words = ("optimize", stage_report.BUNDLE, "--passes", str(self.pipeline))
            words += ("--stage", self.stage) * (self.stage != OPTIMIZED)
            words += ("--seed", str(self.seed)) * bool(self.seed)
        is_default = source.name == (RAW if self.target is None else OPTIMIZED)
        return (*words, *(() if is_default else ("--from", source.name)), *self._only)

    def _pipeline(self, role: Role) -> Pipeline:
        if self.target is None:
            return self.pipeline.for_role(role)
        return Pipeline.parse(self.target.lowering(role)).for_role(role)

    def stage_target(self) -> str | None:
        """The word of the target that the stage is prepared for, if any."""
        return self.target.name() if self.target is not None else None

    def _done(self, name: str, record: StageRecord) -> Stage | None:
        """The stage on disk if it came from the same source by the same passes and versions."""
        if self.stage not in self.bundle.stages(name):
            return None
        found = self.bundle.stage(name, self.stage)
        return found if found.record.key == record.key else None

    def _record(self, source: Stage, pipeline: Pipeline) -> StageRecord:
        known = provenance.versions("onnx", "onnx-ir", "numpy")
        if self.target is not None:
            known |= self.target.lowering_versions()
        target = self.target.deciding() if self.target is not None else "None"
        # A stage of before origins were recorded is made again.
        deciding = [source.digest, str(pipeline), self.seed, target, known, origins.SCHEMA]
        deciding += pipeline.reads()
        return dataclasses.replace(
            source.record,
            stage=self.stage,
            source_stage=source.name,
            source=source.digest,
            key=provenance.key(deciding),
            versions=known,
        )


def optimize_file(
    source: str | Path,
    output: str | Path,
    passes: str,
    *,
    seed: int = 0,
    require: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run passes over one ONNX file of anyone's and write another.

    All passes asked for apply, whatever their role. Weights that did not change are shared when
    both files lie in one folder, and copied by the kernel otherwise. Where no pass changed
    anything, the output is the input's own bytes and the record behind them. Where ``require``
    (``attention=all``) is not met nothing is written, and the report's ``met`` is false.
    """
    path, out, pipeline = Path(source), Path(output), Pipeline.parse(passes)
    wanted = parse_requirements(require) if require is not None else ()
    if out.resolve() == path.resolve():
        raise UsageError(
            "the output would overwrite its own input", where=str(out), hint="choose another -o"
        )
    report = Report("optimize", str(out))
    with timed(report):
        model = modelfile.load(path)
        text = model.metadata_props.get(RECORD_KEY)
        if text:
            record = StageRecord.loads(text, str(path))
            pipeline.refuse_repeats(record.history, str(path))
        component = ComponentReport(path.stem, out.stem, str(out))
        report.components.append(component)
        component.passes = pipeline.run(model, RunContext(path.stem, seed=seed, progress=progress))
        component.nodes = _node_count(model)
        component.seconds = sum(each.seconds for each in component.passes)
        report.requirements = judge(wanted, report.components)
        if report.met and not dry_run:
            out.parent.mkdir(parents=True, exist_ok=True)
            record = provenance.file_record(path, out, text, pipeline, component.passes, model)
            changed = any(each.changed for each in component.passes)
            moves = path.resolve().parent != out.resolve().parent
            if changed or (moves and modelfile.has_data_files(model)):
                model.metadata_props[RECORD_KEY] = record.dumps()
                saved = modelfile.save(model, out)
            else:
                saved = modelfile.annotate(path, out, RECORD_KEY, record.dumps())
            modelfile.remove_orphans(out)
            component.digest, component.bytes_written = saved.digest, saved.bytes_written
    return report


def _node_count(model: ir.Model) -> int:
    return sum(1 for one in companions.family(model) for _ in one.graph.all_nodes())


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Record the wall time of a block in a report."""
    start = time.perf_counter()
    yield
    report.seconds = time.perf_counter() - start
