"""``trt_rtx``: TensorRT-RTX engines, built without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdopt.errors import UsageError
from sdopt.targets._trt import TensorRtTarget, commands
from sdopt.targets._trt_build import Settings
from sdopt.targets.base import Order

CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""Compute capabilities that TensorRT-RTX 1.7 builds for; Hopper's 90 is not among them."""


@dataclass(frozen=True)
class TrtRtx(TensorRtTarget):
    """TensorRT-RTX engines for RTX cards of compute capability 7.5 to 12.1; needs no GPU to build.

    Options: ``sm`` the compute capabilities, such as ``86+89`` (empty: any from 8.0 on); ``dtype``
    fp32, fp16, bf16, int8 or fp8; ``workspace`` MiB; ``level`` 0 to 5; ``version_compatible``,
    ``refit``; ``data``, what ``sdopt record`` made, to calibrate int8 or fp8 with; ``strip`` and
    ``cache`` are TensorRT's own.
    """

    sm: tuple[str, ...] = ()

    packages: ClassVar = {"tensorrt_rtx": "tensorrt-rtx"}
    extra: ClassVar = "trt-rtx"
    module: ClassVar = "tensorrt_rtx"

    def __post_init__(self) -> None:
        super().__post_init__()
        for one in self.sm:
            if one not in CAPABILITIES:
                raise UsageError(
                    f"TensorRT-RTX does not build for compute capability {one}",
                    why=f"it builds for {', '.join(CAPABILITIES)}",
                    hint="for an H100 or H200 build for TensorRT itself: --target trt",
                )
        if self.dtype == "fp8" and (old := [one for one in self.sm if int(one) < 89]):
            raise UsageError(
                f"compute capability {old[0]} has no fp8",
                hint="sm=89 and later do; int8 works on all: --int8",
            )
        if self.dtype == "bf16" and "75" in self.sm:
            raise UsageError("compute capability 75 has no bf16", hint="--fp16")
        if self.strip or self.cache:
            raise ValueError("strip and cache are options of trt")

    def settings(self) -> Settings:
        """The builder's settings, with the compute capabilities."""
        settings = super().settings()
        # RTX 1.7's package has no lean runtime to put into a version-compatible engine.
        lean = ["EXCLUDE_LEAN_RUNTIME"] * self.version_compatible
        return dataclasses.replace(
            settings,
            capabilities=[f"SM{one}" for one in self.sm],
            flags=[*settings.flags, *lean],
        )

    def commands(self, orders: Sequence[Order]) -> list[str]:
        """Lines for TensorRT-RTX's own command-line builder."""
        extra = [f"--computeCapabilities={','.join(f'{s[:-1]}.{s[-1]}' for s in self.sm)}"]
        return commands("tensorrt_rtx", orders, f"{self.stage_name()}.plan", extra * bool(self.sm))
