"""The models of onnx's own backend tests, each through every pass that keeps the result.

``python -m tests.zoo`` writes docs/zoo.md; tests/test_zoo.py judges the same outcomes.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader as loader
import onnxruntime as ort
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from sdopt import api
from sdopt.errors import SdoptError, UsageError
from sdopt.manifest import RECORD_KEY
from sdopt.pipeline import Pipeline
from sdopt.tolerance import FP32_REASSOCIATED, HALF, Numerics

DATA = Path(loader.DATA_DIR)
FOLDERS = ("light", "pytorch-converted", "pytorch-operator", "simple")
SPECS = (
    "@clean",
    "@fast",
    "clean,raise_ops,clean",
    "fuse_qkv",
    "lower_group_norm,lower_attention",
)
"""What each model goes through: the presets and passes that are not lossy."""

CHUNKS = 16
"""The cases are dealt into this many parts of about equal size."""

Feeds = Mapping[str, Any]
Runner = Callable[[onnx.ModelProto, Feeds], list[Any]]


@dataclass(frozen=True)
class Case:
    """One model, with the inputs that onnx ships for it."""

    name: str
    category: str
    load: Callable[[], tuple[onnx.ModelProto, Feeds, Sequence[Any]]]
    """The model, what to feed it, and what onnx says comes out (empty if it does not say)."""


@functools.cache
def cases() -> tuple[Case, ...]:
    """Every model of the package: the node tests, which it generates, and the folders."""
    with warnings.catch_warnings():
        # onnx 1.23's own generators overflow and divide by zero on purpose.
        warnings.simplefilter("ignore")
        made = loader.load_node_model_tests()
    found = [Case(one.name, "node", functools.partial(_from_memory, one)) for one in made]
    found += [
        Case(path.stem, "light", functools.partial(_light, path))
        for path in sorted((DATA / "light").glob("*.onnx"))
    ]
    found += [
        Case(path.parent.name, folder, functools.partial(_from_folder, path))
        for folder in FOLDERS[1:]
        for path in sorted((DATA / folder).glob("*/model.onnx"))
    ]
    return tuple(found)


def chunk(index: int) -> tuple[Case, ...]:
    """One of ``CHUNKS`` parts."""
    return cases()[index::CHUNKS]


def _from_memory(case: Any) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    inputs, outputs = case.data_sets[0]
    names = [one.name for one in case.model.graph.input]
    return case.model, dict(zip(names, map(_plain, inputs), strict=False)), [*map(_plain, outputs)]


def _from_folder(path: Path) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    model = onnx.load(path)
    sets = path.parent / "test_data_set_0"
    feeds = {
        one.name: _read(sets / f"input_{index}.pb", one.type)
        for index, one in enumerate(model.graph.input)
        if (sets / f"input_{index}.pb").exists()
    }
    wanted = [
        _read(sets / f"output_{index}.pb", one.type)
        for index, one in enumerate(model.graph.output)
    ]
    return model, feeds, wanted


def _light(path: Path) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    """The input is the ramp that onnx's own runner feeds these (``generate_dummy_data``)."""
    model = onnx.load(path)
    given = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for one in model.graph.input:
        if one.name not in given:
            shape = [dim.dim_value or 1 for dim in one.type.tensor_type.shape.dim]
            size = int(np.prod(shape))
            feeds[one.name] = (np.arange(size).reshape(shape) / size).astype(np.float32)
    output = onnx.load_tensor(path.with_name(f"{path.stem}_output_0.pb"))
    return model, feeds, [numpy_helper.to_array(output)]


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    data = path.read_bytes()
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def by_ort(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    """ONNX Runtime's CPU with every optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options)
    run = ort.RunOptions()
    run.log_severity_level = 4
    return list(session.run(None, dict(feeds), run))


def by_reference(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    """onnx's own evaluator."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(model).run(None, dict(feeds)))


RUNNERS: dict[str, Runner] = {"ort": by_ort, "reference": by_reference}


@dataclass(frozen=True)
class Outcome:
    """One model through one spec: what happened to it and to its numbers.

    Attributes:
        changed: whether a pass changed the graph.
        error: what is wrong, empty if nothing is.
        refused: what an SdoptError said.
    """

    case: Case
    spec: str
    runner: str
    changed: bool = False
    error: str = ""
    refused: str = ""


def outcomes(cases: Sequence[Case], specs: Sequence[str], folder: Path) -> Iterator[Outcome]:
    """Each case through each spec, as ``sdopt optimize`` runs them."""
    for case in cases:
        model, feeds, _ = case.load()
        source, target = folder / "model.onnx", folder / "out.onnx"
        source.write_bytes(model.SerializeToString())
        runner, wanted = raw_result(model, feeds)
        for spec in specs:
            yield _outcome(case, spec, runner, wanted, feeds, source, target)


def raw_result(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, list[Any]]:
    """What computes the model as it comes, and its outputs; ``none`` if nothing here can."""
    for name, runner in RUNNERS.items():
        try:
            return name, runner(model, feeds)
        except Exception:  # whatever a runtime says about an operator that it lacks
            continue
    return "none", []


def _outcome(
    case: Case,
    spec: str,
    runner: str,
    wanted: Sequence[Any],
    feeds: Feeds,
    source: Path,
    target: Path,
) -> Outcome:
    outcome = functools.partial(Outcome, case, spec, runner)
    try:
        report = api.optimize_file(source, target, spec)
    except SdoptError as error:
        return outcome(
            refused=str(error), error="" if isinstance(error, UsageError) else str(error)
        )
    except Exception as error:
        return outcome(error=f"crash: {type(error).__name__}: {error}")
    changed = any(one.changed for one in report.components[0].passes)
    found = onnx.load(target)
    if not changed:
        return outcome(error=_not_as_it_was(source, found))
    if runner == "none":
        return outcome(changed=True)
    try:
        got = RUNNERS[runner](found, feeds)
    except Exception as error:
        return outcome(changed=True, error=f"does not run: {str(error)[:300]}")
    exact = all(one.exactness() is Numerics.EXACT for one in Pipeline.parse(spec).passes)
    return outcome(changed=True, error=difference(got, wanted, exact))


def _not_as_it_was(source: Path, found: onnx.ModelProto) -> str:
    kept = [one for one in found.metadata_props if one.key != RECORD_KEY]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)
    return "" if found == onnx.load(source) else "nothing changed, but the file did"


def difference(got: Any, wanted: Any, exact: bool) -> str:
    """How two results differ, empty if they count as the same."""
    if isinstance(wanted, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(wanted):
            return f"{wanted!r} became {got!r}"
        parts = (difference(a, b, exact) for a, b in zip(got, wanted, strict=True))
        return next((part for part in parts if part), "")
    if not isinstance(wanted, np.ndarray):
        return "" if type(got) is type(wanted) and got == wanted else f"{wanted!r} became {got!r}"
    if not isinstance(got, np.ndarray) or got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{wanted.dtype}{wanted.shape} became {getattr(got, 'dtype', '')}{np.shape(got)}"
    if wanted.dtype == object:
        return "" if np.array_equal(got, wanted) else "other text"
    if got.tobytes() == wanted.tobytes():
        return ""
    distance = "not bit-equal"
    if not exact and wanted.dtype.kind in "fV":
        limit = {2: HALF["float16"]}.get(wanted.dtype.itemsize, FP32_REASSOCIATED)
        distance = relative(got.astype(np.float64), wanted.astype(np.float64), limit)
    return distance


def relative(a: np.ndarray, b: np.ndarray, limit: float) -> str:
    """Relative L2 where both are finite; elsewhere both must be the same."""
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "other infinities or NaN"
    norm = float(np.linalg.norm(b[finite]))
    off = float(np.linalg.norm(a[finite] - b[finite]))
    return "" if off <= limit * norm else f"relative L2 {off / norm if norm else off:.1e}"


def page(folder: Path) -> str:
    """docs/zoo.md: how many models of each category, what computed them, what passes changed."""
    rows: dict[str, Counter[str]] = {}
    for case_outcomes in _by_case(folder):
        first = case_outcomes[0]
        for name in (first.case.category, "all"):
            row = rows.setdefault(name, Counter())
            row.update(["models", first.runner])
            row["changed"] += any(one.changed for one in case_outcomes)
            row["refused"] += any(one.refused for one in case_outcomes)
    rows["all"] = rows.pop("all")
    lines = [
        "# onnx's backend models through sdopt",
        "",
        f"Every model that the package onnx {onnx.__version__} ships for testing backends (node",
        "tests, and the light, simple and PyTorch models) goes through these pipelines, as",
        "`sdopt optimize FILE.onnx -o OUT.onnx --passes ...` runs them:",
        "",
        *(f"- `{spec}`" for spec in SPECS),
        "",
        "No model crashes a pass, no result changes: exact passes to the bit, the others within",
        "the tolerance of docs/design.md, in whichever of onnxruntime (optimisations off) and",
        "onnx's reference evaluator computes the raw model. A file that no pass changes keeps its",
        "bytes. What neither can compute is checked for its structure only; what is refused is",
        "refused with an error that says why.",
        "",
        "| category | models | by onnxruntime | by the reference evaluator | structure only "
        "| changed by a pass | refused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = ("models", "ort", "reference", "none", "changed", "refused")
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    lines += ["", "Written by `python -m tests.zoo`; `tests/test_zoo.py` runs the same models."]
    return "\n".join(lines) + "\n"


def _by_case(folder: Path) -> Iterator[list[Outcome]]:
    for case in cases():
        yield list(outcomes([case], SPECS, folder))


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        text = page(Path(folder))
    (Path(__file__).parent.parent / "docs" / "zoo.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
