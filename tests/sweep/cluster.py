"""A Ray cluster on loopback, and tasks that need no model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdopt.sweep import provenance
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task

STORE = 80 << 20
"""Bytes of each node's object store, about the least that Ray takes."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with a CPU each, on 127.0.0.1 and without the network."""
    with pytest.MonkeyPatch.context() as patch:
        # Read when Ray is imported: nothing is reported, and its address is that of loopback.
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray
        from ray.cluster_utils import Cluster

        node = {
            "num_cpus": 1,
            "object_store_memory": STORE,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
        }
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def do(task: Task, place: Place) -> Outcome:
    """Write what the task says and what the files that it works on hold."""
    path = place.root / "made" / f"{task.key}.txt"
    path.parent.mkdir(exist_ok=True)
    needed = b"".join((place.root / one).read_bytes() for one in task.work.get("read", ()))
    path.write_bytes(f"{task.key}: ".encode() + needed)
    if (flag := task.work.get("flag")) is not None:
        Path(flag).touch()
    time.sleep(task.work.get("seconds", 0.0))
    data = {"pid": os.getpid(), "bytes": len(needed)}
    files = (str(path.relative_to(place.root)),)
    return Outcome(task.key, data, files, here=provenance.here(), finished=provenance.now())
