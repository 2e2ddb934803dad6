"""What a folder of safetensors holds, from their headers alone: name -> range of a file."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sdopt.errors import SourceError
from sdopt.safetensors_header import Entry, broken, parse_json, read_header

NAMES = ("diffusion_pytorch_model", "model")
"""File stems under which diffusers and transformers save a component."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SAMPLE = 64


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one component, in one file or in shards."""

    entries: Mapping[str, Entry]
    headers: Mapping[Path, bytes]
    variant: str | None = None

    @classmethod
    def open(
        cls, folder: Path, names: Sequence[str] = NAMES, variant: str | None = None
    ) -> Checkpoint:
        """Read the headers of the safetensors in ``folder``.

        With ``variant`` (such as ``fp16``) only ``*.<variant>.safetensors`` counts; without, the
        plain file, or else the only variant there.

        Raises:
            SourceError: no safetensors there, or several variants and none asked for.
            WeightsError: a file or an index is corrupted, truncated or missing.
        """
        path, variant = _find(Path(folder), names, variant)
        if path.name.endswith(".json"):
            entries, headers = _read_shards(path)
        else:
            entries, header = read_header(path)
            headers = {path: header}
        return cls(entries, headers, variant)

    @property
    def dtype(self) -> ir.DataType:
        """The float dtype that most elements have.

        Raises:
            SourceError: there is no float tensor.
        """
        sizes: Counter[ir.DataType] = Counter()
        for entry in self.entries.values():
            if entry.dtype.is_floating_point():
                sizes[entry.dtype] += math.prod(entry.shape)
        if not sizes:
            raise SourceError(
                "the checkpoint holds no float weights", where=", ".join(map(str, self.headers))
            )
        return sizes.most_common(1)[0][0]

    def external(self, name: str) -> ir.ExternalTensor:
        """The tensor ``name`` as a range of its file; nothing is read."""
        return self.entries[name].external(name)

    def fingerprint(self) -> str:
        """A digest of headers, file sizes and 128 sampled bytes of every tensor."""
        state = hashlib.sha256()
        for path in sorted(self.headers, key=lambda path: path.name):
            state.update(self.headers[path])
            with open(path, "rb", buffering=0) as file:
                state.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
                for entry in self.entries.values():
                    if entry.file == path:
                        for start in (0, entry.length // 2):
                            count = min(_SAMPLE, entry.length - start)
                            state.update(os.pread(file.fileno(), count, entry.offset + start))
        return state.hexdigest()


def _read_shards(index: Path) -> tuple[dict[str, Entry], dict[Path, bytes]]:
    try:
        table = parse_json(index.read_bytes(), index)
    except OSError as error:
        raise broken(index, error.strerror or str(error)) from error
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(index, "it has no weight_map")
    files: dict[str, dict[str, Entry]] = {}
    headers: dict[Path, bytes] = {}
    entries: dict[str, Entry] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or file in ("", ".", "..")
            or "\0" in file
        ):
            raise broken(
                index,
                f"it points the tensor {name} at {file!r}, which is no file beside it",
                hint="an index may only name files in its own folder",
            )
        if file not in files:
            path = index.parent / file
            files[file], headers[path] = read_header(path)
        if name not in files[file]:
            raise broken(index, f"it says that {file} holds {name}, which it does not")
        entries[name] = files[file][name]
    owners = Counter(name for held in files.values() for name in held)
    if twice := [name for name, count in owners.items() if count > 1]:
        raise broken(index, f"two of its files hold the tensor {twice[0]}")
    return entries, headers


def _find(folder: Path, names: Sequence[str], variant: str | None) -> tuple[Path, str | None]:
    """The weights file or shard index to read, and its variant."""
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    found = {kind: folder / file for kind, file in weights_files(files, names).items()}
    if variant in found:
        return found[variant], variant
    variants = sorted(kind for kind in found if kind)
    if variant is None and len(variants) == 1:
        return found[variants[0]], variants[0]
    if found:
        raise SourceError(
            f"no {variant or 'plain'} weights here",
            where=str(folder),
            why=f"there are only the variants: {', '.join(variants) or 'plain'}",
            hint="ask for a dtype that is there",
        )
    raise no_weights(files, str(folder), names)


def no_weights(files: Sequence[str], where: str, names: Sequence[str] = NAMES) -> SourceError:
    """The error for a folder in which none of ``files`` is a safetensors file to read."""
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        return SourceError(
            f"only pickled weights here ({pickles[0]}), which are refused",
            where=where,
            why="loading a pickle runs whatever code is in it",
            hint="convert it where you trust it: DiffusionPipeline.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER, safe_serialization=True)",
        )
    return SourceError(
        "no weights here",
        where=where,
        why=f"looked for {' or '.join(f'{name}.safetensors' for name in names)}",
        hint="give a folder that diffusers' save_pretrained wrote",
    )


def weights_files(files: Sequence[str], names: Sequence[str] = NAMES) -> dict[str | None, str]:
    """Variant (None if plain) to the file to read: a whole file, else the index of its shards."""
    found: dict[str | None, str] = {}
    for file in sorted(files):
        for stem in names:
            if (kind := _variant(file, stem)) != _OTHER and kind not in found:
                found[kind] = file
    return found


_OTHER = "\0other"
_SHARD = re.compile(r"-\d+-of-\d+")
_WEIGHTS = re.compile(r"(\.(?P<before>[^.]+))?\.safetensors(\.index(\.(?P<after>[^.]+))?\.json)?")


def _variant(file: str, stem: str) -> str | None:
    """The variant of a weights file or index called ``stem``, None if plain, else ``_OTHER``.

    diffusers writes ``STEM.safetensors.index.VARIANT.json``, others ``STEM.VARIANT.safetensors
    .index.json``; a shard of either, ``STEM[.VARIANT]-00001-of-00002.safetensors``, is neither.
    """
    match = _WEIGHTS.fullmatch(file.removeprefix(stem)) if file.startswith(stem) else None
    if match is None or _SHARD.search(file):
        return _OTHER
    return match["before"] or match["after"]
