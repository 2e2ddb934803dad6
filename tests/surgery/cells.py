"""The cells of the surgery matrix, their shipped graphs, inputs and expected counts; no torch."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import lzma
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from tests.surgery import weightless
from tests.toolkit import Arrays

DATA = Path(__file__).parent.parent / "data"
ARCHIVE, MANIFEST = DATA / "surgery.tar.xz", DATA / "surgery.json"

MODELS = ("unet", "text_encoder", "vae_decoder")
EXPORTERS = (
    ("torchscript", 11),
    ("torchscript", 14),
    ("torchscript", 17),
    ("dynamo", 18),
    ("dynamo", 21),
    ("dynamo", 23),
)


@dataclass(frozen=True)
class Cell:
    """One exported model: which, by what, with which attention, shapes and type."""

    model: str
    exporter: str
    opset: int
    attention: str
    """``sdpa`` is one call of torch, ``eager`` is written out (baddbmm and softmax)."""
    shapes: str
    """``static``, or ``dynamic``: every batch, height, width and number of tokens."""
    dtype: str

    def __str__(self) -> str:
        exporter = f"{self.exporter}{self.opset}"
        return "-".join((self.model, exporter, self.attention, self.shapes, self.dtype))

    @property
    def is_dynamic(self) -> bool:
        """Whether it takes another size than it was traced at."""
        return self.shapes == "dynamic"


CELLS = tuple(
    Cell(model, exporter, opset, attention, shapes, dtype)
    for model, (exporter, opset), attention, shapes, dtype in itertools.product(
        MODELS, EXPORTERS, ("eager", "sdpa"), ("static", "dynamic"), ("fp32", "fp16")
    )
)


@functools.cache
def manifest() -> dict[str, Any]:
    """``graphs``: cell to sha256; ``refused``: cell to torch's words; ``counts``; ``versions``."""
    found: dict[str, Any] = json.loads(MANIFEST.read_text("utf-8"))
    return found


def shipped(exporter: str = "") -> list[Cell]:
    """The cells that torch can export, all or those of one exporter."""
    graphs = manifest()["graphs"]
    return [cell for cell in CELLS if str(cell) in graphs and exporter in ("", cell.exporter)]


def shipped_names() -> set[str]:
    """The files in the archive."""
    return set(_members())


@functools.cache
def _members() -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(lzma.decompress(ARCHIVE.read_bytes()))) as archive:
        return {
            one.name: file.read()
            for one in archive.getmembers()
            if (file := archive.extractfile(one)) is not None
        }


def graph_file(cell: Cell) -> bytes:
    """The shipped ONNX file of a cell, without its parameters.

    Raises:
        ValueError: it is not the one that the manifest names.
    """
    data = _members()[f"{cell}.onnx"]
    if hashlib.sha256(data).hexdigest() != manifest()["graphs"][str(cell)]:
        raise ValueError(f"{cell} is not the graph that {MANIFEST.name} names")
    return data


def proto(cell: Cell) -> onnx.ModelProto:
    """The raw graph of a cell with its parameters drawn."""
    model = onnx.load_from_string(graph_file(cell))
    weightless.fill(model)
    return model


def load(cell: Cell) -> ir.Model:
    """The raw graph of a cell, a model of its own for each caller."""
    return ir.from_proto(proto(cell))


def feeds(cell: Cell, *, other: bool = False) -> Arrays:
    """Seeded inputs of the size that was traced, or of another size and batch."""
    rng = np.random.default_rng(3)
    kind = np.float16 if cell.dtype == "fp16" else np.float32
    batch = 3 if other else 2
    if cell.model == "text_encoder":
        return {"input_ids": rng.integers(3, 64, (batch, 11 if other else 16))}
    if cell.model == "vae_decoder":
        size = (5, 7) if other else (6, 6)
        return {"latent_sample": rng.standard_normal((batch, 4, *size)).astype(kind)}
    height, width, tokens = (24, 8, 9) if other else (16, 16, 7)
    return {
        "sample": rng.standard_normal((batch, 4, height, width)).astype(kind),
        "timestep": np.array(321, kind),
        "encoder_hidden_states": rng.standard_normal((batch, tokens, 24)).astype(kind),
    }


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """ONNX Runtime on one thread with its optimisations off.

    Planning which buffer to use again is off too: on graphs of thousands of nodes it takes 8
    times as long as all the rest of making a session (onnxruntime 1.31).
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_reuse = options.enable_mem_pattern = False
    options.log_severity_level = 4
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
