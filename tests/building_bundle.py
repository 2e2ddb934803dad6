"""A bundle with a denoiser of a few nodes, which compilers make artifacts of within seconds."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from sdopt.bundle import RAW, Bundle
from sdopt.manifest import ComponentEntry, StageRecord
from tests.passes.denoiser import denoiser


def make(root: Path, names: tuple[str, ...] = ("unet",)) -> Bundle:
    """A bundle as export leaves it, of an fp32 denoiser for each name."""
    bundle = Bundle.create(
        root, "toy", "test", {name: ComponentEntry(name, "denoiser") for name in names}, by="0"
    )
    with bundle.lock():
        for name in names:
            record = StageRecord(name, "denoiser", RAW, "", "f" * 8, "toy", "test", "float32", "k")
            bundle.commit(denoiser(time="batch_size"), record)
        bundle.write_manifest()
    return bundle


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script, in the place of a compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}")
    path.chmod(0o755)
    assert shutil.which(name, path=str(folder))
    return path
