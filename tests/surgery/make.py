"""Exports the whole matrix and packs it: ``python -m tests.surgery.make [FOLDER]``.

About 40 minutes on one core; FOLDER keeps what is done, so that a second run goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.surgery import cells, counts, exports, models, weightless
from tests.surgery.cells import Cell

PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "onnx", "onnx-ir")


def make(cell: Cell, folder: Path) -> None:
    """Write ``CELL.onnx``, or ``CELL.txt`` with the exception where torch cannot export it."""
    done, refused = folder / f"{cell}.onnx", folder / f"{cell}.txt"
    if done.exists() or refused.exists():
        return
    try:
        model = exports.export(cell)
    except Exception as error:  # whatever torch raises is what the manifest records
        refused.write_text(f"{type(error).__name__}: {str(error).splitlines()[0]}", "utf-8")
        return
    slim = weightless.strip(model, models.parameters(cell.model, cell.dtype))
    part = done.with_suffix(".part")
    part.write_bytes(slim.SerializeToString(deterministic=True))
    part.rename(done)


def pack(folder: Path) -> None:
    """One solid archive and its manifest; equal graphs give equal bytes."""
    graphs, refused = {}, {}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for cell in cells.CELLS:
            if (text := folder / f"{cell}.txt").exists():
                refused[str(cell)] = text.read_text("utf-8")
                continue
            data = (folder / f"{cell}.onnx").read_bytes()
            graphs[str(cell)] = hashlib.sha256(data).hexdigest()
            entry = tarfile.TarInfo(f"{cell}.onnx")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27},
    ]
    cells.DATA.mkdir(exist_ok=True)
    cells.ARCHIVE.write_bytes(lzma.compress(file.getvalue(), filters=filters))
    manifest = {
        "versions": {name: version(name) for name in PACKAGES},
        "counts": {model: counts.counted(model) for model in cells.MODELS},
        "refused": refused,
        "graphs": graphs,
    }
    cells.MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def main() -> None:
    """Export what FOLDER does not hold yet, then pack."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(exist_ok=True)
        # A finished trace is used for the three opsets in a row.
        for cell in sorted(cells.CELLS, key=lambda c: (c.model, c.attention, c.shapes, c.dtype)):
            make(cell, folder)
        pack(folder)


if __name__ == "__main__":
    main()
