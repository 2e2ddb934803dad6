"""What ``trt`` and ``trt_rtx`` have in common: dialect, lowering, building, checking."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from sdopt import graph, modelfile, spec
from sdopt.errors import BuildError, UsageError
from sdopt.passes.base import Role
from sdopt.session import Session
from sdopt.targets._trt_build import Builder, Settings, attentions
from sdopt.targets.base import Dialect, Order, Target

Dtype = Literal["", "fp32", "fp16", "bf16", "int8", "fp8"]

_NOT_PARSED = "the ONNX parser has no importer for it"

# Read off TensorRT-RTX 1.7's parser, which takes any opset up to 26 and any of these versions.
DIALECT = Dialect(
    max_opset=26,
    max_ir=14,
    domains=frozenset(),
    refused={
        "NonZero": "its result has a size that no profile can give",
        "Compress": _NOT_PARSED,
        "Multinomial": _NOT_PARSED,
        "DFT": _NOT_PARSED,
        "BitShift": _NOT_PARSED,
        "BitwiseAnd": _NOT_PARSED,
        "BitwiseOr": _NOT_PARSED,
        "BitwiseXor": _NOT_PARSED,
        "BitwiseNot": _NOT_PARSED,
    },
)

_CASTS = {"fp16": "cast_fp16", "bf16": "cast_bf16", "int8": "cast_fp16", "fp8": "cast_fp16"}
"""Precision lives in the graph: TensorRT 11 has no flag for it, and 10 is used strongly typed."""

_QUANTIZED = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True)
class TensorRtTarget(Target):
    """An engine of either library; the options are documented on the targets themselves."""

    dtype: Dtype = ""
    workspace: int = 0
    level: int = -1
    version_compatible: bool = False
    strip: bool = False
    refit: bool = False
    cache: str = ""
    data: str = ""

    dialect: ClassVar[Dialect] = DIALECT
    compiled: ClassVar[bool] = True
    module: ClassVar[str]

    def __post_init__(self) -> None:
        if not -1 <= self.level <= 5:
            raise ValueError("level must be 0 to 5")
        if self.workspace < 0:
            raise ValueError("workspace must be 0 or more MiB")
        if self.data and self.dtype not in _QUANTIZED:
            raise ValueError("data calibrates dtype=int8 and dtype=fp8")

    @property
    def wants(self) -> str:
        """The cast that the type asks for, and attention as the parser fuses it."""
        cast = f"{_CASTS[self.dtype]}," if self.dtype in _CASTS else ""
        lowered = f"clean,raise_ops,{cast}flash_attention=trt"
        if not self.data:
            return lowered
        return f"{lowered},{spec.Item('quantize', (self.dtype,), (('data', (self.data,)),))}"

    def stage_name(self) -> str:
        """``trt_fp16``: the library's own word and the type."""
        return self.called("_".join([self.name(), *([self.dtype] if self.dtype else [])]))

    def artifact_name(self, order: Order) -> str:
        """One engine for all profiles."""
        return f"{self.stage_name()}.plan"

    def compiler(self) -> Mapping[str, str]:
        """The library's version, and the card where the engine is made for that one."""
        found = {p: metadata.version(p) for p in self.packages.values() if _installed(p)}
        return found | ({"gpu": gpu} if found and (gpu := self.card()) else {})

    def cuda_device(self) -> int:
        """The first card: ``open`` takes that."""
        return 0

    def card(self) -> str:
        """The card that the engine is made for, if that is the machine's own."""
        return ""

    def library(self) -> Any:
        """The imported module.

        Raises:
            MissingDependencyError: it is not installed.
        """
        self.check_available()
        return importlib.import_module(self.module)

    def check(self, order: Order) -> list[str]:
        """Parse the lowered graph with whichever of the two libraries is installed here."""
        for module in dict.fromkeys((self.module, "tensorrt", "tensorrt_rtx")):
            if importlib.util.find_spec(module) is None:
                continue
            trt = importlib.import_module(module)
            network = Builder(trt).parse(order.lowered)
            layers = network.num_layers
            return [f"{order.component}: {module} {trt.__version__} parses it ({layers} layers)"]
        return [
            f"{order.component}: in the dialect; no parser is installed (pip install "
            '"sdopt[trt-rtx]" brings one that needs no GPU)'
        ]

    def compile(self, order: Order, made: Path) -> dict[str, Any]:
        """Parse and build; see ``Target.compile``."""
        self._check_types(order)
        builder = Builder(self.library())
        network = builder.parse(order.lowered)
        plan = builder.build(network, order.profiles, self.settings(), order.progress)
        made.write_bytes(plan)
        layers = builder.log.layers()
        found = sum(
            node.op_type in ("Attention", "Softmax")
            for node in graph.nodes(modelfile.load(order.lowered))
        )
        return {
            "layers": len(layers),
            "attentions": found,
            "attentions_fused": attentions(builder.log),
            "profiles": [
                {name: [list(extent) for extent in axes] for name, axes in one.items()}
                for one in order.profiles
            ],
        }

    def settings(self) -> Settings:
        """The builder's settings."""
        flags = [
            flag
            for flag, on in (
                ("VERSION_COMPATIBLE", self.version_compatible),
                ("STRIP_PLAN", self.strip),
                ("REFIT", self.refit),
            )
            if on
        ]
        return Settings(
            workspace_bytes=self.workspace << 20,
            level=self.level if self.level >= 0 else None,
            flags=flags,
            timing_cache=Path(self.cache) if self.cache else None,
        )

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """The engine beside a lowered graph, or an engine's own file, on the first card.

        ``optimize`` says nothing here: an engine is what it was built to be.

        Raises:
            UsageError: there is no engine yet.
            MissingDependencyError: the library or CUDA's bindings are not installed.
            BuildError: there is no card, or the engine was made for another one.
        """
        return self.open_adapted(path, {}, optimize=optimize)

    def open_adapted(
        self, path: Path, weights: Mapping[str, ir.TensorProtocol], *, optimize: bool = True
    ) -> Session:
        """The engine, refitted with ``weights``: initializers of the lowered graph at ``path``.

        Raises:
            UsageError: as ``open``, and where the engine was built without ``refit``.
            BuildError: as ``open``, and where the library cannot replace a weight.
        """
        plan = path if path.suffix == ".plan" else path.with_name(f"{self.stage_name()}.plan")
        if not plan.is_file():
            raise UsageError(
                "there is no engine here",
                where=str(plan),
                hint=f"make it: sdopt build --target {self}",
            )
        from sdopt.targets._trt_session import TrtSession

        return TrtSession(plan, self.library(), weights=weights, graph=path)

    def _check_types(self, order: Order) -> None:
        """See that a quantized build has something quantized in it, in the denoiser at least.

        Raises:
            BuildError: with the pass that quantizes.
        """
        wanted = _QUANTIZED.get(self.dtype)
        if wanted is None or order.role not in (Role.DENOISER, Role.MODEL):
            return
        model = modelfile.load(order.lowered)
        stored = {
            value.const_value.dtype
            for value in modelfile.initializers(model)
            if value.const_value is not None
        }
        if wanted not in stored:
            raise BuildError(
                f"nothing in {order.component} is in {self.dtype}",
                why="precision is in the graph: the library has no flag for it",
                hint="record inputs with sdopt record, and build with :data=FOLDER, or quantize "
                f"it first: sdopt optimize --passes @fast,quantize={self.dtype}:data=FOLDER",
            )


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def commands(program: str, orders: Sequence[Order], plan: str, extra: Sequence[str]) -> list[str]:
    """A shell line for each component with the library's own command-line builder."""
    lines = []
    for order in orders:
        folder = order.lowered.parent.name
        words = [program, f"--onnx={folder}/{order.lowered.name}"]
        words += [f"--saveEngine={folder}/{plan}", *extra]
        for profile in order.profiles:
            for kind in ("low", "usual", "high"):
                sizes = ",".join(
                    f"{name}:{'x'.join(str(getattr(extent, kind)) for extent in axes)}"
                    for name, axes in profile.items()
                    if axes and not all(extent.fixed for extent in axes)
                )
                if sizes:
                    word = {"low": "minShapes", "usual": "optShapes", "high": "maxShapes"}[kind]
                    words.append(f"--{word}={sizes}")
        lines.append(" ".join(words))
    return lines
