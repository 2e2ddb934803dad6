"""The models of onnx's own backend tests, each through every pass that keeps the result.

``python -m tests.zoo`` writes docs/zoo.md; tests/test_zoo.py judges the same outcomes.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from sdopt import api
from sdopt.errors import SdoptError, UsageError
from sdopt.manifest import RECORD_KEY
from sdopt.pipeline import Pipeline
from sdopt.tolerance import Numerics
from tests.microsoft_ops import MICROSOFT, standard
from tests.zoo_cases import CHUNKS, FOLDERS, Case, Feeds, chunk
from tests.zoo_numbers import RUNNERS, difference, raw_result

SPECS = (
    "@clean",
    "@fast",
    "clean,raise_ops,clean",
    "fuse_qkv",
    "lower_group_norm,lower_attention",
    "flash_attention=ort,fuse_geglu,lower_channels_last,fuse_skip_norm",
)
"""What each model goes through: the presets and passes that are not lossy."""

DRAWS = frozenset(
    [
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike"),
        *("RandomUniform", "RandomUniformLike"),
    ]
)
"""Operators that give other numbers at every run, unless they have a seed."""

COUNTS = Path(__file__).with_name("zoo_counts.json")
"""What a run gave, chunk by chunk, under which versions."""

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
COLUMNS = {
    "models": "models",
    "ort": "by onnxruntime",
    "reference": "by the reference evaluator",
    "random": "by type and shape",
    "none": "structure only",
    "changed": "changed by a pass",
    "refused": "refused",
}

Counts = dict[str, dict[str, int]]


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

    @property
    def crashed(self) -> bool:
        return self.error.startswith(CRASH)


CRASH = "crash: "


@dataclass
class Raw:
    """A model as it comes: what computes it, what comes out, and what rewrites of it gave.

    If it is ``random``, its numbers are other ones at every run: types and shapes are compared.
    """

    model: onnx.ModelProto
    feeds: Feeds
    runner: str
    wanted: Sequence[Any]
    random: bool
    known: dict[bytes, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto, feeds: Feeds) -> Raw:
        runner, wanted = raw_result(model, feeds)
        random = runner != "none" and _draws(model.graph.node, *model.functions)
        return cls(model, feeds, runner, wanted, random)

    def run(self, found: onnx.ModelProto) -> list[Any]:
        """The outputs of a rewrite; two specs that write one graph have it run once."""
        data = found.SerializeToString(deterministic=True)
        if data not in self.known:
            self.known[data] = self._run(found)
        return self.known[data]

    def _run(self, found: onnx.ModelProto) -> list[Any]:
        """With CUDA-only operators as what they stand for; the others only onnxruntime knows."""
        runner = self.runner
        if any(one.domain == MICROSOFT for one in found.opset_import):
            model = ir.from_proto(found)
            standard(model)
            found = ir.to_proto(model)
            if any(node.domain == MICROSOFT for node in found.graph.node):
                runner = "ort"
                for index, node in enumerate(found.graph.node):
                    node.name = str(index)  # it refuses names that others take twice
        return RUNNERS[runner](found, self.feeds)


def _draws(nodes: Sequence[onnx.NodeProto], *functions: onnx.FunctionProto) -> bool:
    """Whether one of the nodes, or one of their bodies or functions, draws without a seed."""
    return any(_draws(one.node) for one in functions) or any(
        (node.op_type in DRAWS and all(attr.name != "seed" for attr in node.attribute))
        or any(_draws(attr.g.node) for attr in node.attribute)
        for node in nodes
    )


def outcomes(cases: Sequence[Case], specs: Sequence[str], folder: Path) -> Iterator[Outcome]:
    """Each case through each spec, as ``sdopt optimize`` runs them."""
    for case in cases:
        model, feeds, _ = case.load()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        raw = Raw.of(model, feeds)
        for spec in specs:
            yield _outcome(case, spec, raw, folder)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: every optimized file is synced to its disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def _outcome(case: Case, spec: str, raw: Raw, folder: Path) -> Outcome:
    outcome = functools.partial(Outcome, case, spec, "random" if raw.random else raw.runner)
    source, target = folder / "model.onnx", folder / "out.onnx"
    try:
        report = api.optimize_file(source, target, spec)
    except UsageError as error:
        return outcome(refused=str(error))
    except SdoptError as error:
        return outcome(error=f"{CRASH}{error}")
    except Exception as error:
        return outcome(error=f"{CRASH}{type(error).__name__}: {error}")
    changed = any(one.changed for one in report.components[0].passes)
    if not changed:
        return outcome(error=_not_as_it_was(source, target))
    if raw.runner == "none":
        return outcome(changed=True)
    found = onnx.load(target)
    _forget_record(found)
    try:
        got = raw.run(found)
    except Exception as error:
        return outcome(changed=True, error=f"does not run: {str(error)[:300]}")
    exact = all(one.exactness() is Numerics.EXACT for one in Pipeline.parse(spec).passes)
    return outcome(changed=True, error=difference(got, raw.wanted, exact, raw.random))


def _forget_record(found: onnx.ModelProto) -> None:
    kept = [one for one in found.metadata_props if one.key != RECORD_KEY]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)


def _not_as_it_was(source: Path, target: Path) -> str:
    """The input's bytes must come first; what follows must be the record and nothing else."""
    before, after = source.read_bytes(), target.read_bytes()
    if not after.startswith(before):
        return "nothing changed, but the file's bytes did"
    behind = onnx.ModelProto.FromString(after[len(before) :])
    _forget_record(behind)
    return "" if behind == onnx.ModelProto() else "more than the record is behind the model"


def tally(found: Iterable[Sequence[Outcome]]) -> Counts:
    """How many models of each category, what computed them, what passes changed and refused.

    ``found`` holds the outcomes of one model at a time.
    """
    rows: dict[str, Counter[str]] = {}
    for one in found:
        row = rows.setdefault(one[0].case.category, Counter())
        row.update(["models", one[0].runner])
        row["changed"] += any(each.changed for each in one)
        row["refused"] += any(each.refused for each in one)
    return {name: {key: n for key, n in row.items() if n} for name, row in rows.items()}


def by_case(found: Sequence[Case], folder: Path) -> Iterator[list[Outcome]]:
    """The outcomes of each model, through every spec."""
    for case in found:
        yield list(outcomes([case], SPECS, folder))


def versions() -> dict[str, str]:
    """What the counts depend on beside sdopt."""
    return {"onnx": onnx.__version__, "onnxruntime": ort.__version__}


def page(recorded: Mapping[str, Any]) -> str:
    """docs/zoo.md, from what ``COUNTS`` holds."""
    rows: dict[str, Counter[str]] = {name: Counter() for name in ("node", *FOLDERS)}
    for one in recorded["chunks"]:
        for category, row in one.items():
            rows[category].update(row)
    rows["all"] = sum(rows.values(), Counter())
    known = recorded["versions"]
    lines = [
        "# onnx's backend models through sdopt",
        "",
        f"Every model that the package onnx {known['onnx']} ships for testing backends (node",
        "tests, and the light, simple and PyTorch models) goes through these pipelines, as",
        "`sdopt optimize FILE.onnx -o OUT.onnx --passes ...` runs them:",
        "",
        *(f"- `{spec}`" for spec in SPECS),
        "",
        "No model crashes a pass, no result changes: exact passes to the bit, the others within",
        f"the tolerance of docs/design.md, in whichever of onnxruntime {known['onnxruntime']}",
        "(optimisations off) and onnx's reference evaluator computes the raw model. A file that",
        "no pass changes keeps its bytes, and the record of what ran comes behind them. Operators",
        "that draw random numbers without a seed are compared by type and shape. What neither",
        "runtime computes is checked for its structure only; what is refused is refused with an",
        "error that says why.",
        "",
        f"| category | {' | '.join(COLUMNS.values())} |",
        f"| --- |{' --- |' * len(COLUMNS)}",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
    lines += ["", "Written by `python -m tests.zoo`; `tests/test_zoo.py` runs the same models."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every model, keep the counts, write the page."""
    chunks = []
    with scratch() as folder:
        for index in range(CHUNKS):
            found = list(by_case(chunk(index), folder))
            if errors := [str(one) for each in found for one in each if one.error]:
                sys.exit("\n".join(errors))
            chunks.append(tally(found))
    recorded = {"versions": versions(), "chunks": chunks}
    COUNTS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", "utf-8")
    PAGE.write_text(page(recorded), "utf-8")


if __name__ == "__main__":
    main()
