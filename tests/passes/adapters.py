"""Adapter files, and a graph with a weight of each shape and layout that they change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from tests.toolkit import model_of

BLOCK = "down_blocks.0.attentions.0"
Q, K, V = (f"{BLOCK}.transformer_blocks.0.attn1.to_{one}" for one in "qkv")
CONV, PROJ, FIRST, GEMM = (
    "conv_in",
    f"{BLOCK}.proj_in",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
)
SHAPES = {
    CONV: (6, 4, 3, 3),
    PROJ: (7, 6, 1, 1),
    Q: (8, 8),
    K: (8, 8),
    V: (8, 8),
    FIRST: (8, 8),
    GEMM: (5, 8),
}
"""Module path to shape in PyTorch's layout; the graph stores ``FIRST`` as ``[in, out]``."""

GRAPH = """g (float[1,4,6,6] image, float[2,8] x) =>
    (float[1,7,6,6] proj, float[2,8] q, float[2,8] k, float[2,8] v, float[2,5] time) {
    conv = Conv<pads=[1,1,1,1]>(image, w_conv)
    proj = Conv(conv, w_proj)
    tq = Transpose<perm=[1,0]>(w_q)
    q = MatMul(x, tq)
    tk = Transpose<perm=[1,0]>(w_k)
    k = MatMul(x, tk)
    tv = Transpose<perm=[1,0]>(w_v)
    v = MatMul(x, tv)
    first = MatMul(x, w_first)
    time = Gemm<transB=1>(first, w_gemm)
}"""
_WORDS = dict(zip(("conv", "proj", "q", "k", "v", "first", "gemm"), SHAPES, strict=True))


def base_weights(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Module path to weight in PyTorch's layout."""
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}


def graph_of(weights: Mapping[str, np.ndarray]) -> ir.Model:
    """The graph with those weights under the names that a checkpoint gives them."""
    text = GRAPH.replace("float[", "float16[") if weights[Q].dtype == np.float16 else GRAPH
    model = model_of(
        text,
        {f"w_{w}": (weights[p].T if p == FIRST else weights[p]).copy() for w, p in _WORDS.items()},
    )
    rename(model, {f"w_{word}": f"{path}.weight" for word, path in _WORDS.items()})
    return model


def rename(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give initializers other names, and the types that those of a file have."""
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in values:
        assert value.const_value is not None
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(value.const_value.shape.numpy())
        value.name = names.get(value.name or "", value.name)
        model.graph.initializers[str(value.name)] = value


def weight(model: ir.Model, path: str) -> np.ndarray:
    """What is written for a module, in PyTorch's layout."""
    tensor = model.graph.initializers[f"{path}.weight"].const_value
    assert tensor is not None
    return tensor.numpy().T if path == FIRST else tensor.numpy()


def kohya(path: str, prefix: str = "lora_unet_") -> str:
    return prefix + path.replace(".", "_")


def factors(
    path: str, rank: int = 2, seed: int = 1, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """``down`` and ``up`` for a module, random."""
    rng = np.random.default_rng([seed, *path.encode()])
    out, *inputs = SHAPES[path]
    down = rng.standard_normal((rank, *inputs)).astype(dtype)
    up = rng.standard_normal((out, rank, *[1] * (len(inputs) - 1))).astype(dtype)
    return down, up


def product(path: str, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """``up @ down`` as an update of the module's weight, in float64."""
    flat = down.reshape(len(down), -1).astype(np.float64)
    return (up.reshape(len(up), -1).astype(np.float64) @ flat).reshape(SHAPES[path])


def save(file: Path, tensors: Mapping[str, np.ndarray], metadata: object = None) -> str:
    """Write a safetensors file; returns its path as text."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(arrays, file, metadata=metadata)  # type: ignore[arg-type]
    return str(file)
