"""How this process becomes a driver of a Ray cluster."""

from __future__ import annotations

import logging
from typing import Any

from sdopt.errors import MissingDependencyError, UsageError


def ray_module() -> Any:
    """Ray, imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingDependencyError(
            "a sweep on a cluster needs ray", why=str(error), hint='pip install "sdopt[ray]"'
        ) from error
    return ray


def connect(ray: Any, address: str) -> bool:
    """Become a driver of the cluster; says whether this process was none before.

    Raises:
        UsageError: there is none at the address.
    """
    if ray.is_initialized():
        return False
    if "://" in address:
        raise UsageError(
            "a sweep is driven from a machine of the cluster",
            where=address,
            why="a Ray client has no node, and nodes fetch the files from the driver's",
            hint="run it on the head node with --ray auto",
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            "no Ray cluster can be reached",
            where=address,
            why=str(error).strip().partition("\n")[0],
            hint="start one: ray start --head, on other machines ray start --address=HOST:6379",
        ) from error
    return True
