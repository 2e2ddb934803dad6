"""What a stage's record says of how it was made: versions, history, digest of what decided it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

import sdopt
from sdopt import modelfile
from sdopt.manifest import StageRecord, Step
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline
from sdopt.report import PassReport


def key(deciding: Sequence[object]) -> str:
    """A digest of everything that decides a stage: equal key, equal stage."""
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, and of sdopt itself."""
    return {"sdopt": sdopt.__version__, **{name: _installed(name) for name in packages}}


def installed(*packages: str) -> dict[str, str]:
    """Like ``versions``, without those that are not installed."""
    known = {one.metadata["Name"] for one in metadata.distributions()}
    return versions(*(name for name in packages if name in known))


@cache
def _installed(package: str) -> str:
    return metadata.version(package)


def history_of(reports: Sequence[PassReport]) -> tuple[Step, ...]:
    """What a stage's record keeps of a run."""
    return tuple(Step(r.spec, r.numerics, r.changed, r.intent, r.reads) for r in reports)


def dominant_dtype(model: ir.Model) -> str:
    """The floating type that most weight bytes are in (``float32``, ``float16``, ...)."""
    sizes: Counter[str] = Counter()
    for value in modelfile.initializers(model):
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[str(tensor.dtype.numpy())] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "none"


def file_record(
    path: Path,
    out: Path,
    text: str | None,
    pipeline: Pipeline,
    reports: Sequence[PassReport],
    model: ir.Model,
) -> StageRecord:
    """The record of a single file that was optimized into another."""
    source = modelfile.digest_of(path.read_bytes())
    history = StageRecord.loads(text, str(path)).history if text else ()
    known = versions("onnx", "onnx-ir", "numpy")
    return StageRecord(
        component=path.stem,
        role=Role.MODEL.value,
        stage=out.stem,
        source_stage=path.stem,
        source=source,
        origin=path.name,
        family="",
        dtype=dominant_dtype(model),
        key=key([source, str(pipeline), known, *pipeline.reads()]),
        history=(*history, *history_of(reports)),
        versions=known,
    )


def sdopt_version() -> str:
    """The version of sdopt that is running."""
    return sdopt.__version__
