"""A denoiser in a few nodes: time embedding, cross-attention, two levels joined by skips."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt import graph
from tests.toolkit import Arrays, model_of

CHANNELS, CONTEXT, HEADS = 8, 24, 2

BODY = """g (KIND[batch_size,4,height,width] sample, KIND[TIME] timestep,
           KIND[CONTEXT_BATCH,sequence_length,24] encoder_hidden_states)
    => (KIND[batch_size,4,height,width] out_sample) {
        batch = Shape<start=0, end=1>(sample)
        time = Reshape(timestep, minus)
        times = Expand(time, batch)
        column = Unsqueeze(times, one)
        phase = Mul(column, frequencies)
        wave = Sin(phase)
        embedded = Gemm<transB=1>(wave, w_time, b_time)
        gate = Sigmoid(embedded)
        act = Mul(embedded, gate)
        early = Gemm<transB=1>(act, w_early, b_time)
        early4 = Unsqueeze(early, spatial)
        late = Gemm<transB=1>(act, w_late, b_time)
        late4 = Unsqueeze(late, spatial)
        first = Conv<pads=[1,1,1,1]>(sample, k_in)
        down0 = Add(first, early4)
        halved = Conv<pads=[1,1,1,1], strides=[2,2]>(down0, k_down)
        down1 = Add(halved, late4)
        flat = Reshape(down1, to_rows)
        tokens = Transpose<perm=[0,2,1]>(flat)
        q = MatMul(tokens, w_q)
        kv = MatMul(encoder_hidden_states, w_kv)
        k, v = Split<axis=-1, num_outputs=2>(kv)
        heads = Concat<axis=0>(batch, minus, split)
        q4 = Reshape(q, heads)
        qh = Transpose<perm=[0,2,1,3]>(q4)
        k4 = Reshape(k, heads)
        kh = Transpose<perm=[0,2,1,3]>(k4)
        v4 = Reshape(v, heads)
        vh = Transpose<perm=[0,2,1,3]>(v4)
        attended = Attention(qh, kh, vh)
        joined = Transpose<perm=[0,2,1,3]>(attended)
        rows = Reshape(joined, to_tokens)
        columns = Transpose<perm=[0,2,1]>(rows)
        where = Shape(down1)
        map = Reshape(columns, where)
        mid = Add(map, down1)
        low = Concat<axis=1>(mid, down1)
        low_out = Conv(low, k_low)
        sizes = Shape(down0)
        up = Resize<mode="nearest">(low_out, , , sizes)
        deep = Conv<pads=[1,1,1,1]>(up, k_up)
        high = Concat<axis=1>(deep, down0)
        out_sample = Conv(high, k_out)
    }"""


def weights(dtype: type = np.float32) -> Arrays:
    """Random weights, and the constants of the shape arithmetic."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(dtype)

    c = CHANNELS
    return {
        "frequencies": np.linspace(0.01, 1, c).astype(dtype).reshape(1, c),
        "w_time": weight(c, c),
        "b_time": weight(c),
        "w_early": weight(c, c),
        "w_late": weight(c, c),
        "k_in": weight(c, 4, 3, 3),
        "k_down": weight(c, c, 3, 3),
        "w_q": weight(c, c),
        "w_kv": weight(CONTEXT, 2 * c),
        "k_low": weight(c, 2 * c, 1, 1),
        "k_up": weight(c, c, 3, 3),
        "k_out": weight(4, 2 * c, 1, 1),
        "one": np.array([1]),
        "minus": np.array([-1]),
        "spatial": np.array([2, 3]),
        "split": np.array([HEADS, c // HEADS]),
        "to_rows": np.array([0, c, -1]),
        "to_tokens": np.array([0, -1, c]),
    }


def denoiser(
    dtype: type = np.float32, time: str = "", context_batch: str = "batch_size", **names: str
) -> ir.Model:
    """The graph; ``names`` rename inputs, ``time`` is the timestep's dimension if it has one."""
    text = BODY.replace("KIND", {np.float32: "float", np.float16: "float16"}[dtype])
    text = text.replace("[TIME]", f"[{time}]" if time else "").replace(
        "CONTEXT_BATCH", context_batch
    )
    for old, new in names.items():
        text = text.replace(old, new)
    model = model_of(text, weights(dtype))
    for node in model.graph:
        if node.outputs[0].name == "deep":
            node.metadata_props[graph.MODULE_KEY] = "up_blocks.0.upsamplers.0.conv"
    return model


def feeds(
    dtype: type = np.float32, batch: int = 2, size: tuple[int, int] = (6, 10), time: float = 7.0
) -> Arrays:
    """Inputs at a batch and size; the timestep is a scalar."""
    rng = np.random.default_rng(batch)
    return {
        "sample": rng.standard_normal((batch, 4, *size)).astype(dtype),
        "timestep": np.array(time, dtype),
        "encoder_hidden_states": rng.standard_normal((batch, 5, CONTEXT)).astype(dtype),
    }
