"""sdopt: diffusion models to fast inference artifacts, by surgery on their ONNX graphs.

The verbs are functions of ``sdopt.api``: ``export``, ``optimize``, ``build``, ``run``,
``bench``, ``compare``, ``inspect``, ``pack``. ``sdopt.load_pipeline`` puts a bundle behind a
diffusers pipeline.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load_pipeline": "sdopt.runtime.pipeline",
    "Bundle": "sdopt.bundle",
    "Pipeline": "sdopt.pipeline",
    "SdoptError": "sdopt.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import sdopt`` costs nothing."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sdopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
