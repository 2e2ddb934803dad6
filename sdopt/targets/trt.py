"""``trt``: TensorRT 10 and 11 engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdopt.targets._trt import TensorRtTarget, commands
from sdopt.targets.base import Order


@dataclass(frozen=True)
class Trt(TensorRtTarget):
    """TensorRT 10 or 11 engines, strongly typed, for the card of the machine that builds them.

    Options: ``dtype`` fp32, fp16, bf16, int8 or fp8; ``workspace`` MiB; ``level`` 0 to 5;
    ``version_compatible``, ``strip``, ``refit``; ``cache``, a file of kernel timings; ``data``,
    what ``sdopt record`` made, to calibrate int8 or fp8 with.
    """

    packages: ClassVar = {"tensorrt": "tensorrt"}
    extra: ClassVar = "trt"
    module: ClassVar = "tensorrt"

    def card(self) -> str:
        """The name of the first card, which an engine is made for."""
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""

    def commands(self, orders: Sequence[Order]) -> list[str]:
        """Lines for trtexec."""
        extra = ["--stronglyTyped", "--profilingVerbosity=detailed"]
        extra += [f"--memPoolSize=workspace:{self.workspace}M"] * bool(self.workspace)
        extra += [f"--builderOptimizationLevel={self.level}"] * (self.level >= 0)
        extra += ["--versionCompatible"] * self.version_compatible
        extra += ["--stripWeights"] * self.strip + ["--refit"] * self.refit
        extra += [f"--timingCacheFile={self.cache}"] * bool(self.cache)
        return commands("trtexec", orders, f"{self.stage_name()}.plan", extra)
