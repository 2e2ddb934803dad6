"""Running a pipeline over a bundle's components, or over one file, and committing the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import modelfile, provenance
from sdopt.bundle import OPTIMIZED, Bundle, Stage
from sdopt.errors import UsageError
from sdopt.manifest import RECORD_KEY, StageRecord
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.report import ComponentReport, Progress, Report, part

if TYPE_CHECKING:
    from sdopt.targets.base import Target


@dataclasses.dataclass
class Job:
    """One pipeline over the components of one bundle."""

    bundle: Bundle
    pipeline: Pipeline
    source: str | None
    stage: str
    seed: int
    force: bool
    dry_run: bool
    progress: Progress | None
    target: Target | None = None

    def run(self, verb: str, components: Sequence[str] | None) -> Report:
        """Run the pipeline over the components, under the bundle's lock."""
        report = Report(verb, str(self.bundle.path))
        names = list(components or self.bundle.components)
        for name in names:
            self.bundle.entry(name)
        with timed(report):
            if self.dry_run:
                report.components = self._components(names)
            else:
                with self.bundle.lock():
                    report.components = self._components(names)
                    self.bundle.write_manifest()
        return report

    def _components(self, names: Sequence[str]) -> list[ComponentReport]:
        return [
            self._component(name, part(self.progress, index, len(names), name))
            for index, name in enumerate(names)
        ]

    def _component(self, name: str, tell: Progress) -> ComponentReport:
        start = time.perf_counter()
        source = (
            self.bundle.stage(name, self.source)
            if self.source
            else self.bundle.current(name, OPTIMIZED)
        )
        role = Role(source.record.role)
        pipeline = self.pipeline.for_role(role)
        pipeline.refuse_repeats(source.record.history, f"{name}, stage {source.name}")
        record = self._record(source, pipeline)
        path = self.bundle.file(name, self.stage)
        report = ComponentReport(name, self.stage, str(path))
        if not self.force and not self.dry_run and (done := self._done(name, record)):
            report.up_to_date, report.digest = True, done.digest
            report.seconds = time.perf_counter() - start
            return report
        model = source.load()
        context = RunContext(
            name, role, self.bundle.config(name), self.seed, self.stage_target(), tell
        )
        report.passes = pipeline.run(model, context)
        report.nodes = sum(1 for _ in model.graph.all_nodes())
        if self.target is not None:
            self.target.check_legal(model)
        if not self.dry_run:
            tell("write", 0.9)
            record = dataclasses.replace(
                record,
                dtype=provenance.dominant_dtype(model),
                history=(*source.record.history, *provenance.history_of(report.passes)),
            )
            committed, report.bytes_written = self.bundle.commit(model, record)
            report.digest = committed.digest
            if self.target is not None:
                self.target.open(committed.path)
        report.seconds = time.perf_counter() - start
        return report

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
            known |= self.target.versions()
        deciding = [source.digest, str(pipeline), self.seed, str(self.target), known]
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
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run passes over one ONNX file of anyone's and write another.

    All passes asked for apply, whatever their role. Weights that did not change are shared when
    both files lie in one folder, and copied by the kernel otherwise. Where no pass changed
    anything, the output is the input's own bytes and the record behind them.
    """
    path, out, pipeline = Path(source), Path(output), Pipeline.parse(passes)
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
        component.nodes = sum(1 for _ in model.graph.all_nodes())
        component.seconds = sum(each.seconds for each in component.passes)
        if not dry_run:
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


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Record the wall time of a block in a report."""
    start = time.perf_counter()
    yield
    report.seconds = time.perf_counter() - start
