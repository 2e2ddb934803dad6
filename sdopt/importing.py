"""Python of a user's own, by file or by name."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType


def module_of(place: str) -> ModuleType:
    """Import a file (``boxes.py``) or an importable module (``my.boxes``).

    Raises:
        Exception: whatever is wrong with the place, and whatever the code raises.
    """
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(f"sdopt_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
