"""Memory of a row in a process of its own, and of a card by NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdopt.bench import bench, device, machine, memory
from sdopt.bench.rows import contestants
from sdopt.bench.settings import Settings
from sdopt.bundle import Bundle
from sdopt.manifest import ComponentEntry, StageRecord
from tests.runtime import toy
from tests.toolkit import model_of

MEGA = 1_000_000
KILL = "import os; os.kill(os.getpid(), 9)"
SIDE = 4096  # 67 MB in float32


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A stage of next to nothing and one of 67 MB."""
    entries = {"net": ComponentEntry("net", "model")}
    made = Bundle.create(tmp_path_factory.mktemp("heavy"), "toy", "test", entries, "0")
    full = np.full((SIDE, SIDE), 0.5, np.float32)
    with made.lock():
        for stage, op, weight in (("model", "Mul", full[:1]), ("optimized", "MatMul", full)):
            body = f"g (float[B,{SIDE}] x) => (float[B,{SIDE}] y) {{ y = {op}(x, w) }}"
            model = model_of(body, {"w": weight})
            record = StageRecord("net", "model", stage, "", "f", "toy", "test", "float32", stage)
            made.commit(model, record)
    made.write_manifest()
    return made


def test_each_row_is_alone_and_what_it_holds_is_seen(heavy: Bundle) -> None:
    ballast = np.ones(400 * MEGA // 8)  # nothing that the others may count
    found = bench(heavy, rounds=1, warm_up=1, pause=0.0)
    small, large = (one.memory for one in found.rows)
    assert small is not None
    assert large is not None
    for one in (small, large):
        assert one.base_bytes is not None
        assert one.loaded_bytes is not None
        assert one.peak_bytes is not None
        assert 20 * MEGA < one.base_bytes < one.loaded_bytes <= one.peak_bytes < ballast.nbytes
        assert one.device_bytes is None
        assert one.device == "ort computes on no NVIDIA card"
        assert one.doing == "net: all open, each computed once"
    assert large.loaded_bytes is not None
    assert small.loaded_bytes is not None
    weights = SIDE * SIDE * 4
    assert weights * 0.9 < large.loaded_bytes - small.loaded_bytes < weights * 3


def test_an_image_is_drawn_in_the_other_process(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "b")
    settings = Settings(shapes="24x32", steps=5)
    (row,) = contestants(made, ["model"], ["ort"], made.components)
    found = memory.measure(made, row, settings, whole=True)
    assert found.why == ""
    assert found.doing == "1 image(s) of 24x32 pixels, 2 steps"
    assert found.base_bytes
    assert found.peak_bytes
    assert found.peak_bytes > found.base_bytes > 100 * MEGA, "torch is in the base"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            KILL,
            "its process was ended by signal 9: out of memory?",
        ),
        ("raise ValueError('no such thing')", "its process failed: ValueError: no such thing"),
        ("raise SystemExit(3)", "its process failed: exit code 3"),
    ],
)
def test_a_process_that_dies_is_no_zero(
    heavy: Bundle, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    monkeypatch.setattr(memory, "_CHILD", code)
    found = bench(heavy, rounds=1, warm_up=1, pause=0.0, stages=["model"])
    one = found.rows[0].memory
    assert one is not None
    assert (one.base_bytes, one.loaded_bytes, one.peak_bytes) == (None, None, None)
    assert (one.device_bytes, one.why) == (None, why)
    assert found.notes[-1] == f"model: memory was not measured: {why}"


class FakeNvml(SimpleNamespace):
    """The calls of NVML that are made; ``used`` are the bytes it tells, one after another."""

    NVMLError = RuntimeError

    def __init__(self, used: list[int], broken: bool = False) -> None:
        super().__init__(used=iter(used), last=0, broken=broken, ended=0)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise RuntimeError("no driver")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        return name

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return f"H{handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        self.last = next(self.used, self.last)
        return SimpleNamespace(used=self.last)


def install(monkeypatch: pytest.MonkeyPatch, module: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: module)


def test_the_peak_of_a_card_is_above_what_it_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([100, 900, 300, 200])
    install(monkeypatch, fake)
    with device.nvml() as (module, why):
        assert why == ""
        meter = device.Meter(module, 1)
        assert meter.name == "Hcard 1"
        while fake.last != 200:
            pass
        assert meter.stop() == 800
    assert fake.ended == 1
    assert machine.machine().cards == ("Hcard 0", "Hcard 1")


def test_without_nvml_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with device.nvml() as (module, why):
        assert module is None
        assert "pip install nvidia-ml-py" in why
    assert device.cards() == ()
    broken = FakeNvml([], broken=True)
    install(monkeypatch, broken)
    with device.nvml() as (module, why):
        assert (module, why) == (None, "not measured: NVML does not start: no driver")
    assert broken.ended == 0


@pytest.mark.parametrize(
    ("shown", "index", "wanted"),
    [(None, 1, "card 1"), ("3,2", 1, "card 2"), ("GPU-ab", 0, "GPU-ab"), ("", 0, "card 0")],
)
def test_cards_are_numbered_as_cuda_does(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, index: int, wanted: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert device.handle(FakeNvml([]), index) == wanted


def test_which_targets_compute_on_a_card() -> None:
    from sdopt.targets.ort import Ort
    from sdopt.targets.trt_rtx import TrtRtx

    assert Ort().cuda_device() is None
    assert Ort(provider="cuda", device=2).cuda_device() == 2
    assert TrtRtx().cuda_device() == 0
