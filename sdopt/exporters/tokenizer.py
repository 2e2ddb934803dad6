"""``vocab.json`` and ``merges.txt`` out of a ``tokenizer.json``, for readers that want those.

transformers 5 saves a CLIP tokenizer as ``tokenizer.json`` alone; transformers 4, which optimum
runs on, loads a CLIPTokenizer from the two older files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdopt.errors import SourceError


@dataclass(frozen=True)
class SharedFile:
    """A file of a bundle: copied from ``source``, or written from ``text``."""

    path: str
    source: Path | None = None
    text: str | None = None


def tokenizer_files(folder: Path) -> list[SharedFile]:
    """The two files where only ``tokenizer.json`` exists and holds a BPE model, else none.

    Raises:
        SourceError: ``tokenizer.json`` cannot be read.
    """
    path = folder / "tokenizer.json"
    older = [folder / "vocab.json", folder / "merges.txt"]
    if not path.is_file() or all(file.is_file() for file in older):
        return []
    try:
        table = json.loads(path.read_bytes())
        model = table["model"]
        if model["type"] != "BPE":
            return []
        vocab = dict(model["vocab"])
        vocab.update({token["content"]: token["id"] for token in table.get("added_tokens", ())})
        merges = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            "the tokenizer cannot be read",
            where=str(path),
            why=repr(error),
            hint="save it again with tokenizer.save_pretrained",
        ) from error
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2", *merges]
    return [
        SharedFile(f"{folder.name}/vocab.json", text=json.dumps(ordered, ensure_ascii=False)),
        SharedFile(f"{folder.name}/merges.txt", text="\n".join(lines) + "\n"),
    ]
