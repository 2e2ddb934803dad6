"""Single operators of token merging on onnxruntime: what ``tome`` writes, and what else could be.

Each is a graph of its own, inputs and outputs on the device, the median of ``--count`` launches.

    python benchmarks/operators.py
    python benchmarks/operators.py --provider cpu --tokens 64 --channels 16
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
OPERATORS = {
    "TopK of one": ("TopK", ["s", "one"], ["v", "i"], {}),
    "ArgMax": ("ArgMax", ["s"], ["i"], {"axis": -1}),
    "ReduceMax": ("ReduceMax", ["s", "last"], ["v"], {}),
    "one-hot product": ("MatMul", ["hot", "x"], ["v"], {}),
    "ScatterElements that adds": (
        "ScatterElements",
        ["z", "p", "x"],
        ["v"],
        {"axis": 1, "reduction": "add"},
    ),
    "similarities": ("MatMul", ["a", "b"], ["v"], {}),
}
"""What is timed: operator, inputs, outputs and attributes."""
CONSTANTS = {"one": np.array([1]), "last": np.array([-1])}


def arrays(batch: int, tokens: int, channels: int) -> dict[str, np.ndarray]:
    """Seeded inputs by the names in ``OPERATORS``: a quarter of the tokens are destinations."""
    rng = np.random.default_rng(0)
    there, here = tokens // 4, tokens - tokens // 4

    def real(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    place = rng.integers(0, there, (batch, here, 1))
    return {
        "s": real(batch, here, there),
        "a": real(batch, here, channels),
        "b": real(batch, channels, there),
        "x": real(batch, here, channels),
        "z": np.zeros((batch, there, channels), np.float32),
        "p": np.repeat(place, channels, axis=2),
        "hot": (place.transpose(0, 2, 1) == np.arange(there)[:, None]).astype(np.float32),
    }


def model(name: str, given: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The graph of one operator, its inputs of the arrays' types and shapes."""
    op_type, inputs, outputs, attributes = OPERATORS[name]

    def info(value: str, kind: int, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(value, kind, shape)

    kinds = {"v": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, outputs, **attributes)],
        op_type,
        [
            info(one, helper.np_dtype_to_tensor_dtype(given[one].dtype), given[one].shape)
            for one in inputs
            if one in given
        ],
        [info(one, kinds[one], None) for one in outputs],
        [numpy_helper.from_array(CONSTANTS[one], one) for one in inputs if one in CONSTANTS],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def milliseconds(
    graph: onnx.ModelProto, given: dict[str, np.ndarray], device: str, count: int
) -> float:
    """The median of a launch that is waited for."""
    session = ort.InferenceSession(graph.SerializeToString(), providers=[PROVIDERS[device]])
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(
            value.name, ort.OrtValue.ortvalue_from_numpy(given[value.name], device, 0)
        )
    for value in session.get_outputs():
        binding.bind_output(value.name, device)
    taken = []
    for _ in range(5 + count):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[5:])


def main() -> None:
    """Time them all and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args()
    given = arrays(options.batch, options.tokens, options.channels)
    for name in OPERATORS:
        took = milliseconds(model(name, given), given, options.provider, options.count)
        print(f"{name:28} {took:9.3f} ms")


if __name__ == "__main__":
    main()
