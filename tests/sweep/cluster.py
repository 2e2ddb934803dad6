"""A Ray cluster on loopback, and tasks that need no model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from sdopt import datafile
from sdopt.errors import BuildError
from sdopt.sweep import provenance
from sdopt.sweep.place import Place
from sdopt.sweep.records import Failure, Outcome, Task

NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,  # about the least that Ray takes
    "node_ip_address": "127.0.0.1",
    "include_dashboard": False,
}
"""What every node is started with."""

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A lost node is known as such after 2 seconds and not after 15."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with a CPU each, the second with a GPU of no kind; on 127.0.0.1."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("TMPDIR", folder)  # of the nodes, whose lost ones leave their files behind
        # Read when Ray is imported: nothing is reported, and its address is that of loopback.
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray
        from ray.cluster_utils import Cluster

        (own := Path(folder) / "ray").mkdir()
        head = {**NODE, "_system_config": HEALTH, "temp_dir": str(own)}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**NODE, num_gpus=1)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def connected(cluster: Any) -> Iterator[None]:
    """This process is a driver of the cluster: engines take that up, and its workers stay."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes that a node started."""
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)


def kill(cluster: Any, node: Any) -> None:
    """Kill a node with all its processes, as when its machine is gone."""
    workers = workers_of(node)
    cluster.remove_node(node, allow_graceful=False)
    for one in workers:
        with suppress(psutil.NoSuchProcess):  # it has seen that its node is gone
            one.kill()


def do(task: Task, place: Place) -> Outcome:
    """Write what the task is called and what the files hold that it reads.

    ``work``: ``read``, paths in the place; ``folder``, where a file per start is left, with the
    node; ``seconds`` to sleep; ``fail``, a message.
    """
    import ray

    node, begin = ray.get_runtime_context().get_node_id(), time.time()
    log = Path(task.work["folder"]) / f"{task.key}-{time.time_ns()}"
    datafile.write_bytes(log, node.encode())
    path = place.root / "made" / f"{task.key}.txt"
    path.parent.mkdir(exist_ok=True)
    needed = b"".join((place.root / one).read_bytes() for one in task.work.get("read", ()))
    path.write_bytes(f"{task.key}: ".encode() + needed)
    time.sleep(task.work.get("seconds", 0.0))
    if (message := task.work.get("fail")) is not None:
        failure = Failure.of(BuildError(message))
        return Outcome(task.key, failure=failure, here=provenance.here())
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    data = {"node": node, "begin": begin, "end": time.time(), "card": card}
    files = (str(path.relative_to(place.root)),)
    return Outcome(task.key, data, files, here=provenance.here(), finished=provenance.now())
