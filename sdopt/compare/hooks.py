"""A user's own functions around a graph, so that what comes out in the end is compared too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sdopt.errors import UsageError
from sdopt.importing import module_of

Hook = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Hooks:
    """What runs before and after both sides; either may be missing.

    Attributes:
        where: the file or module they come from.
        preprocess: the seeded inputs by name to those that the graph is fed.
        postprocess: the graph's outputs by name to final results (boxes), any names and shapes.
    """

    where: str
    preprocess: Hook | None = None
    postprocess: Hook | None = None

    def before(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the graph is fed.

        Raises:
            UsageError: the function failed, or gave something else than named arrays.
        """
        return self._call("preprocess", self.preprocess, feeds) if self.preprocess else feeds

    def after(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is judged beside the outputs; nothing without a ``postprocess``.

        Raises:
            UsageError: the function failed, or gave something else than named arrays.
        """
        if self.postprocess is None:
            return {}
        return self._call("postprocess", self.postprocess, outputs)

    def _call(
        self, name: str, hook: Hook, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        # Each call has arrays of its own: a hook may write into them.
        given = {key: array.copy() for key, array in arrays.items()}
        try:
            found = hook(given)
        except Exception as error:
            raise UsageError(
                f"{name} failed",
                where=self.where,
                why=f"{type(error).__name__}: {error}",
                hint=f"it was given {_said(arrays)}",
            ) from error
        if not isinstance(found, Mapping) or not all(
            isinstance(key, str) and isinstance(array, np.ndarray) and array.dtype.kind in "fiub"
            for key, array in found.items()
        ):
            raise UsageError(
                f"{name} gave no named arrays of numbers",
                where=self.where,
                why=f"it returned a {type(found).__name__}",
                hint="return a dict of numpy arrays by name",
            )
        return dict(found)


def load(text: str) -> Hooks:
    """The hooks in a Python file (``boxes.py``) or an importable module (``my.boxes``).

    Raises:
        UsageError: it cannot be imported, or holds neither ``preprocess`` nor ``postprocess``.
    """
    try:
        module = module_of(text)
    except Exception as error:
        raise UsageError(
            "these hooks cannot be imported",
            where=text,
            why=f"{type(error).__name__}: {error}",
            hint="give a Python file, or a module whose folder is on PYTHONPATH",
        ) from error
    found = [getattr(module, name, None) for name in ("preprocess", "postprocess")]
    before, after = (one if callable(one) else None for one in found)
    if before is None and after is None:
        raise UsageError(
            "there is neither a preprocess nor a postprocess",
            where=text,
            hint="def postprocess(outputs): return {'boxes': ...}",
        )
    return Hooks(text, before, after)


def _said(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
