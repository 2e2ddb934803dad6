"""What runs the tasks of a sweep: this process, processes of this machine, a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.sweep.engines.base import Engine
    from sdopt.sweep.place import Place


def maker(
    workers: int = 0, ray: str | None = None, *, other_versions: bool = False
) -> Callable[[Place], Engine]:
    """What makes the engine that was asked for, given the driver's place.

    Args:
        workers: processes of this machine; 0 is this process itself.
        ray: ``auto`` or the address of a cluster, in their place.
        other_versions: whether nodes with other versions of packages may take part.

    Raises:
        UsageError: both, or a number that cannot be.
    """
    if ray is not None:
        if workers:
            raise UsageError("either workers of this machine or a Ray cluster", hint="--ray auto")
        from sdopt.sweep.engines.ray import RayEngine

        return lambda place: RayEngine(
            place, place.raw_files(), ray, other_versions=other_versions
        )
    if workers:
        from sdopt.sweep.engines.processes import Processes

        return partial(Processes, workers=workers)
    from sdopt.sweep.engines.inline import Inline

    return Inline
