"""Running engines, with CUDA and TensorRT substituted: what is called when, and who owns what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import modelfile
from sdopt.errors import BuildError, SdoptError, UsageError
from sdopt.session import Port
from sdopt.targets import _cuda
from sdopt.targets._cuda import Cuda
from sdopt.targets._trt_session import CONTEXTS, DTYPES, DeviceMemory, TrtSession
from sdopt.targets.trt import Trt
from sdopt.targets.trt_rtx import TrtRtx
from tests.targets import fake_gpu
from tests.toolkit import model_of


@pytest.fixture
def card() -> fake_gpu.Card:
    return fake_gpu.Card()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "unet.plan"
    path.write_bytes(b"engine")
    return path


def opened(card: fake_gpu.Card, plan: Path, **options: Any) -> TrtSession:
    library = fake_gpu.library(card, **options.pop("engine", {}))
    return TrtSession(plan, library, cuda=options.pop("cuda", None) or Cuda(0, card), **options)


def feed(rows: int, start: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + start}


def launches(card: fake_gpu.Card) -> list[str]:
    wanted = ("cudaStreamBeginCapture", "cudaGraphLaunch", "cudaGraphExecDestroy")
    return [name.removeprefix("cuda") for name in card.calls if name in wanted]


def test_ports_are_those_of_the_engine(card: fake_gpu.Card, plan: Path) -> None:
    session = opened(card, plan)
    assert session.inputs == {"x": Port(np.dtype(np.float32), ("x_0", 4))}
    assert session.outputs == {"out": Port(np.dtype(np.float32), ("out_0", 4))}


@pytest.mark.parametrize("graphs", [True, False])
def test_outputs_are_right_and_belong_to_the_caller(
    card: fake_gpu.Card, plan: Path, graphs: bool
) -> None:
    session = opened(card, plan, cuda_graph=graphs)
    found = [session.run(feed(2, start)) for start in (0, 10, 20, 30)]
    for start, one in zip((0, 10, 20, 30), found, strict=True):
        np.testing.assert_array_equal(one["out"], feed(2, start)["x"] + 1)
    assert len({one["out"].ctypes.data for one in found}) == 4


def test_a_graph_is_captured_at_the_second_run_and_replayed(
    card: fake_gpu.Card, plan: Path
) -> None:
    session = opened(card, plan)
    session.run(feed(2))
    assert launches(card) == []
    session.run(feed(2))
    session.run(feed(2))
    assert launches(card) == ["StreamBeginCapture", "GraphLaunch", "GraphLaunch"]


def test_without_graphs_nothing_is_captured(card: fake_gpu.Card, plan: Path) -> None:
    session = opened(card, plan, cuda_graph=False)
    for _ in range(3):
        session.run(feed(2))
    assert launches(card) == []


def test_each_shape_has_its_context_and_graph(card: fake_gpu.Card, plan: Path) -> None:
    session = opened(card, plan)
    for rows in (4, 2, 8, 4, 2, 8, 4, 2, 8):
        np.testing.assert_array_equal(
            session.run(feed(rows, rows))["out"], feed(rows, rows)["x"] + 1
        )
    profiles = [context.profile for context in session._engine.contexts]
    assert sorted(profiles) == [0, 0, 1]
    assert launches(card).count("StreamBeginCapture") == 3


def test_a_graph_is_captured_again_where_an_address_changed(
    card: fake_gpu.Card, plan: Path
) -> None:
    session = opened(card, plan)
    for _ in range(3):
        session.run(feed(2))
    session.run(feed(8))  # larger buffers, elsewhere
    del card.calls[:]
    np.testing.assert_array_equal(session.run(feed(2, 5))["out"], feed(2, 5)["x"] + 1)
    assert launches(card) == ["GraphExecDestroy", "StreamBeginCapture", "GraphLaunch"]
    session.run(feed(2))
    assert launches(card)[3:] == ["GraphLaunch"]


def test_engines_share_activation_memory(card: fake_gpu.Card, plan: Path) -> None:
    cuda = Cuda(0, card)
    memory = DeviceMemory(cuda)
    small = opened(card, plan, cuda=cuda, memory=memory, engine={"scratch": 512})
    large = opened(card, plan, cuda=cuda, memory=memory, engine={"scratch": 4096})
    for _ in range(3):
        small.run(feed(2))
    before = memory.address
    for _ in range(3):
        large.run(feed(2))
    assert memory.size == 4096
    assert memory.address != before
    # The first engine's graph was of the smaller block, which is gone.
    np.testing.assert_array_equal(small.run(feed(2, 3))["out"], feed(2, 3)["x"] + 1)
    assert sum(block.size >= 512 for block in card.memory.values()) == 1
    small.close()
    assert memory.address in card.memory
    large.close()
    memory.close()
    assert card.memory == {}


def test_kernels_that_are_still_compiled_are_not_captured(card: fake_gpu.Card, plan: Path) -> None:
    ready = [False, False, True]
    session = opened(card, plan, engine={"capturable": lambda stream: ready.pop(0)})
    for _ in range(4):
        session.run(feed(2))
    assert launches(card) == ["StreamBeginCapture", "GraphLaunch"]
    assert ready == []


def test_the_shapes_that_are_kept_are_bounded(
    card: fake_gpu.Card, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdopt.targets._trt_session.CONTEXTS", 2)
    assert CONTEXTS == 8
    session = opened(card, plan)
    for rows in (1, 2, 3, 1, 2, 3):
        session.run(feed(rows))
    assert len(session._bound) == 2


def test_a_size_outside_every_profile_says_what_they_are(card: fake_gpu.Card, plan: Path) -> None:
    session = opened(card, plan)
    with pytest.raises(UsageError, match=r"not built for x \(6, 4\)") as caught:
        session.run(feed(6))
    assert "x (1, 4) to (4, 4) | x (8, 4) to (8, 4)" in (caught.value.why or "")
    assert "--shapes" in (caught.value.hint or "")


def test_a_failing_call_is_named_in_cudas_words(card: fake_gpu.Card, plan: Path) -> None:
    session = opened(card, plan)
    card.failing["cudaMalloc"] = 2
    with pytest.raises(BuildError, match="CUDA failed in cudaMalloc") as caught:
        session.run(feed(2))
    assert caught.value.why == "status 2"


def test_a_capture_that_fails_leaves_the_stream(
    card: fake_gpu.Card, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(card, plan)
    session.run(feed(2))
    monkeypatch.setattr(fake_gpu.Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(BuildError, match="the engine failed"):
        session.run(feed(2))
    assert card.capturing is None


def test_there_may_be_no_card_or_fewer(plan: Path) -> None:
    with pytest.raises(BuildError, match="there is no card 1"):
        Cuda(1, fake_gpu.Card(cards=1))
    card = fake_gpu.Card()
    card.failing["cudaGetDeviceCount"] = 100
    with pytest.raises(BuildError, match="cudaGetDeviceCount") as caught:
        Cuda(0, card)
    assert "a machine with a card" in (caught.value.hint or "")


def test_an_engine_of_another_library_says_so(card: fake_gpu.Card, plan: Path) -> None:
    plan.write_bytes(b"other version")
    with pytest.raises(BuildError, match="does not open this engine") as caught:
        opened(card, plan)
    assert caught.value.why == "wrong magic tag"
    plan.write_bytes(b"")
    with pytest.raises(BuildError, match="is empty"):
        opened(card, plan)


def test_everything_that_is_called_is_in_the_real_libraries() -> None:
    """The names that the substitutes answer to are those of the packages installed here."""
    import tensorrt_rtx
    from cuda.bindings import runtime

    for name in dir(fake_gpu.Card):
        if name.startswith("_cuda"):
            assert callable(getattr(runtime, name.removeprefix("_")))
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    for ours, theirs in (
        (fake_gpu.Refitter, tensorrt_rtx.Refitter),
        (fake_gpu.Engine, tensorrt_rtx.ICudaEngine),
        (fake_gpu.Context, tensorrt_rtx.IExecutionContext),
    ):
        public = [name for name in dir(ours) if not name.startswith("_")]
        assert all(hasattr(theirs, name) for name in public)
    assert hasattr(tensorrt_rtx.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(tensorrt_rtx.ICudaEngine, "refittable")
    for name in ("FLOAT", "HALF", "BF16"):
        array = np.ones(3, DTYPES[name])
        kind = getattr(tensorrt_rtx.DataType, name)
        assert tensorrt_rtx.Weights(kind, array.ctypes.data, array.size).size == 3


def lowered(tmp_path: Path) -> Path:
    """The graph of the engine, with its weights."""
    text = "g (float[n,4] x) => (float[n,4] out) { y = Add(x, one)\n out = Mul(y, other) }"
    ones = {name: np.ones(4, np.float32) for name in ("one", "other")}
    path = tmp_path / "unet.onnx"
    modelfile.save(model_of(text, ones), path)
    return path


def new(value: float, dtype: type = np.float32) -> ir.TensorProtocol:
    return ir.tensor(np.full(4, value, dtype))


@pytest.mark.parametrize("combined", [(), (frozenset({"one", "other"}),)])
def test_an_engine_is_refitted(
    card: fake_gpu.Card, plan: Path, tmp_path: Path, combined: tuple[frozenset[str], ...]
) -> None:
    engine = {"refittable": True, "combined": combined}
    graph = lowered(tmp_path)
    session = opened(card, plan, engine=engine, weights={"one": new(7)}, graph=graph)
    np.testing.assert_array_equal(session.run(feed(2))["out"], feed(2)["x"] + 7)
    plain = opened(card, plan, engine=engine)
    np.testing.assert_array_equal(plain.run(feed(2))["out"], feed(2)["x"] + 1)


@pytest.mark.parametrize(
    ("weights", "engine", "error", "message"),
    [
        ({"one": new(7)}, {}, UsageError, "this engine's weights are fixed"),
        ({"two": new(7)}, {"refittable": True}, BuildError, "no weight of the name two"),
        (
            {"one": new(7, np.float16)},
            {"refittable": True},
            BuildError,
            "refuses the new weight one",
        ),
        ({"one": new(7, np.int64)}, {"refittable": True}, BuildError, "cannot be refitted"),
        (
            {"one": new(7)},
            {"refittable": True, "combined": (frozenset({"one", "folded"}),)},
            BuildError,
            "wants the weight folded as well",
        ),
    ],
)
def test_what_an_engine_refuses(
    card: fake_gpu.Card,
    plan: Path,
    tmp_path: Path,
    weights: dict[str, ir.TensorProtocol],
    engine: dict[str, Any],
    error: type[SdoptError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        opened(card, plan, engine=engine, weights=weights, graph=lowered(tmp_path))


@pytest.mark.skipif(
    _cuda._bindings().cudaGetDeviceCount()[0] == 0, reason="there is a card: it opens engines"
)
def test_without_a_card_opening_an_engine_says_what_is_missing(plan: Path) -> None:
    with pytest.raises(BuildError, match="CUDA failed in cudaGetDeviceCount"):
        TrtRtx(dtype="fp16").open(plan)


def test_a_stage_without_an_engine_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine here") as caught:
        Trt(dtype="fp16").open(tmp_path / "trt_fp16.onnx")
    assert caught.value.hint == "make it: sdopt build --target trt:dtype=fp16"
