"""A tiny SD1.x UNet as a graph, and the package tomesd on its PyTorch form, for the tome tests."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import tomesd
import torch
from diffusers import UNet2DConditionModel

from sdopt import graph
from sdopt.passes import _token_merging as merging
from sdopt.passes.base import PassContext, Role

WORDS, WIDTH = 7, 24


@functools.cache
def unet() -> UNet2DConditionModel:
    """Two resolutions, random weights, five self-attentions at the higher one as in SD1.x."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        ).eval()


class _Tuple(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = unet()

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


@functools.cache
def _exported() -> bytes:
    dynamic = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13's exporter warns about itself
        program = torch.onnx.export(
            _Tuple().eval(),
            (torch.randn(2, 4, 13, 23), torch.tensor(5.0), torch.randn(2, WORDS, WIDTH)),
            dynamo=True,
            opset_version=23,
            optimize=False,
            verbose=False,
            input_names=["sample", "timestep", "encoder_hidden_states"],
            output_names=["out_sample"],
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, {}, {0: dynamic, 1: dynamic}),
        )
    model = program.model
    model.ir_version = 10
    return ir.to_proto(model).SerializeToString()


def exported() -> ir.Model:
    """A fresh copy of the UNet as torch's exporter writes it, at opset 23."""
    return load(_exported())


def load(data: bytes) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(data))


def context(model: ir.Model, seed: int = 0) -> PassContext:
    return PassContext(model, Role.DENOISER, seed=seed)


def session(model: ir.Model) -> ort.InferenceSession:
    """The model on ONNX Runtime's CPU, exactly as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def inputs(batch: int, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "sample": draw.standard_normal((batch, 4, height, width), dtype=np.float32),
        "timestep": np.array(5, np.float32),
        "encoder_hidden_states": draw.standard_normal((batch, WORDS, WIDTH), dtype=np.float32),
    }


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def partition_model(ratio: float = 0.5, seed: int = 0) -> tuple[ir.Model, merging.Partition]:
    """A model of the index arithmetic alone: every value it computes is an output."""
    image = ir.Value(
        name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 1, "H", "W"])
    )
    anchor = ir.node("Identity", [image])
    anchor.outputs[0].name = "same"
    main = ir.Graph([image], [], nodes=[anchor], opset_imports={"": 23}, name="partition")
    model = ir.Model(main, ir_version=10)
    part = merging.partition(context(model).emitter(anchor, "tome"), image, ratio, seed)
    for node in main:
        if node is not anchor:
            main.outputs.extend(out for out in node.outputs)
    return model, part


def run_partition(height: int, width: int, ratio: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """Every integer that the index arithmetic computes for one size, and the parts by name."""
    model, part = partition_model(ratio, seed)
    names = [out.name for out in model.graph.outputs]
    image = np.zeros((1, 1, height, width), np.float32)
    values = dict(zip(names, session(model).run(None, {"image": image}), strict=True))
    named = {
        word: values[getattr(part, word).name] for word in ("sources", "destinations", "order")
    }
    return {"all": values, "kept": values[part.kept[1].name], **named}


def slots(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Which of a cell's four tokens the pass draws, in tomesd's form ``[H // 2, W // 2, 1]``."""
    ids = run_partition(height, width, seed=seed)["destinations"]
    row, col = np.divmod(ids, width)
    return ((row % 2) * 2 + col % 2).reshape(height // 2, width // 2, 1)


@dataclass
class Reference:
    """What tomesd computes.

    ``blocks`` are the hidden states after each self-attention's residual; ``margin`` is how far
    the nearest similarity was from changing a decision (which source, which destination).
    """

    out: np.ndarray
    blocks: list[np.ndarray]
    margin: float


class _Torch:
    """torch, but for the draw of destinations."""

    def __init__(self, drawn: np.ndarray) -> None:
        self._drawn = torch.from_numpy(drawn)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randint(self, _high: int, *, size: Any, **_: Any) -> torch.Tensor:
        assert tuple(size) == tuple(self._drawn.shape)
        return self._drawn


def reference(
    monkeypatch: Any, feed: dict[str, np.ndarray], blocks: int, ratio: float, drawn: np.ndarray
) -> Reference:
    """Run tomesd on the first ``blocks`` transformer blocks at full resolution."""
    model = unet()
    tomesd.apply_patch(model, ratio=ratio, max_downsample=1)
    patched = [m for m in model.modules() if hasattr(m, "_tome_info") and hasattr(m, "attn1")]
    first = [m for m in patched if m.norm1.normalized_shape == (16,)]
    for module in patched:
        if module not in first[:blocks]:
            module.__class__ = module._parent
    seen: list[np.ndarray] = []
    margins = [float("inf")]
    matching = tomesd.merge.bipartite_soft_matching_random2d

    def match(metric: Any, w: int, h: int, sx: int, sy: int, r: int, **options: Any) -> Any:
        margins.append(_margin(metric, w, drawn, r))
        # tomesd draws nothing for odd batches; here destinations are drawn for every batch.
        return matching(metric, w, h, sx, sy, r, **{**options, "no_rand": False})

    hooks = [
        m.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy().copy()))
        for m in first
    ]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(tomesd.merge, "torch", _Torch(drawn))
        patch.setattr(tomesd.merge, "bipartite_soft_matching_random2d", match)
        tensors = [torch.from_numpy(array) for array in feed.values()]
        out = model(*tensors, return_dict=False)[0].numpy()
    for hook in hooks:
        hook.remove()
    tomesd.remove_patch(model)
    return Reference(out, seen, min(margins))


def _margin(metric: torch.Tensor, width: int, drawn: np.ndarray, merged: int) -> float:
    cell_row, cell_col = np.indices(drawn.shape[:2])
    slot = drawn[..., 0]
    ids = ((2 * cell_row + slot // 2) * width + 2 * cell_col + slot % 2).reshape(-1)
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    is_source = torch.ones(metric.shape[1], dtype=torch.bool)
    is_source[ids] = False
    top = (unit[:, is_source] @ unit[:, ids].transpose(1, 2)).topk(2, dim=-1).values
    best, order = top[..., 0].sort(dim=-1, descending=True)
    gap = (top[..., 0] - top[..., 1]).gather(1, order)[:, :merged].min()
    edge = (best[:, merged - 1] - best[:, merged]).min() if merged < best.shape[1] else gap
    return float(min(gap, edge))


def well_posed(
    monkeypatch: Any, size: tuple[int, int, int], blocks: int, ratio: float, drawn: np.ndarray
) -> tuple[dict[str, np.ndarray], Reference]:
    """Inputs on which no decision hangs on fp32's last bits, and what tomesd makes of them."""
    for seed in range(20):
        feed = inputs(*size, seed=seed)
        found = reference(monkeypatch, feed, blocks, ratio, drawn)
        if found.margin > 2e-6:
            return feed, found
    raise AssertionError("no inputs with a clear matching")


def op_types(model: ir.Model) -> set[str]:
    return set(graph.op_counts(model))
