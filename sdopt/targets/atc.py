"""``atc``: Ascend .om models, compiled by the ATC of CANN."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from sdopt import graph, modelfile
from sdopt.errors import BuildError, MissingDependencyError, UsageError
from sdopt.passes.base import Role
from sdopt.session import Session
from sdopt.shapes import Request, axis_numbers, parse_batch, parse_sizes
from sdopt.targets import _atc_command as command
from sdopt.targets import _atc_dialect
from sdopt.targets.base import Dialect, Order, Target

_SOC = re.compile(r"Ascend[0-9A-Za-z_-]+")
_SEEN = re.compile(
    r"Ascend(035[AB]?|310|310B1|310P[1357]|910(A|B|ProA|ProB|PremiumA)|910B([1-3]|2C|4|4-1)"
    r"|910_93(62|72|81|82|91|92)|950\w*)"
)
"""Chips that are named in the sources of Ascend's compiler; its own list comes with CANN."""

_CHIPS = {"duo": "Ascend310P", "a2": "Ascend910B"}
"""The chips that each attention kernel is written for."""


_STEPS = (Role.DENOISER, Role.CONTROLNET)
"""What runs at every step, and takes the timestep."""


@dataclass(frozen=True)
class Atc(Target):
    """Ascend .om models for 310P, 910B and their relatives, by the ATC that the user has.

    Options: ``soc`` the chip (Ascend310P3); ``dtype`` fp32, fp16 or int8; ``opset`` 11 to 17;
    ``attention`` plain, or MindIE's duo or a2; ``tome`` blocks to merge with MindIE's kernels;
    ``gelu`` erf, quick or kernel; ``parallel`` for two devices, each half of guidance's batch;
    ``precision`` of ATC; ``timestep`` int32 or keep; ``at`` and ``batch`` are --shapes, --batch.
    """

    soc: str = ""
    dtype: Literal["", "fp32", "fp16", "bf16", "int8", "fp8"] = ""
    opset: int = 17
    attention: Literal["plain", "duo", "a2"] = "plain"
    tome: int = 0
    gelu: Literal["erf", "quick", "kernel"] = "erf"
    parallel: bool = False
    precision: Literal[
        "", "fp16", "origin", "cube_fp16in_fp32out", "mixed_float16", "mixed_bfloat16"
    ] = ""
    timestep: Literal["int32", "keep"] = "int32"
    at: tuple[str, ...] = ()
    batch: str = ""
    dims: tuple[str, ...] = ()

    dialect: ClassVar[Dialect] = _atc_dialect.DIALECT
    packages: ClassVar[Mapping[str, str]] = {}
    extra: ClassVar[str] = ""
    compiled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.soc and _SOC.fullmatch(self.soc) is None:
            raise UsageError(
                f"{self.soc!r} is no chip of Ascend",
                hint="`Ascend` and the name that npu-smi info shows: soc=Ascend310P3",
            )
        if not _atc_dialect.OLDEST <= self.opset <= 17:
            raise ValueError("opset must be 11 to 17")
        if self.tome < 0:
            raise ValueError("tome must be 0 or more")
        if self.dtype in ("bf16", "fp8"):
            raise UsageError(
                f"a graph for ATC cannot be in {self.dtype}",
                why="no opset up to 18 has such a Conv",
                hint="--fp16; bf16 on 910B is ATC's own: atc:precision=mixed_bfloat16",
            )
        chip = _CHIPS.get(self.attention, "")
        if self.soc and not self.soc.startswith(chip):
            raise UsageError(
                f"attention={self.attention} is for {chip}, not for {self.soc}",
                hint="attention=plain runs on every chip",
            )

    @property
    def wants(self) -> str:
        """Fixed sizes, the type that was asked for, Ascend's kernels, and an opset of ATC."""
        return self.lowering(Role.DENOISER)

    def lowering(self, role: Role) -> str:
        """The passes of a component; axes that all sizes agree on are fixed first."""
        numbers = self._numbers(role)
        axes = [f"{n}@{v}" for n, v in numbers[0].items() if all(o[n] == v for o in numbers)]
        parts = [f"fix_shapes={'+'.join(axes)}"] if self.at else []
        parts += ["clean,raise_ops,clean"]
        parts += [f"tome={self.tome}:spelling=ascend"] if self.tome else []
        parts += ["cast_fp16:keep=io"] if self.dtype == "fp16" else []
        parts += ["quick_gelu:kernel=ascend"] if self.gelu == "kernel" else []
        parts += ["quick_gelu"] if self.gelu != "erf" else []
        parts += [f"flash_attention={self.attention}"] if self.attention != "plain" else []
        keep = ":timestep=keep" if self.timestep == "keep" or role not in _STEPS else ""
        return ",".join([*parts, f"lower_ascend{keep}", f"lower_opset={self.opset}"])

    def sized(self, request: Request) -> Atc:
        """The target with sizes of its own.

        Raises:
            UsageError: no chip, a range of sizes, too many gears, or kernels that are compiled for
                one size with several.
        """
        if not self.soc:
            raise UsageError(
                "which chip is it for?",
                why="ATC compiles for one",
                hint="--target atc:soc=Ascend310P3, as npu-smi info names it",
            )
        ranges = [str(sizes) for sizes in request.sizes if not sizes.fixed]
        if ranges:
            raise UsageError(
                "ATC takes sizes one by one, not a range",
                where=ranges[0],
                hint="list them: --shapes 512x512,768x768",
            )
        low, high = request.batch
        batch = str(low) if low == high else f"{low}..{high}"
        dims = [f"{name}@{pair[1]}" for name, pair in request.dims.items()]
        at = tuple(str(one) for one in request.sizes)
        made = dataclasses.replace(self, at=at, batch=batch, dims=tuple(dims))
        if any(low != high for low, high in request.dims.values()):
            raise UsageError("ATC takes --dim NAME=SIZE, not a range", hint="--dim NAME=SIZE")
        made._refuse_gears()
        return made

    def _refuse_gears(self) -> None:
        """Kernels whose sizes, or whose indices, are compiled in take one size."""
        count = len(self._numbers(Role.DENOISER))
        if count > command.MAX_GEARS:
            raise UsageError(
                f"{count} gears are asked for",
                why=f"ATC takes 2 to {command.MAX_GEARS}",
                hint="fewer sizes in --shapes, or a smaller --batch range",
            )
        for option, on, why in (
            ("tome", self.tome, "its indices of tokens are per size"),
            (f"attention={self.attention}", self.attention != "plain", "its kernel is"),
            ("gelu=kernel", self.gelu == "kernel", "its kernel is"),
        ):
            if on and count > 1:
                reason = f"{why} compiled for one size" if why.endswith("is") else why
                raise UsageError(
                    f"{option} cannot be built with {count} gears",
                    why=reason,
                    hint="one size and one batch a build, each from a bundle of its own",
                )

    def _numbers(self, role: Role) -> list[dict[str, int]]:
        """The numbers of the dynamic axes of a component at each gear."""
        low, high = parse_batch(self.batch or "1")
        # The halves of guidance go to two devices in the denoiser; its ControlNet takes both.
        doubled = role is Role.CONTROLNET or (role is Role.DENOISER and not self.parallel)
        pixels = role is Role.MODEL
        extra = {name: int(size) for name, _, size in (one.partition("@") for one in self.dims)}
        return [
            axis_numbers(sizes.high, count * (2 if doubled else 1), extra, pixels=pixels)
            for sizes in parse_sizes(",".join(self.at or ("512x512",)), multiple=1)
            for count in range(low, high + 1)
        ]

    def stage_name(self) -> str:
        """``atc_fp16_parallel``: the type, and whether it is a half of guidance's batch."""
        usual = ["atc", *([self.dtype] * bool(self.dtype)), *["parallel"] * self.parallel]
        return self.called("_".join(usual))

    def artifact_name(self, order: Order) -> str:
        """One model for all gears."""
        return f"{self.stage_name()}.om"

    def check_available(self) -> None:
        """See that ``atc`` is on the PATH.

        Raises:
            MissingDependencyError: with what to do without it.
        """
        if shutil.which("atc") is None:
            raise MissingDependencyError(
                "there is no atc on the PATH",
                hint="source CANN's set_env.sh; or lower here and compile there: --emit-only",
            )

    def compiler(self) -> Mapping[str, str]:
        """Where the compiler is: CANN's releases lie in folders that carry their version."""
        found = shutil.which("atc")
        return {"atc": str(Path(found).resolve())} if found else {}

    def versions(self) -> dict[str, str]:
        """The compiler that would run."""
        self.check_available()
        return dict(self.compiler())

    def compile(self, order: Order, made: Path) -> dict[str, Any]:
        """Run ATC; see ``Target.compile``."""
        from sdopt.targets._atc_run import compile_model

        self.check_available()
        self._check_types(order)
        sizes = command.shapes(order, self._numbers(order.role))
        model, output = order.lowered.resolve(), made.resolve().with_suffix("")
        for path in (model, output):
            command.check_path(path)
        words = command.words(order, sizes, str(model), str(output), self.soc, self._precision())
        warned = compile_model(str(shutil.which("atc")), words, made, order.progress)
        return {"soc": self.soc, "shapes": sizes.inputs, "gears": sizes.gears, "warnings": warned}

    def commands(self, orders: Sequence[Order]) -> list[str]:
        """Lines that run in the folder of the bundle's copy, on a machine with CANN."""
        lines = []
        for order in orders:
            self._check_types(order)
            sizes, folder = command.shapes(order, self._numbers(order.role)), order.component
            model, output = f"{folder}/{order.lowered.name}", f"{folder}/{self.stage_name()}"
            words = command.words(order, sizes, model, output, self.soc, self._precision())
            lines.append(" ".join(["atc", *words]))
        return lines

    def notes(self) -> list[str]:
        """A chip that no source of the compiler names."""
        if not self.soc or _SEEN.fullmatch(self.soc):
            return []
        return [f"{self.soc} is not among the chips known here: ATC will say if it is one"]

    def remarks(self, orders: Sequence[Order]) -> list[str]:
        """Kernels that the other machine must have, and what cannot be checked on this one."""
        used = {
            node.op_type
            for order in orders
            for node in graph.nodes(modelfile.load(order.lowered))
            if node.op_type in _atc_dialect.KERNELS
        }
        kernels = ", ".join(sorted(used))
        installed = (
            f"That machine's CANN must have the operators {kernels} (MindIE-SD's and AMCT's)."
        )
        return [
            *([installed] if used else []),
            "ATC may write OUTPUT_linux_x86_64.om or the like for OUTPUT.om: rename it.",
            "The graphs were checked against the operators that ATC registers; neither ATC nor an "
            "NPU has seen them.",
        ]

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """An .om on an NPU, through ``sdopt.targets._atc_session``, which says what it needs."""
        if path.suffix != ".om":
            raise UsageError(
                "a graph lowered for Ascend cannot be opened as an ONNX file",
                where=str(path),
                hint="compare it with onnxruntime, if it has no kernels of Ascend's: --target ort",
            )
        from sdopt.targets._atc_session import OmSession

        return OmSession(path)

    def check_legal(self, model: ir.Model) -> None:
        """See that a lowered graph, and how its inputs are named, is what ATC takes."""
        super().check_legal(model)
        for value in model.graph.inputs:
            if why := _atc_dialect.illegal_input(value):
                raise BuildError(
                    f"{self.name()} cannot take the input {value.name}",
                    why=why,
                    hint="rename or retype it where it was exported",
                )

    def _illegal(self, node: ir.Node, opset: int) -> str | None:
        return super()._illegal(node, opset) or _atc_dialect.illegal(node, opset)

    def _precision(self) -> str:
        """ATC's own default, float16 throughout, unless the graph says its types itself."""
        return self.precision or ("origin" if self.dtype in ("fp32", "fp16") else "")

    def _check_types(self, order: Order) -> None:
        """See that a quantized build has something quantized in it."""
        nodes = graph.nodes(modelfile.load(order.lowered))
        if self.dtype == "int8" and not any(node.op_type == "AscendQuant" for node in nodes):
            raise BuildError(
                f"nothing in {order.component} is in int8",
                why="precision is in the graph: ATC has no flag for it",
                hint="quantize it first: sdopt optimize --passes @fast,quantize=int8:data=...",
            )
