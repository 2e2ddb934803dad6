"""A tiny UNet of SD1.x's topology as other people's exporters write it, and PyTorch's answers."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

BATCH, TOKENS, WIDTH = 2, 7, 16
INPUTS = ["sample", "timestep", "encoder_hidden_states"]
SIZES = list(itertools.product(range(8, 25), range(8, 25)))
"""Every latent from 8x8 to 24x24."""

TORCHSCRIPT = "torchscript17"
"""Variants: ``torchscript17``; ``dynamo`` or ``named`` (Dims), the opset, ``+`` if optimized."""

QUICK = (TORCHSCRIPT, "dynamo23", "dynamo23+")
SLOW = ("dynamo18", "dynamo18+", "named18", "named18+", "named23", "named23+")


class Positional(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """torch 2.13's exporters warn about themselves, and log that torchvision is missing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@functools.cache
def unet() -> torch.nn.Module:
    """Four levels, three stride-2 convolutions, cross-attention in all levels but the last."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=16,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            layers_per_block=1,
        )
        return Positional(made).eval().requires_grad_(False)


def feeds(height: int, width: int, *, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Seeded inputs for a latent of that size."""
    rng = np.random.default_rng((height, width))
    return {
        "sample": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": np.array(5.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, TOKENS, WIDTH), np.float32),
    }


@functools.cache
def answer(height: int, width: int) -> np.ndarray:
    """What PyTorch computes for ``feeds`` of that size."""
    return torch_unet(feeds(height, width))


def torch_unet(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """PyTorch's output for those inputs, on one thread: two wait for each other on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            output: torch.Tensor = unet()(*(torch.from_numpy(inputs[name]) for name in INPUTS))
    finally:
        torch.set_num_threads(threads)
    return output.numpy()


def load(variant: str) -> ir.Model:
    """A model of its own for each caller, exported once per session and variant."""
    if variant in ("vae_decoder", "text_encoder"):
        data = _vae_decoder() if variant == "vae_decoder" else _text_encoder()
    elif variant.startswith(TORCHSCRIPT):
        data = _torchscript(half=variant.endswith("-half"))
    else:
        kind, opset = variant.rstrip("+")[:-2], int(variant.rstrip("+")[-2:])
        data = _dynamo(kind, opset)[variant.endswith("+")]
    return ir.from_proto(onnx.load_from_string(data))


def _arguments(height: int, width: int) -> tuple[torch.Tensor, ...]:
    inputs = feeds(height, width)
    return tuple(torch.from_numpy(inputs[name]) for name in INPUTS)


@functools.cache
def _torchscript(*, half: bool) -> bytes:
    module, arguments = unet(), _arguments(16, 16)
    if half:
        module, arguments = copy.deepcopy(module).half(), tuple(a.half() for a in arguments)
    return jit(module, arguments, INPUTS, "out_sample")


def jit(
    module: torch.nn.Module, arguments: Any, inputs: list[str], output: str, opset: int = 17
) -> bytes:
    """torch's older exporter, every batch, height, width and length free."""
    file = BytesIO()
    image, tokens = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "tokens"}
    axes = {
        name: image if value.ndim == 4 else tokens
        for name, value in zip(inputs, arguments, strict=True)
        if value.ndim > 1
    }
    with quiet():
        torch.onnx.export(
            module,
            arguments,
            file,
            dynamo=False,
            opset_version=opset,
            input_names=inputs,
            output_names=[output],
            dynamic_axes={**axes, output: image if "sample" in output else tokens},
        )
    return file.getvalue()


class Decoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Any) -> Any:
        return self.vae.decode(latent, return_dict=False)[0]


class _States(torch.nn.Module):
    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Any) -> Any:
        return self.encoder(ids, return_dict=False)[0]


@functools.cache
def _vae_decoder() -> bytes:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
    )
    return jit(Decoder(vae.eval()), (torch.zeros(1, 4, 8, 8),), ["latent_sample"], "sample")


@functools.cache
def _text_encoder() -> bytes:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=8, **sizes)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    return jit(_States(CLIPTextModel(config).eval()), (ids,), ["input_ids"], "last_hidden_state")


def _shapes(kind: str) -> tuple[dict[int, Any], ...]:
    dim = torch.export.Dim
    batch, height, width, tokens = [dim.DYNAMIC] * 4
    if kind == "named":
        batch, height, width, tokens = map(dim, ("batch", "height", "width", "tokens"))
    return ({0: batch, 2: height, 3: width}, {}, {0: batch, 1: tokens})


@functools.cache
def _traced(kind: str) -> torch.export.ExportedProgram:
    """Traced at 16x16 as users do; ``fresh`` at 13x23 as sdopt's own exporter does."""
    arguments = _arguments(*((13, 23) if kind == "fresh" else (16, 16)))
    with quiet():
        return torch.export.export(unet(), arguments, dynamic_shapes=_shapes(kind), strict=False)


@functools.cache
def _dynamo(kind: str, opset: int) -> tuple[bytes, bytes]:
    """As converted, and as the exporter's own optimizer leaves it.

    With named Dims torch.export fails, since sides must be multiples of 8; torch.onnx.export
    (2.13) then traces again with ``8 * Dim``, so it is given the module and no finished trace.
    """
    named = kind == "named"
    with quiet():
        program = torch.onnx.export(
            unet() if named else _traced(kind),
            _arguments(16, 16) if named else (),
            dynamic_shapes=_shapes(kind) if named else None,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=INPUTS,
            output_names=["out_sample"],
        )
        raw = program.model_proto.SerializeToString()
        program.optimize()
        return raw, program.model_proto.SerializeToString()


def session(model: ir.Model) -> ort.InferenceSession:
    """ONNX Runtime on one thread with its optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2, infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    wide = found.astype(np.float64)
    return float(np.linalg.norm(wide - wanted) / np.linalg.norm(wanted))
