"""The verbs as functions: no printing, no argument parsing; each returns a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import registry
from sdopt.adopting import adopt
from sdopt.bundle import OPTIMIZED, RAW, Bundle, check_stage_name
from sdopt.errors import UsageError
from sdopt.exporting import export as _export
from sdopt.inspection import inspect
from sdopt.packing import pack
from sdopt.pipeline import Pipeline
from sdopt.report import Progress, Report, part
from sdopt.requirements import parse_requirements
from sdopt.staging import Job, optimize_file

if TYPE_CHECKING:
    from sdopt.bench import BenchReport
    from sdopt.compare import Comparison, LayerComparison
    from sdopt.evaluating import Evaluation
    from sdopt.precision import PrecisionReport
    from sdopt.recorded import Recording
    from sdopt.reporting import Options, Written
    from sdopt.runtime.generate import Generated
    from sdopt.sweep.result import Result

__all__ = [
    "adopt",
    "bench",
    "build",
    "compare",
    "compare_layers",
    "evaluate",
    "export",
    "inspect",
    "optimize",
    "optimize_file",
    "pack",
    "precision",
    "record",
    "report",
    "run",
    "sweep",
]


def export(
    source: str | Path,
    output: str | Path | None = None,
    *,
    components: Sequence[str] | None = None,
    dtype: str | None = None,
    in_place: bool = False,
    opset: int | None = None,
    supplied: Mapping[str, str | Path] | None = None,
    lora: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Export a diffusers folder, single file or Hub id to a bundle of canonical graphs.

    Args:
        source: a folder, a ``.safetensors`` file, or ``org/name``.
        output: the bundle's directory; with ``in_place`` it is the source folder itself.
        components: which ones; all that the source has by default.
        dtype: ``fp32``, ``fp16`` or ``bf16``; the checkpoint's by default.
        in_place: write only the graphs, beside the checkpoint, pointing into its files.
        opset: also write each as plain ONNX of this opset, 11 to 25, on the same weights: short
            for ``build`` with the target ``onnx:opset=N``.
        supplied: folders of parts that the source lacks or that replace its own, by the part's
            folder in a pipeline: ``text_encoder``, ``text_encoder_2``, ``vae``, ``tokenizer``.
            With ``controlnet``, a folder, file or Hub id, the UNet's graph takes its residuals.
        lora: adapters to merge, ``FILE`` or ``FILE:scale`` each.
        progress: is told what is being done.

    Raises:
        SourceError, WeightsError, BundleError, StorageError: what was there before is whole.
    """
    plain = registry.make("targets", f"onnx:opset={opset}") if opset is not None else None
    tell = part(progress, 0, 2) if plain is not None else progress
    report = _export(
        source,
        output,
        components=components,
        dtype=dtype,
        in_place=in_place,
        supplied=supplied,
        lora=lora,
        progress=tell,
    )
    if plain is not None:
        tell = part(progress, 1, 2)
        names = [one.component for one in report.components]
        built = build(report.bundle, str(plain), components=names, source=RAW, progress=tell)
        report.components += built.components
        report.seconds += built.seconds
    return report


def optimize(
    bundle: str | Path,
    passes: str,
    *,
    components: Sequence[str] | None = None,
    source: str = RAW,
    stage: str = OPTIMIZED,
    seed: int = 0,
    require: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run passes over a bundle's components and commit the result as a stage.

    Args:
        bundle: the bundle's directory.
        passes: a spec such as ``fuse_qkv,tome=5``, or the path of a recipe file.
        components: which ones; all by default. A pass skips components it is not for.
        source: the stage to start from.
        stage: the stage to write; weights that did not change are shared with ``source``.
        seed: of passes that draw.
        require: what the passes must cover, ``attention=all,geglu=16`` (``sdopt.requirements``).
            Where they do not, nothing is written and the report's ``met`` is false.
        force: run although the stage is there with the same digest of everything that decides it.
        dry_run: rewrite in memory and report, write nothing.
        progress: is told what is being done.

    Raises:
        SdoptError: see the subclasses; what existed before is whole in every case.
    """
    opened, pipeline = Bundle.open(bundle), Pipeline.parse(passes)
    if stage in (source, RAW):
        raise UsageError(
            f"the stage {stage!r} cannot be written by optimize",
            why="a stage is made from another one; the raw one is what export wrote",
            hint=f"choose another name: --stage {OPTIMIZED}",
        )
    check_stage_name(stage)
    wanted = parse_requirements(require) if require is not None else ()
    job = Job(opened, pipeline, source, stage, seed, force, dry_run, progress, require=wanted)
    return job.run("optimize", components)


def build(
    bundle: str | Path,
    targets: str | Sequence[str],
    *,
    components: Sequence[str] | None = None,
    source: str | None = None,
    shapes: str = "",
    batch: tuple[int, int] = (1, 1),
    dims: dict[str, tuple[int, int]] | None = None,
    emit_only: bool = False,
    check: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Lower a bundle's components for one or several targets and make each one's artifact.

    Args:
        bundle: the bundle's directory.
        targets: specs such as ``ort`` or ``trt:dtype=fp16``.
        components: which ones; all by default.
        source: the stage to lower; by default the optimized one where there is one, else the raw.
        shapes: ``512x512,768x768`` or ``256x256..1024x1024``; the model's own size by default.
        batch: images at once, from least to greatest.
        dims: least and greatest size of axes that neither decides.
        emit_only: write the lowered graphs and the compiler's commands instead of running it.
        check: lower, and only see whether the target takes the result.
        force: build although the same artifact is there.
        dry_run: lower in memory and report, write nothing.
        progress: is told what is being done.

    Raises:
        SdoptError: see the subclasses; what existed before is whole in every case.
    """
    from sdopt.building import Plan
    from sdopt.building import build as build_one

    opened = Bundle.open(bundle)
    texts = [targets] if isinstance(targets, str) else list(targets)
    chosen = [registry.make("targets", text) for text in texts]
    plan = Plan(shapes, batch, dims or {}, emit_only, check, force, dry_run)
    report = Report("build", str(opened.path))
    for index, one in enumerate(chosen):
        tell = part(progress, index, len(chosen), one.name())
        found = build_one(opened, one, plan, components=components, source=source, progress=tell)
        report.components += found.components
        report.notes += found.notes
        report.seconds += found.seconds
    return report


def run(bundle: str | Path, prompts: Sequence[str], **options: Any) -> Iterator[Generated]:
    """Make images from prompts; see ``sdopt.runtime.generate.generate`` for the options."""
    from sdopt.runtime.generate import generate

    images: Iterator[Generated] = generate(bundle, prompts, **options)
    return images


def record(bundle: str | Path, prompts: Sequence[str], **options: Any) -> Recording:
    """Keep what components are given while they draw; see ``sdopt.runtime.recording.record``."""
    from sdopt.runtime import recording

    return recording.record(bundle, prompts, **options)


def compare(a: str, b: str, **options: Any) -> Comparison:
    """Compare what two things compute; see ``sdopt.compare.compare`` for the options."""
    from sdopt import compare as comparing

    return comparing.compare(a, b, **options)


def compare_layers(a: str, b: str, **options: Any) -> tuple[LayerComparison, ...]:
    """Compare two things layer by layer; see ``sdopt.compare.compare_layers`` for the options."""
    from sdopt import compare as comparing

    return comparing.compare_layers(a, b, **options)


def precision(bundle: str | Path, component: str, **options: Any) -> PrecisionReport:
    """Find what must stay in float32; see ``sdopt.precision.choose`` for the options."""
    from sdopt.precision import choose

    return choose(bundle, component, **options)


def bench(bundle: str | Path, **options: Any) -> BenchReport:
    """Measure stages on targets side by side; see ``sdopt.bench.bench`` for the options."""
    from sdopt import bench as benching

    return benching.bench(bundle, **options)


def evaluate(
    bundle: str | Path, prompts: str | Path | Sequence[str], output: str | Path, **options: Any
) -> Evaluation:
    """Draw prompts and score the images; see ``sdopt.evaluating.evaluate`` for the options."""
    from sdopt import evaluating

    return evaluating.evaluate(bundle, prompts, output, **options)


def sweep(
    bundle: str | Path, output: str | Path, file: str | Path | None = None, **options: Any
) -> Result:
    """Try recipes on targets and sizes; see ``sdopt.sweep.asking.sweep`` for the options."""
    from sdopt.sweep import asking

    return asking.sweep(bundle, output, file, **options)


def report(
    bundle: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Written:
    """Write one self-contained HTML page about a whole bundle.

    It shows what came from what, what each pass did and left, what that cost, how far each stage
    is from the raw one, and images by each. What cannot be computed here is said in the page and
    in the notes.

    Args:
        bundle: the bundle's directory.
        output: the page's file.
        options: which stages and components, and what is measured (``sdopt.reporting.Options``).
        progress: is told what is being done.

    Raises:
        SdoptError: see ``sdopt.reporting.report``.
    """
    from sdopt import reporting

    return reporting.report(bundle, output, options, progress=progress)
