"""A built artifact as a session: TensorRT engines through Polygraphy, others by their target."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdopt import registry
from sdopt.errors import BuildError
from sdopt.session import Session


class Runs(Protocol):
    """The part of a session that a comparison needs."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output."""


def session(path: Path, target: str) -> Runs:
    """What runs an artifact that ``target`` built.

    Raises:
        MissingDependencyError: its runtime is not installed.
        BuildError: there is no device that it runs on.
    """
    made = registry.make("targets", target)
    if made.name() == "trt" and importlib.util.find_spec("polygraphy"):
        made.check_available()
        return _Engine(path)
    opened: Session = made.open(path)
    return opened


class _Engine:
    """A TensorRT engine, activated by Polygraphy for each run.

    Polygraphy (https://github.com/NVIDIA/TensorRT, tools/Polygraphy) picks the profile and binds
    the buffers, so a comparison does not lean on the session that ``run`` uses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; floats are cast to what the engine takes.

        Raises:
            BuildError: TensorRT cannot load or run the engine here.
        """
        from polygraphy.backend.trt import EngineFromPath, TrtRunner
        from polygraphy.exception import PolygraphyException

        try:
            with TrtRunner(EngineFromPath(str(self._path))) as runner:
                wanted = runner.get_input_metadata()
                given = {
                    name: np.asarray(array, _dtype(wanted[name].dtype), order="C")
                    for name, array in feeds.items()
                }
                found: Mapping[str, Any] = runner.infer(given)
                return {name: np.array(array) for name, array in found.items()}
        except PolygraphyException as error:
            raise BuildError(
                "TensorRT cannot run this engine here",
                where=str(self._path),
                why=str(error).strip().split("\n", 1)[0],
                hint="compare it on the machine with the card that it was built for; its graph "
                "can be compared anywhere: BUNDLE@STAGE",
            ) from error


def _dtype(kind: Any) -> np.dtype[Any]:
    """Polygraphy's type, or numpy's own, as numpy's."""
    found: np.dtype[Any] = np.dtype(kind.numpy() if hasattr(kind, "numpy") else kind)
    return found
