"""The verb ``pack``: a self-contained copy of one stage of each component."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from sdopt import datafile, modelfile, stage_report
from sdopt.bundle import MANIFEST, OPTIMIZED, RAW, Bundle, Stage, is_vacant
from sdopt.errors import BundleError, storage_error
from sdopt.manifest import RECORD_KEY, ComponentEntry, Manifest
from sdopt.report import ComponentReport, Progress, Report, part

_OWN = (".onnx", datafile.SUFFIX, ".safetensors", ".bin", ".index.json", ".lock", MANIFEST)


def pack(
    bundle: str | Path,
    output: str | Path,
    *,
    components: Sequence[str] | None = None,
    stage: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a copy that needs nothing else: per component one graph and exactly its weights.

    The chosen stage (the optimized one where there is one) becomes ``model.onnx`` of the copy;
    its record says which it was. Weights are copied by the kernel, holes kept.

    Raises:
        BundleError: the output folder is not empty.
        StorageError: the disk is full.
    """
    opened, root, start = Bundle.open(bundle), Path(output), time.perf_counter()
    if root.exists() and (not root.is_dir() or not is_vacant(root)):
        raise BundleError(
            "the output folder is not empty", where=str(root), hint="choose a new folder"
        )
    report = Report("pack", str(root))
    entries: dict[str, ComponentEntry] = {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        _copy_files(opened, root)
    except OSError as error:
        raise storage_error(error, f"write into {root}") from error
    names = components or opened.components
    for index, name in enumerate(names):
        part(progress, index, len(names))(name, 0.0)
        began = time.perf_counter()
        chosen = opened.stage(name, stage) if stage else opened.current(name, OPTIMIZED)
        model = chosen.load()
        folder = root / name
        folder.mkdir(exist_ok=True)
        config = opened.folder(name) / "config.json"
        if config.is_file():
            datafile.copy_file(config, folder / "config.json")
        record = dataclasses.replace(chosen.record, stage=RAW, source_stage="")
        model.metadata_props[RECORD_KEY] = record.dumps()
        saved = modelfile.save(model, folder / f"{RAW}.onnx")
        _copy_report(chosen, folder / f"{RAW}.onnx", saved.digest)
        entries[name] = ComponentEntry(name, record.role)
        report.components.append(
            ComponentReport(
                name,
                chosen.name,
                str(folder / f"{RAW}.onnx"),
                saved.digest,
                time.perf_counter() - began,
                sum(1 for _ in model.graph.all_nodes()),
                saved.bytes_written,
            )
        )
    known = opened.manifest
    Bundle(root, Manifest(known.origin, known.family, entries, known.sdopt)).write_manifest()
    report.seconds = time.perf_counter() - start
    return report


def _copy_report(chosen: Stage, copy: Path, digest: str) -> None:
    """Let the report of the chosen stage tell of the copy, which is the same graph."""
    if (found := stage_report.find(chosen.path, chosen.digest).report) is not None:
        component = dataclasses.replace(found.component, file=copy.name, digest=digest)
        stage_report.put(copy, dataclasses.replace(found, component=component))


def _copy_files(bundle: Bundle, root: Path) -> None:
    """Everything that is not a component: tokenizer, scheduler, model_index.json."""
    folders = {bundle.folder(name) for name in bundle.components}
    for path in sorted(bundle.path.rglob("*")):
        parts = path.relative_to(bundle.path).parts
        if not path.is_file() or path.name.endswith(_OWN) or any(p[0] == "." for p in parts):
            continue
        if any(path.is_relative_to(folder) for folder in folders):
            continue
        target = root / path.relative_to(bundle.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        datafile.copy_file(path, target)
