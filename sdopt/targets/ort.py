"""``ort``: ONNX Runtime, the target that is always there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sdopt.errors import UsageError
from sdopt.session import Session
from sdopt.targets.base import Dialect, Target

# Without kernels on the CPU: their names would pass ONNX's checker and fail when the graph loads.
_CUDA_ONLY = "onnxruntime has no CPU kernel for it"


@dataclass(frozen=True)
class Ort(Target):
    """ONNX Runtime on the CPU.

    Options: ``provider`` (``cpu``); ``threads`` used inside an operator, 0 for one per core.
    """

    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0

    # onnxruntime 1.31: beyond these it refuses to load a file.
    dialect: ClassVar[Dialect] = Dialect(
        max_opset=26,
        max_ir=13,
        domains=frozenset({"com.microsoft"}),
        refused={
            f"com.microsoft::{name}": _CUDA_ONLY
            for name in ("GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "NhwcConv")
        },
    )
    packages: ClassVar = {"onnxruntime": "onnxruntime"}
    extra: ClassVar = "ort"

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError("threads must be 0 or more")
        if self.provider == "cuda":
            raise UsageError(
                "ort:provider=cuda is not there yet",
                why="the graph would need its own lowering (NHWC convolutions, packed attention); "
                "without it onnxruntime's CUDA attention is wrong by several percent in fp16",
                hint="build for this machine's processor: --provider cpu",
            )

    @property
    def wants(self) -> str:
        """Group norms and attentions as the kernels that are fastest on this provider."""
        return "clean,lower_group_norm,flash_attention=ort"

    def stage_name(self) -> str:
        """``ort_cpu``; the number of threads does not change the graph."""
        return f"ort_{self.provider}"

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Load an ONNX file; with ``optimize`` onnxruntime's own rewrites are on."""
        self.check_available()
        from sdopt.targets._ort_session import OrtSession

        return OrtSession(path, threads=self.threads, optimize=optimize)
