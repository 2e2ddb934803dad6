"""``onnx``: plain ONNX of one opset, for compilers and runtimes that sdopt does not know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from onnx import helper

from sdopt.session import Session
from sdopt.targets.base import Dialect, Target

OLDEST, NEWEST = 11, 25

_CASTS = {"fp32": "cast_fp32,clean,", "fp16": "cast_fp16,"}


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX of one opset without a custom domain: for OpenVINO, QNN, Core ML tools, older runtimes.

    Options: ``opset`` 11 to 25 of the standard operators (17 by default, which most read);
    ``dtype`` fp32 or fp16, empty leaves the graph's.
    """

    opset: int = 17
    dtype: Literal["", "fp32", "fp16"] = ""

    dialect: ClassVar[Dialect] = Dialect(max_opset=NEWEST, max_ir=13)
    packages: ClassVar = {"onnxruntime": "onnxruntime"}
    extra: ClassVar = "ort"

    def __post_init__(self) -> None:
        if not OLDEST <= self.opset <= NEWEST:
            raise ValueError(f"opset must be {OLDEST} to {NEWEST}, not {self.opset}")

    def takes(self) -> Dialect:
        """Standard operators of exactly this opset, in the file format that came with it."""
        ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        return Dialect(max_opset=self.opset, max_ir=ir_version, min_opset=self.opset)

    @property
    def wants(self) -> str:
        """The canonical graph, in the type asked for, with the operators that the opset has."""
        cast = _CASTS.get(self.dtype, "")
        return f"clean,raise_ops,{cast}lower_opset={self.opset}"

    def stage_name(self) -> str:
        """``onnx17``, ``onnx17_fp32``."""
        usual = [f"onnx{self.opset}", *([self.dtype] if self.dtype else [])]
        return self.called("_".join(usual))

    def lowering_versions(self) -> dict[str, str]:
        """What runs the graph decides nothing in it."""
        return {}

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Load it with ONNX Runtime's CPU, which stands for whatever will read it."""
        self.check_available()
        from sdopt.targets._ort_session import OrtSession

        return OrtSession(path, optimize=optimize)
