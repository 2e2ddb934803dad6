"""The verb ``export``: a source's components become the raw stage of a bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import datafile, modelfile, provenance, stage_report
from sdopt.bundle import LOCK, MANIFEST, RAW, Bundle, is_vacant
from sdopt.errors import BundleError, UsageError, storage_error
from sdopt.exporters.components import COMPONENTS
from sdopt.manifest import ComponentEntry, StageRecord
from sdopt.merging import Merge
from sdopt.report import ComponentReport, PassReport, Progress, Report, part
from sdopt.weights import BlockTensor

if TYPE_CHECKING:
    from sdopt.exporters.source import Exported, Source


def export(
    source: str | Path,
    output: str | Path | None = None,
    *,
    components: Sequence[str] | None = None,
    dtype: str | None = None,
    in_place: bool = False,
    supplied: Mapping[str, str | Path] | None = None,
    lora: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Export a diffusers folder, single file or Hub id to a bundle; see ``sdopt.api.export``.

    Raises:
        SourceError, WeightsError, BundleError, StorageError: what was there before is whole.
    """
    from sdopt.exporters import open_source

    start = time.perf_counter()
    opened = open_source(str(source), dtype, components, supplied)
    merge = Merge.parse(lora, in_place=in_place)
    names = list(components or opened.component_names())
    command = _command(str(source), dtype, in_place, supplied or {}, lora)
    command += stage_report.only(components)
    merge.check(opened)
    keys = {name: _key(opened, name, dtype, in_place, merge) for name in names}
    root = _root(opened, output, in_place)
    report = Report("export", str(root), notes=opened.remarks(names, dtype))
    bundle = _bundle(root, opened, names, str(source), in_place)
    with bundle.lock():
        if not in_place:
            _copy_shared(opened, root)
        for index, name in enumerate(names):
            tell = part(progress, index, len(names), name)
            began = time.perf_counter()
            component = _done(bundle, name, keys[name])
            if component is None:
                tell("trace", 0.0)
                exported = opened.export(name, dtype)
                _refuse_in_place_copy(exported, opened.mixes(name, dtype), in_place)
                passes = merge.apply(exported, tell)
                tell("write", 0.9)
                component = _commit(bundle, exported, keys[name], in_place, passes)
                component.seconds = time.perf_counter() - began
                stage_report.keep(bundle.file(name, RAW), "export", command, component)
            component.seconds = time.perf_counter() - began
            report.components.append(component)
        bundle.write_manifest()
    report.seconds = time.perf_counter() - start
    return report


def _command(
    source: str,
    dtype: str | None,
    in_place: bool,
    supplied: Mapping[str, str | Path],
    lora: Sequence[str],
) -> tuple[str, ...]:
    """The words of ``sdopt export`` that say the same."""
    words = ["export", source, *(["--in-place"] if in_place else ["-o", stage_report.BUNDLE])]
    words += ["--dtype", dtype or ""] * (dtype is not None)
    for part_of, place in supplied.items():
        words += [f"--{part_of.replace('_', '-')}", str(place)]
    for one in lora:
        words += ["--lora", one]
    return tuple(words)


def _root(source: Source, output: str | Path | None, in_place: bool) -> Path:
    if in_place:
        source.check_in_place()
        folder = source.folder
        if output is not None and Path(output).resolve() != folder.resolve():
            raise UsageError(
                "--in-place writes beside the checkpoint, so it takes no other output folder",
                where=str(output),
                hint="leave -o away, or leave --in-place away to copy the weights",
            )
        return folder
    if output is None:
        raise UsageError("where to?", hint="sdopt export SOURCE -o BUNDLE")
    root = Path(output)
    if root.is_dir() and not is_vacant(root) and not _is_bundle(root):
        raise BundleError(
            "this folder is not empty and not a bundle",
            where=str(root),
            hint="choose a new folder; nothing was written",
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, f"make the folder {root}") from error
    return root


def _is_bundle(root: Path) -> bool:
    return (root / MANIFEST).is_file() or (root / LOCK).is_file()


def _bundle(
    root: Path, source: Source, names: Sequence[str], origin: str, in_place: bool
) -> Bundle:
    entries = {name: _entry(source.folder, name, in_place) for name in names}
    label = origin if not Path(origin).exists() else Path(origin).resolve().name
    if (root / MANIFEST).is_file():
        known = Bundle.open(root).manifest
        if known.origin != label:
            raise BundleError(
                "this bundle was exported from another source",
                where=str(root),
                why=f"it holds {known.origin}, not {label}",
                hint="choose another folder for this one",
            )
    return Bundle.create(root, label, source.family, entries, by=provenance.sdopt_version())


def _entry(folder: Path, name: str, in_place: bool) -> ComponentEntry:
    component = COMPONENTS[name]
    if not in_place:
        return ComponentEntry(name, component.role.value)
    home = component.folder if (folder / component.folder).is_dir() else "."
    prefix = "" if component.folder == name else f"{name}."
    return ComponentEntry(home, component.role.value, prefix)


def _key(source: Source, name: str, dtype: str | None, in_place: bool, merge: Merge) -> str:
    """A digest of everything that decides a component's raw stage."""
    parts = [source.fingerprint(name, dtype), in_place, _versions()]
    return provenance.key(parts + merge.deciding(COMPONENTS[name].role))


def _versions() -> dict[str, str]:
    return provenance.versions(
        "onnx", "onnx-ir", "onnxscript", "torch", "diffusers", "transformers"
    )


def _done(bundle: Bundle, name: str, key: str) -> ComponentReport | None:
    """The raw stage on disk if it was made from the same checkpoint by the same versions."""
    if RAW not in bundle.stages(name):
        return None
    stage = bundle.stage(name, RAW)
    if stage.record.key != key:
        return None
    modelfile.load(stage.path)  # its data is there in full, or this says what is missing
    return ComponentReport(name, RAW, str(stage.path), stage.digest, up_to_date=True)


def _copy_shared(source: Source, root: Path) -> None:
    for file in source.shared_files():
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.source is not None:
            datafile.copy_file(file.source, target)
        else:
            datafile.write_bytes(target, (file.text or "").encode())


def _refuse_in_place_copy(exported: Exported, kinds: list[str], in_place: bool) -> None:
    tensors = [value.const_value for value in modelfile.initializers(exported.model)]
    if in_place and any(isinstance(tensor, BlockTensor) for tensor in tensors):
        mixed = f"; the checkpoint mixes {' and '.join(kinds)}" if len(kinds) > 1 else ""
        raise UsageError(
            f"{exported.name}: --in-place cannot change the weights to {exported.dtype}",
            why=f"in place means that the checkpoint's own bytes are the weights{mixed}",
            hint="export with -o BUNDLE" + ("" if mixed else ", or leave --dtype away"),
        )


def _commit(
    bundle: Bundle,
    exported: Exported,
    key: str,
    in_place: bool,
    passes: list[PassReport],
) -> ComponentReport:
    if not in_place:
        config = bundle.folder(exported.name) / "config.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(exported.config, indent=2, sort_keys=True) + "\n"
        datafile.write_bytes(config, text.encode())
    record = StageRecord(
        component=exported.name,
        role=exported.role.value,
        stage=RAW,
        source_stage="",
        source=exported.fingerprint,
        origin=bundle.manifest.origin,
        family=bundle.manifest.family,
        dtype=exported.dtype,
        key=key,
        history=provenance.history_of(passes),
        versions=_versions(),
    )
    stage, written = bundle.commit(exported.model, record)
    return ComponentReport(
        exported.name,
        RAW,
        str(stage.path),
        stage.digest,
        nodes=sum(1 for _ in exported.model.graph.all_nodes()),
        bytes_written=written,
        passes=passes,
    )
