"""Forms of GroupNormalization and Attention on ONNX Runtime's CPU, side by side.

The tables in ``sdopt/passes/lower_group_norm.py`` and ``lower_attention.py`` come from here:

    python benchmarks/lowering.py

All forms of one row run in turn, many times over, on one thread; a form's time is the least CPU
time of one run, so other work on the machine disturbs it little. Shown as a ratio to the operator
as it is exported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
import onnxruntime
from onnx import ModelProto, numpy_helper, parser

OPSETS = 'ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]'
GROUPS = 32

GROUP_NORM_SIZES = [(64, 32), (64, 64), (128, 32), (256, 16), (320, 64)]
"""Channels, height and width; batch 2."""

GROUP_NORM_FORMS = {
    "GroupNormalization": "y = GroupNormalization <num_groups=32> (x, scale, bias)",
    "BatchNormalization": """
        grouped = Reshape (x, groups)
        normal = InstanceNormalization (grouped, one, zero)
        shape = Shape (x)
        restored = Reshape (normal, shape)
        y = BatchNormalization <epsilon=0.0> (restored, scale, bias, mean, variance)""",
    "Mul, Add": """
        grouped = Reshape (x, groups)
        normal = InstanceNormalization (grouped, one, zero)
        shape = Shape (x)
        restored = Reshape (normal, shape)
        scaled = Mul (restored, scale3)
        y = Add (scaled, bias3)""",
    "LayerNormalization": """
        grouped = Reshape (x, groups)
        length = Shape <start=2> (grouped)
        ones = Expand (unit, length)
        normal = LayerNormalization <axis=-1> (grouped, ones)
        shape = Shape (x)
        restored = Reshape (normal, shape)
        scaled = Mul (restored, scale3)
        y = Add (scaled, bias3)""",
    "by hand": """
        grouped = Reshape (x, groups)
        mean1 = ReduceMean (grouped, last)
        gap = Sub (grouped, mean1)
        squared = Mul (gap, gap)
        spread = ReduceMean (squared, last)
        safe = Add (spread, epsilon)
        deviation = Sqrt (safe)
        normal = Div (gap, deviation)
        shape = Shape (x)
        restored = Reshape (normal, shape)
        scaled = Mul (restored, scale3)
        y = Add (scaled, bias3)""",
}

ATTENTION_SIZES = [
    (8, 8, 1024, 1024),
    (8, 40, 1024, 1024),
    (8, 40, 4096, 4096),
    (8, 40, 4096, 77),
    (4, 8, 256, 256),
    (1, 512, 1024, 1024),
]
"""Heads, head size, length of queries, length of keys; batch 2."""

_HEADS = "".join(
    f"{x}r = Reshape ({x}, split) {x}h = Transpose <perm=[0,2,1,3]> ({x}r)\n" for x in "qkv"
)
_JOIN = "t = Transpose <perm=[0,2,1,3]> (o) y = Reshape (t, join)"

ATTENTION_FORMS = {
    "Attention": f"{_HEADS} o = Attention (qh, kh, vh) {_JOIN}",
    "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention <num_heads=HEADS> (q, k, v)",
    "MatMul, Softmax, MatMul": f"""{_HEADS}
        qs = Mul (qh, factor)
        kt = Transpose <perm=[0,1,3,2]> (kh)
        p = MatMul (qs, kt)
        w = Softmax <axis=-1> (p)
        o = MatMul (w, vh) {_JOIN}""",
    "Attention, 3-D": "y = Attention <q_num_heads=HEADS, kv_num_heads=HEADS> (q, k, v)",
}

Arrays = Mapping[str, np.ndarray]


def model(signature: str, body: str, constants: Arrays) -> ModelProto:
    """A model from ONNX text and its constants."""
    made = parser.parse_model(f"<{OPSETS}> g {signature} {{ {body} }}")
    used = {name for node in made.graph.node for name in node.input}
    tensors = [numpy_helper.from_array(a, n) for n, a in constants.items() if n in used]
    made.graph.initializer.extend(tensors)
    return made


def session(one: ModelProto) -> onnxruntime.InferenceSession:
    """The model opened as ``sdopt run`` does, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        one.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(models: Mapping[str, ModelProto], feeds: Arrays, seconds: float) -> dict[str, float]:
    """The least CPU seconds of one run of each, all run in turn for ``seconds`` in total.

    Raises:
        AssertionError: two forms do not compute the same.
    """
    sessions = {name: session(one) for name, one in models.items()}
    first, *others = (one.run(None, dict(feeds))[0] for one in sessions.values())
    for other in others:
        assert np.linalg.norm(other - first) <= 5e-6 * np.linalg.norm(first)
    best = dict.fromkeys(sessions, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, one in sessions.items():
            start = time.process_time()
            one.run(None, dict(feeds))
            best[name] = min(best[name], time.process_time() - start)
    return best


def group_norm(channels: int, size: int, seconds: float) -> dict[str, float]:
    """The forms of GroupNormalization on ``[2, channels, size, size]``."""
    rng = np.random.default_rng(0)
    scale, bias, x = (
        rng.standard_normal(shape, np.float32)
        for shape in ((channels,), (channels,), (2, channels, size, size))
    )
    constants = {
        "scale": scale,
        "bias": bias,
        "scale3": scale.reshape(-1, 1, 1),
        "bias3": bias.reshape(-1, 1, 1),
        "groups": np.array([0, GROUPS, -1]),
        "one": np.ones(GROUPS, np.float32),
        "zero": np.zeros(GROUPS, np.float32),
        "mean": np.zeros(channels, np.float32),
        "variance": np.ones(channels, np.float32),
        "unit": np.array(1, np.float32),
        "last": np.array([2]),
        "epsilon": np.array(1e-5, np.float32),
    }
    signature = f"(float[n,{channels},h,w] x) => (float[n,{channels},h,w] y)"
    forms = {k: model(signature, body, constants) for k, body in GROUP_NORM_FORMS.items()}
    return measure(forms, {"x": x}, seconds)


def attention(heads: int, size: int, queries: int, keys: int, seconds: float) -> dict[str, float]:
    """The forms of Attention on ``[2, queries, heads * size]`` and ``[2, keys, ...]``."""
    rng = np.random.default_rng(0)
    width = heads * size
    lengths = {"q": queries, "k": keys, "v": keys}
    feeds = {
        name: rng.standard_normal((2, length, width), np.float32)
        for name, length in lengths.items()
    }
    constants = {
        "split": np.array([0, 0, heads, size]),
        "join": np.array([0, 0, width]),
        "factor": np.array(size**-0.5, np.float32),
    }
    signature = (
        f"(float[n,a,{width}] q, float[n,b,{width}] k, float[n,b,{width}] v)"
        f" => (float[n,a,{width}] y)"
    )
    forms = {
        name: model(signature, body.replace("HEADS", str(heads)), constants)
        for name, body in ATTENTION_FORMS.items()
    }
    return measure(forms, feeds, seconds)


def show(label: str, found: Mapping[str, float]) -> None:
    """One row: the first form's milliseconds, the others' ratios to it."""
    first, *others = found.items()
    ratios = "  ".join(f"{name} {value / first[1]:.2f}" for name, value in others)
    print(f"{label:24} {first[0]} {first[1] * 1e3:.2f} ms  {ratios}", flush=True)


def main() -> None:
    """Measure and print both tables."""
    options = argparse.ArgumentParser(description="lowered forms on ONNX Runtime's CPU")
    options.add_argument("--seconds", type=float, default=6.0, help="per row")
    seconds = options.parse_args().seconds
    for channels, size in GROUP_NORM_SIZES:
        show(f"{channels} x {size} x {size}", group_norm(channels, size, seconds))
    for heads, size, queries, keys in ATTENTION_SIZES:
        label = f"{heads} x {size}, {queries} x {keys}"
        show(label, attention(heads, size, queries, keys, seconds))


if __name__ == "__main__":
    main()
