"""The verb ``adopt``: an ONNX file of anyone's becomes the raw stage of a bundle's component."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from pathlib import Path

import onnx_ir as ir

from sdopt import companions, modelfile, provenance, stage_report
from sdopt.bundle import LOCK, MANIFEST, RAW, Bundle, Stage, is_vacant
from sdopt.errors import BundleError, SourceError, UsageError, storage_error
from sdopt.manifest import RECORD_KEY, ComponentEntry, StageRecord
from sdopt.passes.base import Role
from sdopt.report import ComponentReport, Progress, Report, part

COMPONENT = "model"
"""What the component is called unless someone says."""

FAMILY = "adopted"
"""The family of bundles that hold graphs about which nothing is known."""

OLDEST, NEWEST = 9, 25
"""The opsets that are taken in."""

_OVERRIDABLE_SINCE = 4
"""Until IR version 3 every initializer had to be listed as an input, and was none by that."""


def adopt(
    source: str | Path,
    output: str | Path | None = None,
    *,
    component: str = COMPONENT,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Take one ONNX file, with its external data, into a bundle; no weight is read whole.

    The graph stays what it is: weights are copied by the kernel, axes of inputs that have no name
    get one (``images_2``), and weights that IR version 3 had to list as inputs are inputs no more.

    Args:
        source: the file, of opset 9 to 25.
        output: the bundle's directory, new or one of adopted graphs; by default a folder of the
            file's name in the current one.
        component: what to call it in the bundle.
        force: take it again although the file has not changed.
        progress: is told what is being done.

    Raises:
        SourceError: another opset.
        BundleError: no ONNX file, a graph that nothing could run, or a folder that is something
            else.
        WeightsError: external data that is missing, short, or outside the file's folder.
        UsageError: a name that is none, or a component that was adopted from another file.
        StorageError: the disk is full or the folder is not writable.
    """
    start = time.perf_counter()
    tell = part(progress, 0, 1)
    path, root = Path(source), Path(output) if output is not None else Path(Path(source).stem)
    if not re.fullmatch(r"\w[\w.-]*", component):
        raise UsageError(
            f"{component!r} is no name for a component",
            hint="use letters, digits, dots, dashes and underscores",
        )
    tell(component, 0.0)
    model = modelfile.load(path)
    _check_opset(model, path)
    key, bundle = _key(model, path), _bundle(root, path, component)
    if bundle.file(component, RAW).resolve() == path.resolve():
        raise UsageError(
            "the bundle would overwrite the file that it adopts",
            where=str(path),
            hint="choose another -o",
        )
    report = Report("adopt", str(root))
    with bundle.lock():
        stage = _done(bundle, component, path)
        if stage is not None and stage.record.key == key and not force:
            modelfile.load(stage.path)  # its data is there in full, or this says what is missing
            one = ComponentReport(component, RAW, str(stage.path), stage.digest, up_to_date=True)
        else:
            tell("write", 0.1)
            notes = _settle(model)
            report.notes += notes
            one = _commit(bundle, model, component, path, key)
            one.seconds = time.perf_counter() - start
            words = ("adopt", str(source), "-o", stage_report.BUNDLE, "--component", component)
            told = dataclasses.replace(one, notes=notes)
            stage_report.keep(bundle.file(component, RAW), "adopt", words, told)
        bundle.write_manifest()
    report.seconds = one.seconds = time.perf_counter() - start
    report.components.append(one)
    return report


def _check_opset(model: ir.Model, path: Path) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if not OLDEST <= opset <= NEWEST:
        raise SourceError(
            f"this graph is of opset {opset}" if opset else "this graph names no opset of ONNX",
            where=str(path),
            why=f"graphs of opset {OLDEST} to {NEWEST} are taken in",
            hint="export it again with one of those: opset_version=17",
        )


def _key(model: ir.Model, path: Path) -> str:
    """A digest of everything that decides the stage; data files by size and time of change."""
    tensors = [v.const_value for m in companions.family(model) for v in modelfile.initializers(m)]
    files = {Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}
    data = []
    for file in sorted(files):
        state = file.stat()
        data.append([file.name, state.st_size, state.st_mtime_ns])
    return provenance.key([modelfile.digest_of(path.read_bytes()), data, _versions()])


def _versions() -> dict[str, str]:
    return provenance.versions("onnx", "onnx-ir")


def _bundle(root: Path, path: Path, component: str) -> Bundle:
    """The bundle at ``root``, made if it is not there, with the component added."""
    origin = path.name
    if (root / MANIFEST).is_file():
        known = Bundle.open(root).manifest
        origin = known.origin
        if known.family != FAMILY:
            raise BundleError(
                "this bundle does not hold adopted graphs",
                where=str(root),
                why=f"it holds {known.origin}, of the family {known.family}",
                hint="choose another -o",
            )
    elif root.exists() and not (root / LOCK).is_file() and (root.is_file() or not is_vacant(root)):
        raise BundleError(
            "this is something else than a bundle",
            where=str(root),
            hint="choose a new folder with -o; nothing was written",
        )
    entries = {component: ComponentEntry(component, Role.MODEL.value)}
    try:
        return Bundle.create(root, origin, FAMILY, entries, by=provenance.sdopt_version())
    except OSError as error:
        raise storage_error(error, f"make the folder {root}") from error


def _done(bundle: Bundle, component: str, path: Path) -> Stage | None:
    """The component's raw stage, if it has one.

    Raises:
        UsageError: it was adopted from a file of another name.
    """
    if RAW not in bundle.stages(component):
        return None
    stage = bundle.stage(component, RAW)
    if stage.record.origin != path.name:
        raise UsageError(
            f"the component {component!r} was adopted from another file",
            where=str(stage.path),
            why=f"from {stage.record.origin}, not {path.name}",
            hint="call this one something else with --component, or choose another -o",
        )
    return stage


def _settle(model: ir.Model) -> list[str]:
    """Leave the graph's inputs as the other verbs expect them; returns what to tell of it."""
    if (opset := model.opset_imports.pop("ai.onnx", None)) is not None:
        model.opset_imports.setdefault("", opset)
    one, notes = model.graph, []
    if model.ir_version < _OVERRIDABLE_SINCE:
        listed = [value for value in one.inputs if value.is_initializer()]
        for value in listed:
            one.inputs.remove(value)
        model.ir_version = _OVERRIDABLE_SINCE
        notes += [f"{len(listed)} weights that were listed as inputs are none now"] * bool(listed)
    dims = [dim for value in one.inputs for dim in value.shape or ()]
    taken = {str(dim.value) for dim in dims if not isinstance(dim, int)}
    for value in one.inputs:
        if value.shape is None:
            notes.append(f"the input {value.name} has no shape: no compiler can be told its sizes")
            continue
        named = list(value.shape)
        for axis, dim in enumerate(named):
            if _anonymous(dim):
                name = _unique(f"{value.name}_{axis}", taken)
                named[axis] = ir.SymbolicDim(name)
                notes.append(f"axis {axis} of {value.name} had no name and is called {name}")
        value.shape = ir.Shape(named)
    return notes


def _anonymous(dim: int | ir.SymbolicDim) -> bool:
    """Whether an axis is dynamic and nobody named it; some tools write that as -1."""
    return dim < 0 if isinstance(dim, int) else not dim.value


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{count}" for count in itertools.count(1))
    found = next(one for one in itertools.chain([name], numbered) if one not in taken)
    taken.add(found)
    return found


def _commit(
    bundle: Bundle, model: ir.Model, component: str, path: Path, key: str
) -> ComponentReport:
    text = model.metadata_props.get(RECORD_KEY)
    record = StageRecord(
        component=component,
        role=Role.MODEL.value,
        stage=RAW,
        source_stage="",
        source=modelfile.digest_of(path.read_bytes()),
        origin=path.name,
        family=FAMILY,
        dtype=provenance.dominant_dtype(model),
        key=key,
        history=StageRecord.loads(text, str(path)).history if text else (),
        versions=_versions(),
    )
    stage, written = bundle.commit(model, record)
    nodes = sum(1 for one in companions.family(model) for _ in one.graph.all_nodes())
    file = str(stage.path)
    return ComponentReport(component, RAW, file, stage.digest, nodes=nodes, bytes_written=written)
