"""The rows of ``benchmarks/compile.py`` as data: each architecture's checkpoint and commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSES = "clean,fuse_qkv,pad_align,cast_fp16"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: for ``--only``.
        what: what the table calls it.
        command: what is measured.
        result: the file it leaves.
        fresh: what an earlier run left and is removed first.
        after: the row whose result it starts from.
        prepared: what else it starts from, made once and not measured.
        writes: which files beside the result are its weights, to tell how much was written.
        copies: the row that does all but the copying of the weights, to tell how fast that was.
        tool: whether it is another tool, whose result is removed once it is described.
    """

    name: str
    what: str
    command: tuple[str, ...]
    result: Path
    fresh: tuple[Path, ...] = ()
    after: str = ""
    prepared: Row | None = None
    writes: str = ""
    copies: str = ""
    tool: bool = False


@dataclass(frozen=True)
class Places:
    """The folder of the results, and the checkpoint in it."""

    out: Path
    checkpoint: Path


@dataclass(frozen=True)
class Plan:
    """What is measured of an architecture, and the checkpoint it is measured on."""

    dtype: str
    sparse: bool
    components: tuple[str, ...]
    rows: Callable[[Places], Mapping[str, Row]]

    def checkpoint(self, architecture: str, folder: Path) -> tuple[str, ...]:
        """The command that writes the checkpoint."""
        script = str(ROOT / "benchmarks" / "make_checkpoint.py")
        command = [sys.executable, script, architecture, "-o", str(folder), "--dtype", self.dtype]
        command += ["--sparse"] if self.sparse else []
        for name in self.components:
            command += ["--component", name]
        return tuple(command)


def _sdopt(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "sdopt", *map(str, arguments))


def _tool(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.tools", *map(str, arguments))


def _named(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


def _export(
    at: Places, component: str, bundle: Path, name: str, dtype: str, copies: str = ""
) -> Row:
    return Row(
        name,
        f"sdopt export, {component}, {dtype}",
        _sdopt("export", at.checkpoint, "-o", bundle, "--component", component),
        bundle / component / "model.onnx",
        fresh=(bundle,),
        writes="model*.onnx_data",
        copies=copies,
    )


def _in_place(at: Places, component: str, name: str, dtype: str) -> Row:
    result = at.checkpoint / component / "model.onnx"
    return Row(
        name,
        f"sdopt export --in-place, {component}, {dtype}",
        _sdopt("export", at.checkpoint, "--in-place", "--component", component),
        result,
        fresh=(result, at.checkpoint / "manifest.json"),
    )


def _optimize(bundle: Path, component: str, passes: str, name: str, after: str) -> Row:
    return Row(
        name,
        f"sdopt optimize --passes {passes}, {component}",
        _sdopt("optimize", bundle, "--component", component, "--force", "--passes", passes),
        bundle / component / "optimized.onnx",
        after=after,
        writes="optimized*.onnx_data",
    )


def _sd15(at: Places) -> Mapping[str, Row]:
    bundle, everything = at.out / "bundle", at.out / "bundle-all"
    start = at.out / "opset18" / "model.onnx"
    given = Row("baseline", "", _tool("baseline", at.checkpoint / "unet", start), start)

    def tool(name: str, what: str) -> Row:
        result = at.out / name / "model.onnx"
        command = _tool(name, start, result)
        return Row(name, what, command, result, (result.parent,), prepared=given, tool=True)

    return _named(
        _in_place(at, "unet", "export_in_place", "fp32"),
        _export(at, "unet", bundle, "export_unet", "fp32", "export_in_place"),
        Row(
            "export_all",
            "sdopt export, whole pipeline, fp32",
            _sdopt("export", at.checkpoint, "-o", everything),
            everything / "unet" / "model.onnx",
            fresh=(everything,),
        ),
        _optimize(bundle, "unet", PASSES, "optimize", "export_unet"),
        tool("ort", "onnxruntime.transformers optimizer (unet) + its fp16"),
        tool("onnxsim", "onnxsim"),
        tool("float16", "onnxconverter-common float16"),
    )


def _sdxl(at: Places) -> Mapping[str, Row]:
    bundle, result = at.out / "bundle", at.out / "optimum" / "model.onnx"
    python = str(ROOT / ".venv-optimum" / "bin" / "python")
    script = str(ROOT / "benchmarks" / "optimum_unet.py")
    return _named(
        _in_place(at, "unet", "export_in_place", "fp32"),
        _export(at, "unet", bundle, "export_unet", "fp32", "export_in_place"),
        _optimize(bundle, "unet", "@fast", "optimize_fast", "export_unet"),
        Row(
            "optimum",
            "optimum-onnx's exporter, UNet, fp32",
            (python, script, str(at.checkpoint), str(result)),
            result,
            fresh=(result.parent,),
            tool=True,
        ),
    )


def _sd35(at: Places) -> Mapping[str, Row]:
    bundle, cast = at.out / "bundle", at.out / "bundle-bf16"
    rows = []
    for component, word in (("transformer", ""), ("text_encoder_3", "_t5")):
        copied = _export(at, component, bundle, f"export{word}", "fp16", f"export_in_place{word}")
        result = cast / component / "model.onnx"
        rows += [
            _in_place(at, component, f"export_in_place{word}", "fp16"),
            copied,
            _optimize(
                at.checkpoint,
                component,
                "clean,fuse_qkv",
                f"optimize{word}",
                f"export_in_place{word}",
            ),
            Row(
                f"cast{word}",
                f"sdopt export --dtype bf16, {component}",
                _sdopt(
                    *("export", at.checkpoint, "-o", cast),
                    *("--component", component, "--dtype", "bf16"),
                ),
                result,
                fresh=(cast,),
                writes="model*.onnx_data",
            ),
        ]
    probe = at.out / "disk" / "zeros"
    rows.append(
        Row(
            "disk",
            "writing 16 GB of zeros and nothing else",
            _tool("zeros", probe, str(16_000_000_000)),
            probe,
            fresh=(probe.parent,),
            writes="zeros",
            tool=True,
        )
    )
    return _named(*rows)


PLANS: Mapping[str, Plan] = {
    "sd15": Plan("fp32", False, (), _sd15),
    "sdxl": Plan("fp32", False, ("unet",), _sdxl),
    "sd35-large": Plan("fp16", True, ("transformer", "text_encoder_3"), _sd35),
    "tiny": Plan("fp32", False, (), _sd15),
}
"""What can be measured; a sparse checkpoint is all holes, which no result here depends on."""
