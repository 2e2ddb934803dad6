"""The files of a tokenizer: a folder's, a given folder's, and those that older readers want.

transformers 5 saves a CLIP tokenizer as ``tokenizer.json`` alone; transformers 4, which optimum
runs on, loads a CLIPTokenizer from the two older files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdopt import reading
from sdopt.errors import SourceError


@dataclass(frozen=True)
class SharedFile:
    """A file of a bundle: copied from ``source``, or written from ``text``."""

    path: str
    source: Path | None = None
    text: str | None = None


def folder_files(folder: Path, part: str) -> list[SharedFile]:
    """The files of a folder, for the folder ``part`` of a bundle."""
    return [
        SharedFile(f"{part}/{path.name}", source=path.absolute())
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]


def tokenizer_files(folder: Path, part: str | None = None) -> list[SharedFile]:
    """The two files where only ``tokenizer.json`` exists and holds a BPE model, else none.

    Raises:
        SourceError: ``tokenizer.json`` cannot be read.
    """
    path = folder / "tokenizer.json"
    older = [folder / "vocab.json", folder / "merges.txt"]
    if not path.is_file() or all(file.is_file() for file in older):
        return []
    try:
        table = reading.table(path.read_bytes())
        model = table["model"]
        if model["type"] != "BPE":
            return []
        vocab = dict(model["vocab"])
        vocab.update({token["content"]: token["id"] for token in table.get("added_tokens", ())})
        merges = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ]
        ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
        lines = ["#version: 0.2", *merges]
        texts = [json.dumps(ordered, ensure_ascii=False), "\n".join(lines) + "\n"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "the tokenizer cannot be read",
            where=str(path),
            why=repr(error),
            hint="save it again with tokenizer.save_pretrained",
        ) from error
    home = part or folder.name
    return [
        SharedFile(f"{home}/{name}", text=text)
        for name, text in zip(("vocab.json", "merges.txt"), texts, strict=True)
    ]


def given_tokenizer(folder: Path, part: str) -> list[SharedFile]:
    """The files for ``part`` (``tokenizer`` or ``tokenizer_2``) out of a folder that a user gave.

    That is a tokenizer's own folder, or a pipeline's. A second tokenizer made from the first one's
    files pads with ``!``, whose id is 0, as OpenCLIP's does.

    Raises:
        SourceError: it holds no tokenizer.
    """
    homes = [folder / part, folder / "tokenizer", folder]
    home = next((one for one in homes if _is_tokenizer(one)), None)
    if home is None:
        raise SourceError(
            "no tokenizer is here",
            where=str(folder),
            why="looked for tokenizer.json, or vocab.json and merges.txt",
            hint="give a folder that tokenizer.save_pretrained wrote",
        )
    files = [*folder_files(home, part), *tokenizer_files(home, part)]
    if home.name == part or part == "tokenizer":
        return files
    return [_padded(file) if file.path.endswith(f"/{_CONFIG}") else file for file in files]


CLIP = ("tokenizer", "tokenizer_2")
"""The tokenizers that ``--tokenizer`` replaces."""

_CONFIG = "tokenizer_config.json"
PAD_SECOND = "!"
"""The token of id 0, with which OpenCLIP's tokenizer pads."""


def _is_tokenizer(folder: Path) -> bool:
    names = ("vocab.json", "merges.txt")
    whole = all((folder / name).is_file() for name in names)
    return whole or (folder / "tokenizer.json").is_file()


def _padded(file: SharedFile) -> SharedFile:
    if file.source is None:
        return file
    try:
        table = reading.table(file.source.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            "the tokenizer cannot be read", where=str(file.source), why=repr(error)
        ) from error
    return SharedFile(file.path, text=json.dumps({**table, "pad_token": PAD_SECOND}, indent=2))
