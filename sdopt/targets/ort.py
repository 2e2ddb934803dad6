"""``ort``: ONNX Runtime, the target that is always there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir

from sdopt.errors import MissingDependencyError, UsageError
from sdopt.session import Session
from sdopt.targets.base import Dialect, Target

Piece = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A part of a graph, ready to run on arrays by name."""

# onnxruntime 1.31: beyond these it refuses to load a file.
_OPSET, _IR = 26, 13

# Without kernels on the CPU: their names would pass ONNX's checker and fail when the graph loads.
_CUDA_ONLY = "onnxruntime has no CPU kernel for it"

_CPU = Dialect(
    max_opset=_OPSET,
    max_ir=_IR,
    domains=frozenset({"com.microsoft"}),
    refused={
        f"com.microsoft::{name}": _CUDA_ONLY
        for name in ("GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "NhwcConv")
    },
)
_CUDA = Dialect(
    max_opset=_OPSET,
    max_ir=_IR,
    domains=frozenset({"com.microsoft"}),
    # Measured on an SD1.5 step in fp16 with onnxruntime 1.31.1: relative error 0.083.
    refused={"Attention": "onnxruntime's CUDA kernel of it is wrong by several percent in fp16"},
)


@dataclass(frozen=True)
class Ort(Target):
    """ONNX Runtime, on the CPU or on CUDA.

    Options: ``provider`` (``cpu``, ``cuda``); ``threads`` used inside an operator, 0 for one per
    core (cpu); ``device`` number of the card, ``graph`` whether kernels are captured as a CUDA
    graph per shape, ``search`` how cuDNN picks convolutions, ``fuse_bias`` whether it adds their
    bias itself, ``prefer_nhwc`` whether onnxruntime may turn what is left channels-first (cuda);
    ``dtype`` fp16 casts on the way, empty leaves the graph's.
    """

    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0
    device: int = 0
    graph: bool = True
    search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"
    fuse_bias: bool = True
    prefer_nhwc: bool = False
    dtype: Literal["", "fp32", "fp16"] = ""

    dialect: ClassVar[Dialect] = _CPU
    packages: ClassVar = {"onnxruntime": "onnxruntime"}
    extra: ClassVar = "ort"

    def __post_init__(self) -> None:
        if self.threads < 0 or self.device < 0:
            raise ValueError("threads and device must be 0 or more")
        given = [
            name
            for name in ("device", "graph", "search", "fuse_bias", "prefer_nhwc")
            if getattr(self, name) != type(self).__dataclass_fields__[name].default
        ]
        if given and self.provider == "cpu":
            raise ValueError(f"{given[0]} is an option of provider=cuda")
        if self.threads and self.provider == "cuda":
            raise ValueError("threads is an option of provider=cpu")

    def takes(self) -> Dialect:
        """What onnxruntime 1.31 loads, and has kernels for on the provider."""
        return _CPU if self.provider == "cpu" else _CUDA

    @property
    def wants(self) -> str:
        """Norms, attentions and convolutions as the kernels that are fastest on this provider."""
        cast = "cast_fp16," if self.dtype == "fp16" else ""
        if self.provider == "cpu":
            return f"clean,{cast}lower_group_norm,flash_attention=ort"
        return (
            f"clean,{cast}lower_token_merging,flash_attention=ort,lower_attention,"
            "fuse_shared_linears,fuse_geglu,lower_channels_last,fuse_skip_norm"
        )

    def stage_name(self) -> str:
        """``ort_cpu``; the options of a session do not change the graph."""
        usual = ["ort", self.provider, *([self.dtype] if self.dtype else [])]
        return self.called("_".join(usual))

    def on_device(self, device: str) -> Ort:
        """The same target on ``cpu``, or on a card by its number.

        Raises:
            UsageError: a device that the provider does not have.
        """
        if self.provider == "cpu" and device == "cpu":
            return self
        if self.provider == "cuda" and device.isdecimal():
            return dataclasses.replace(self, device=int(device))
        raise UsageError(
            f"{self} has no device {device!r}",
            hint="--device cpu,cpu, or a number with --target ort:provider=cuda",
        )

    def cuda_device(self) -> int | None:
        """The number of the card with ``provider=cuda``."""
        return self.device if self.provider == "cuda" else None

    def check_available(self) -> None:
        """See that onnxruntime is installed, and has the provider.

        Raises:
            MissingDependencyError: with the command that installs it.
        """
        super().check_available()
        if self.provider == "cuda":
            import onnxruntime

            found = onnxruntime.get_available_providers()
            if "CUDAExecutionProvider" not in found:
                raise MissingDependencyError(
                    "this onnxruntime has no CUDA provider",
                    why=f"it has {', '.join(found)}",
                    hint="on the machine with the card: pip uninstall onnxruntime; "
                    "pip install onnxruntime-gpu; or only lower it here: --emit-only",
                )

    def lowering_versions(self) -> dict[str, str]:
        """The CUDA graph is the same whichever onnxruntime writes it down."""
        return {} if self.provider == "cuda" else self.versions()

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Load an ONNX file; with ``optimize`` onnxruntime's own rewrites are on."""
        return self.open_adapted(path, {}, optimize=optimize)

    def open_adapted(
        self, path: Path, weights: Mapping[str, ir.TensorProtocol], *, optimize: bool = True
    ) -> Session:
        """Load an ONNX file with some of its initializers replaced; the others stay on disk."""
        self.check_available()
        if self.provider == "cpu":
            from sdopt.targets._ort_session import OrtSession

            return OrtSession(path, threads=self.threads, optimize=optimize, weights=weights)
        from sdopt.targets._ort_cuda_session import OrtCudaSession

        return OrtCudaSession(
            path,
            device=self.device,
            cuda_graph=self.graph,
            provider_options={
                "cudnn_conv_algo_search": self.search.upper(),
                "fuse_conv_bias": str(int(self.fuse_bias)),
                "prefer_nhwc": str(int(self.prefer_nhwc)),
            },
            optimize=optimize,
            weights=weights,
        )

    def open_piece(self, model: onnx.ModelProto, folder: Path) -> Piece:
        """Open a part of a graph on the CPU, node by node as it is written.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BuildError: it refuses the part.
        """
        Ort().check_available()
        from sdopt.targets._ort_session import OrtPiece

        return OrtPiece(model, folder, self.threads)
