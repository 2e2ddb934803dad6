"""Memory of NVIDIA cards, through NVML where its Python binding is installed.

The binding is NVIDIA's ``nvidia-ml-py``, whose module is ``pynvml``; nothing else here needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any

MODULE = "pynvml"
MISSING = "not measured: NVML's binding is not installed (pip install nvidia-ml-py)"
EVERY_SECONDS = 0.005
"""How often a meter looks."""


class Meter:
    """The most that a card held while this was looking, above what it held at first.

    NVML tells it of the card, not of a process: nobody else may use the card meanwhile.
    """

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._handle = nvml, handle(nvml, index)
        self._base = self._peak = self._used()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The card's."""
        return _text(self._nvml.nvmlDeviceGetName(self._handle))

    def stop(self) -> int:
        """Look a last time; returns bytes."""
        self._over.set()
        self._thread.join()
        self._peak = max(self._peak, self._used())
        return self._peak - self._base

    def _look(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._peak = max(self._peak, self._used())

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)


@contextlib.contextmanager
def nvml() -> Iterator[tuple[Any, str]]:
    """NVML, initialised; where it cannot be, None and the reason."""
    if importlib.util.find_spec(MODULE) is None:
        yield None, MISSING
        return
    module = importlib.import_module(MODULE)
    try:
        module.nvmlInit()
    except module.NVMLError as error:  # no driver, say
        yield None, f"not measured: NVML does not start: {error}"
        return
    try:
        yield module, ""
    finally:
        module.nvmlShutdown()


def handle(module: Any, index: int) -> Any:
    """NVML's handle of the card that CUDA calls ``index``: NVML knows nothing of hidden cards."""
    shown = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = shown[index] if index < len(shown) and shown[index] else str(index)
    if name.isdecimal():
        return module.nvmlDeviceGetHandleByIndex(int(name))
    return module.nvmlDeviceGetHandleByUUID(name)


def cards() -> tuple[str, ...]:
    """The cards of this machine by name; none where NVML cannot tell."""
    with nvml() as (module, _):
        if module is None:
            return ()
        found = (module.nvmlDeviceGetHandleByIndex(i) for i in range(module.nvmlDeviceGetCount()))
        return tuple(_text(module.nvmlDeviceGetName(one)) for one in found)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
