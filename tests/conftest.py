"""What every test runs under: few threads, no network, no state left from one test to the next."""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

# Before a test imports them: these libraries read their settings once. Where tests run beside each
# other, threads that wait for one another in a busy loop would take the others' cores.
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The terminal of whoever runs the tests must not decide how help and reports wrap.
os.environ["COLUMNS"] = "100"
os.environ["TERM"] = "dumb"
os.environ.pop("FORCE_COLOR", None)
os.environ["NO_COLOR"] = "1"

# A slow moment of the machine is no bug, and a run must be repeatable.
settings.register_profile("sdopt", deadline=None, derandomize=True, database=None)
settings.load_profile("sdopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, and end with the small ones.

    A file runs in one process: one that begins late lets the others wait for it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -size[item.path]))


_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets connect to this machine only: no test may depend on the network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
            pytest.fail(f"a test tried to reach {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
