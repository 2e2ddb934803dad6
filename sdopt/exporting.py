"""The verb ``export``: a source's components become the raw stage of a bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import datafile, modelfile, provenance
from sdopt.bundle import LOCK, MANIFEST, RAW, Bundle
from sdopt.errors import BundleError, SourceError, UsageError, storage_error
from sdopt.exporters.components import COMPONENTS
from sdopt.manifest import ComponentEntry, StageRecord
from sdopt.report import ComponentReport, Progress, Report, part
from sdopt.weights import BlockTensor

if TYPE_CHECKING:
    from sdopt.exporters.diffusers import DiffusersSource, Exported


def export(
    source: str | Path,
    output: str | Path | None = None,
    *,
    components: Sequence[str] | None = None,
    dtype: str | None = None,
    in_place: bool = False,
    controlnet: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Export a diffusers folder or Hugging Face Hub id to a bundle; see ``sdopt.api.export``.

    Raises:
        SourceError, WeightsError, BundleError, StorageError: what was there before is whole.
    """
    from sdopt.exporters.diffusers import DiffusersSource
    from sdopt.exporters.hub import resolve

    start = time.perf_counter()
    folder = resolve(str(source), dtype, components)
    if in_place and controlnet is not None:
        raise UsageError(
            "--in-place takes no --controlnet",
            why="the ControlNet's weights lie in another folder than the pipeline's",
            hint="export with -o BUNDLE, or save both as one pipeline with diffusers",
        )
    beside = resolve(str(controlnet), dtype, ["controlnet"]) if controlnet is not None else None
    opened = DiffusersSource(folder, beside)
    names = list(components or opened.component_names())
    keys = {name: _key(opened, name, dtype, in_place) for name in names}
    root = _root(folder, output, in_place)
    report = Report("export", str(root), notes=list(opened.notes))
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
                _refuse_in_place_copy(exported, in_place)
                tell("write", 0.9)
                component = _commit(bundle, exported, keys[name], in_place)
            component.seconds = time.perf_counter() - began
            report.components.append(component)
        bundle.write_manifest()
    report.seconds = time.perf_counter() - start
    return report


def _root(folder: Path, output: str | Path | None, in_place: bool) -> Path:
    if in_place:
        if output is not None and Path(output).resolve() != folder.resolve():
            raise UsageError(
                "--in-place writes beside the checkpoint, so it takes no other output folder",
                where=str(output),
                hint="leave -o away, or leave --in-place away to copy the weights",
            )
        if any(path.is_symlink() for path in folder.glob("*/*.safetensors")):
            raise SourceError(
                "--in-place is refused in a Hugging Face cache",
                where=str(folder),
                why="its weight files are links out of their folder, which no runtime follows",
                hint="export with -o BUNDLE, which copies the weights inside the kernel",
            )
        return folder
    if output is None:
        raise UsageError("where to?", hint="sdopt export SOURCE -o BUNDLE")
    root = Path(output)
    if root.is_dir() and any(root.iterdir()) and not _is_bundle(root):
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
    root: Path, source: DiffusersSource, names: Sequence[str], origin: str, in_place: bool
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


def _key(source: DiffusersSource, name: str, dtype: str | None, in_place: bool) -> str:
    """A digest of everything that decides a component's raw stage."""
    return provenance.key([source.fingerprint(name, dtype), in_place, _versions()])


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


def _copy_shared(source: DiffusersSource, root: Path) -> None:
    for file in source.shared_files():
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.source is not None:
            datafile.copy_file(file.source, target)
        else:
            datafile.write_bytes(target, (file.text or "").encode())


def _refuse_in_place_copy(exported: Exported, in_place: bool) -> None:
    tensors = [value.const_value for value in modelfile.initializers(exported.model)]
    if in_place and any(isinstance(tensor, BlockTensor) for tensor in tensors):
        raise UsageError(
            f"{exported.name}: --in-place cannot change the weights to {exported.dtype}",
            why="in place means that the checkpoint's own bytes are the weights",
            hint="leave --dtype away, or export with -o BUNDLE",
        )


def _commit(bundle: Bundle, exported: Exported, key: str, in_place: bool) -> ComponentReport:
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
    )
