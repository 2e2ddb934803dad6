"""``tpu``: .bmodel files for Sophgo's chips, made by tpu_mlir in an environment of its own."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from sdopt import modelfile, recorded
from sdopt.companions import PLAN_KEY
from sdopt.errors import BuildError, MissingDependencyError, UsageError
from sdopt.manifest import RECORD_KEY, StageRecord, Step
from sdopt.passes.base import Role
from sdopt.session import Session
from sdopt.targets import _tpu_build, _tpu_tools
from sdopt.targets._tpu_build import Settings, samples_of
from sdopt.targets._tpu_names import FOLDER, file_of, network_of, quantize_of
from sdopt.targets._tpu_request import described, shapes_of, write_samples
from sdopt.targets.base import Dialect, Order, Target
from sdopt.tolerance import Numerics

CHIPS = ("bm1684x", "bm1688", "bm1690", "cv186x")

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Tpu(Target):
    """Sophgo's .bmodel for BM1684X and its kin, several fixed sizes in one file.

    Options: ``chip`` (bm1684x, bm1688, bm1690, cv186x); ``cores`` of it for one inference;
    ``dtype`` of the denoiser: fp16, bf16, fp32, w8, w4, or int8 with ``data``, a folder that
    ``sdopt record`` made (the text encoder stays fp32, the VAE bf16); ``guidance=false`` for
    a denoiser of single batch; ``python`` of the compiler's environment.
    """

    chip: str = "bm1684x"
    dtype: Literal["", "fp32", "fp16", "bf16", "int8", "w8", "w4"] = ""
    cores: int = 1
    guidance: bool = True
    data: str = ""
    python: str = ""

    dialect: ClassVar[Dialect] = Dialect(
        min_opset=13,
        max_opset=18,
        max_ir=9,
        refused=dict.fromkeys(
            ("Attention", "Gelu", "GroupNormalization", "RMSNormalization", "RotaryEmbedding"),
            "the frontend of tpu_mlir 1.30.2 does not know it; it fuses the parts itself",
        ),
    )
    packages: ClassVar[Mapping[str, str]] = {}
    extra: ClassVar[str] = ""
    compiled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chip not in CHIPS:
            raise ValueError(f"chip must be one of {', '.join(CHIPS)}, not {self.chip!r}")
        if self.cores < 1:
            raise ValueError("cores must be 1 or more")
        if (self.dtype == "int8") != bool(self.data):
            raise ValueError(
                "int8 is calibrated with recorded data: write dtype=int8:data=FOLDER, after "
                "sdopt record BUNDLE --prompts FILE --steps N"
            )

    @property
    def wants(self) -> str:
        """Decomposed operators of an older opset in fp32: the compiler itself picks the types."""
        return (
            "clean,raise_ops,pad_align=crop,cast_fp32,lower_attention,lower_opset=17,lift_scalars"
        )

    def stage_name(self) -> str:
        """``tpu``: chips and types differ in what is compiled of the graph, not in the graph."""
        return self.called("tpu")

    def deciding(self) -> str:
        """The target without the place of its compiler, with what the recorded data holds."""
        data = recorded.index_digest(self.data) if self.data else ""
        return str(dataclasses.replace(self, python="", data=data))

    def artifact_name(self, order: Order) -> str:
        """The name that Sophgo's runtimes look for: ``sdv15_unet_multisize.bmodel``."""
        return file_of(order.family, order.role, order.component)

    def artifact_path(self, order: Order) -> Path:
        """``bmodel/bm1684x_fp16/sdv15_unet_multisize.bmodel`` in the bundle."""
        return order.lowered.parent.parent / FOLDER / self.folder() / self.artifact_name(order)

    def folder(self) -> str:
        """The folder of all bmodels that these options make: ``bm1684x_fp16``."""
        usual = f"{self.chip}_{self.dtype or 'fp16'}"
        return f"{usual}_{self.stage_name()}" if self.stage else usual

    def settings(self, order: Order, samples: int = 0) -> Settings:
        """What a component is compiled to."""
        network = network_of(order.family, order.role, order.component)
        return Settings(
            network, self.chip, quantize_of(order.role, self.dtype), self.cores, samples
        )

    def check_available(self) -> None:
        """See that tpu_mlir's environment is there.

        Raises:
            MissingDependencyError: with the command that makes it.
        """
        _tpu_tools.find(self.python)

    def versions(self) -> dict[str, str]:
        """The compiler's version.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return {"tpu_mlir": _tpu_tools.find(self.python).version}

    def compiler(self) -> Mapping[str, str]:
        """The compiler's version; empty where it is not installed."""
        try:
            return self.versions()
        except MissingDependencyError:
            return {}

    def check_legal(self, model: ir.Model) -> None:
        """See that a lowered graph is in the dialect, and in single precision.

        Raises:
            BuildError: naming the first node that is not, or the weight that is in half precision.
        """
        weights = (value.const_value for value in modelfile.initializers(model))
        half = next((one for one in weights if one is not None and one.dtype in _HALVES), None)
        if half is not None:
            raise BuildError(
                "tpu takes graphs in single precision",
                why=f"the weight {half.name} is a {str(half.dtype).lower()}; the compiler itself "
                "turns fp32 into the type that is asked for",
                hint="cast_fp32 widens it: sdopt build --target tpu applies it",
            )
        super().check_legal(model)

    def check(self, order: Order) -> list[str]:
        """Let tpu_mlir's frontend read the lowered graph at its largest size, if it is there."""
        shapes = shapes_of(order, self.guidance)
        try:
            tools = _tpu_tools.find(self.python)
        except MissingDependencyError as error:
            return [f"{order.component}: in the dialect; no frontend is installed ({error.hint})"]
        step = _tpu_build.parses(
            str(order.lowered.absolute()),
            _tpu_build.largest_first(shapes)[0],
            self.settings(order),
        )
        with tempfile.TemporaryDirectory(prefix="sdopt-tpu-") as folder:
            _tpu_build.run(tools, [step], Path(folder), order.progress)
        return [f"{order.component}: the frontend of tpu_mlir {tools.version} takes it"]

    def compile(self, order: Order, made: Path) -> dict[str, Any]:
        """Transform and deploy every size, combine them, and see what is in the result."""
        model = self._main(order)
        shapes = _tpu_build.largest_first(shapes_of(order, self.guidance))
        tools = _tpu_tools.find(self.python)
        folder = made.parent.absolute() / "work"
        folder.mkdir()
        settings = self.settings(order)
        if settings.quantize == "INT8":
            recording = recorded.open_recording(self.data)
            counts = [
                write_samples(recording, one, folder / samples_of(index), order.component)
                for index, one in enumerate(shapes)
            ]
            settings = self.settings(order, min(counts))
        graph = str(order.lowered.absolute())
        _tpu_build.run(
            tools,
            _tpu_build.steps(graph, str(made.absolute()), shapes, settings),
            folder,
            order.progress,
        )
        stages = _tpu_build.stages(tools, made.absolute(), folder)
        outputs = [value.name or "" for value in model.graph.outputs]
        _tpu_build.check_stages(stages, shapes, outputs, order.component)
        return {
            "target": self.deciding(),
            "component": order.component,
            "network": settings.network,
            "quantize": settings.quantize,
            "samples": settings.samples,
            "inputs": described(model.graph.inputs, shapes),
            "outputs": described(model.graph.outputs, []),
            "sizes": [{name: list(dims) for name, dims in one.items()} for one in shapes],
            "names": list(stages[0].outputs),
            "simulated": _computes(model, settings.quantize, self.dtype),
        }

    def commands(self, orders: Sequence[Order]) -> list[str]:
        """Lines for a machine where tpu_mlir's own commands are in the PATH.

        Raises:
            UsageError: a type that is calibrated, for which samples are prepared here.
        """
        lines = list(_tpu_tools.ADVICE)
        for order in orders:
            self._main(order)
            settings = self.settings(order)
            if settings.quantize == "INT8":
                raise UsageError(
                    "int8 cannot be built from commands alone",
                    where=order.component,
                    why="the recorded samples are brought into the compiler's form while building",
                    hint="build where tpu_mlir is: make tpu-env; or emit w8, which needs no data",
                )
            work, name = f"build-tpu/{order.component}", self.artifact_name(order)
            graph = f"../../{order.lowered.parent.name}/{order.lowered.name}"
            shapes = shapes_of(order, self.guidance)
            lines.append(f"mkdir -p {work} {FOLDER}/{self.folder()}")
            steps = _tpu_build.steps(graph, name, shapes, settings)
            lines += [f"(cd {work} && {step.line()})" for step in steps]
            lines.append(f"mv {work}/{name} {FOLDER}/{self.folder()}/{name}")
        return lines

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Open a .bmodel, or the one that was built of a lowered graph, on Sophgo's simulator.

        Raises:
            MissingDependencyError: tpu_mlir is not installed.
            UsageError: nothing was built of that graph with these options.
            BundleError: the bmodel's record is missing.
        """
        from sdopt.targets._tpu_session import BmodelSession

        tools = _tpu_tools.find(self.python)
        if path.suffix == ".bmodel":
            return BmodelSession(path, tools)
        text = modelfile.metadata(path).get(RECORD_KEY)
        record = StageRecord.loads(text, str(path)) if text else None
        folder = path.parent.parent / FOLDER / self.folder()
        made = record and folder / file_of(record.family, Role(record.role), record.component)
        if not made or not made.is_file():
            raise UsageError(
                "nothing was built of this graph for tpu",
                where=str(path),
                hint=f"sdopt build BUNDLE --target {self}",
            )
        return BmodelSession(made, tools)

    def _main(self, order: Order) -> ir.Model:
        """The lowered graph, known to be all of its component.

        Raises:
            BuildError: it has companions.
        """
        model = modelfile.load(order.lowered)
        if PLAN_KEY in model.metadata_props:
            raise BuildError(
                f"{order.component} has companion graphs, and a bmodel is one graph",
                where=str(order.lowered),
                hint="build from a stage without hoist and deep_cache: --from model",
            )
        return model


def _computes(model: ir.Model, quantize: str, dtype: str) -> dict[str, Any]:
    """What a comparison has to know of a bmodel: where it came from, and what it computes in."""
    text = model.metadata_props.get(RECORD_KEY)
    record = StageRecord.loads(text, "") if text else None
    history = (
        [dataclasses.asdict(step) for step in record.history if step.changed] if record else []
    )
    if quantize not in _FLOATS:
        lossy = Step(f"tpu:dtype={dtype}", Numerics.LOSSY.value)
        history.append(dataclasses.asdict(lossy))
    return {
        "origin": record.origin if record else None,
        "history": history,
        "dtypes": [_FLOATS.get(quantize, "float16")],
    }
