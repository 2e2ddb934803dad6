"""Time and memory to export and optimize a full-size Stable Diffusion 1.5, beside other tools.

Everything runs in this one call, one process after the other; weights are random (they change no
timing, and hide fp16 overflow). Results go to OUT/compile.json, the table to stdout.

    python benchmarks/compile.py                             all; 24 GB memory, 25 GB disk
    python benchmarks/compile.py --only export_unet,optimize   some rows; the others are kept
    python benchmarks/compile.py --architecture tiny         the same in a minute, to try it out
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from anywhere

from benchmarks.make_checkpoint import ARCHITECTURES  # noqa: E402
from benchmarks.measure import Measurement, machine, measure, versions  # noqa: E402

PASSES = "clean,fuse_qkv,pad_align,cast_fp16"
PACKAGES = (
    "sdopt",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxsim",
    "onnxconverter-common",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: what it is called, the command, and the ONNX file it leaves."""

    name: str
    what: str
    command: tuple[str, ...]
    result: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class Bench:
    """Where things lie, and how to make what a variant needs."""

    def __init__(self, out: Path, architecture: str, timeout_seconds: float) -> None:
        self.out = out
        self.architecture = architecture
        self.timeout_seconds = timeout_seconds
        self.checkpoint = out / f"{architecture}-fp32"
        self.bundle = out / "bundle"
        self.baseline = out / "opset18" / "model.onnx"

    def variants(self) -> dict[str, Variant]:
        """The rows, in the order they run and are shown."""
        unet = self.bundle / "unet"
        everything, in_place = self.out / "bundle-all", self.checkpoint / "unet" / "model.onnx"
        rows = [
            self._sdopt(
                "export_unet",
                "sdopt export, UNet, fp32",
                ("export", self.checkpoint, "-o", self.bundle, "--component", "unet"),
                unet / "model.onnx",
            ),
            self._sdopt(
                "export_in_place",
                "sdopt export --in-place, UNet, fp32",
                ("export", self.checkpoint, "--in-place", "--component", "unet"),
                in_place,
            ),
            self._sdopt(
                "export_all",
                "sdopt export, whole pipeline, fp32",
                ("export", self.checkpoint, "-o", everything),
                everything / "unet" / "model.onnx",
            ),
            self._sdopt(
                "optimize",
                f"sdopt optimize --passes {PASSES}",
                ("optimize", self.bundle, "--component", "unet", "--force", "--passes", PASSES),
                unet / "optimized.onnx",
            ),
            self._tool("ort", "onnxruntime.transformers optimizer (unet) + its fp16"),
            self._tool("onnxsim", "onnxsim"),
            self._tool("float16", "onnxconverter-common float16"),
        ]
        return {row.name: row for row in rows}

    def _sdopt(
        self, name: str, what: str, arguments: tuple[str | Path, ...], result: Path
    ) -> Variant:
        command = (sys.executable, "-m", "sdopt", *map(str, arguments))
        return Variant(name, what, command, result)

    def _tool(self, name: str, what: str) -> Variant:
        result = self.out / name / "model.onnx"
        command = (sys.executable, "-m", "benchmarks.tools", name, str(self.baseline), str(result))
        return Variant(name, what, command, result, {"PYTHONPATH": str(ROOT)})

    def prepare(self, names: list[str]) -> None:
        """Make the checkpoint, the bundle and the opset 18 file that these variants start from."""
        if not (self.checkpoint / "model_index.json").is_file():
            tell(f"writing {self.checkpoint}")
            # Not in this process: a child's peak memory begins with what its parent had at the
            # fork, so the one that measures stays small (no torch).
            script = str(ROOT / "benchmarks" / "make_checkpoint.py")
            command = (sys.executable, script, self.architecture, "-o", str(self.checkpoint))
            self._must(Variant("make_checkpoint", "", command, self.checkpoint))
        if "optimize" in names and "export_unet" not in names and not self.bundle.is_dir():
            self._must(self.variants()["export_unet"])
        if {"ort", "onnxsim", "float16"} & set(names) and not self.baseline.is_file():
            tell("exporting at opset 18 for the other tools")
            source = str(self.checkpoint / "unet")
            tool = (
                sys.executable,
                "-m",
                "benchmarks.tools",
                "baseline",
                source,
                str(self.baseline),
            )
            self._must(Variant("baseline", "", tool, self.baseline, {"PYTHONPATH": str(ROOT)}))

    def _must(self, variant: Variant) -> None:
        done = measure(variant.command, self.timeout_seconds, variant.environment)
        if not done.ok:
            sys.exit(f"{variant.name} failed, and the rest needs it: {done.message}")

    def run(self, variant: Variant) -> dict[str, Any]:
        """Measure one variant from a clean start; a failure is a result too."""
        tell(f"running {variant.name}: {variant.what}")
        self._clear(variant)
        warm_cache(self.checkpoint)
        done = measure(variant.command, self.timeout_seconds, variant.environment)
        result = self._describe(variant) if done.ok else {}
        tell(f"  {row_text(done, result)}")
        shown = shlex.join(variant.command).replace(sys.executable, "python")
        return {
            **dataclasses.asdict(done),
            "what": variant.what,
            "command": shown.replace(str(self.out), "OUT"),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "result": result,
        }

    def _clear(self, variant: Variant) -> None:
        """Remove what an earlier run left, so that nothing is found up to date."""
        if variant.name.startswith("export_in_place"):
            for path in (variant.result, self.checkpoint / "manifest.json"):
                path.unlink(missing_ok=True)
        elif variant.name != "optimize":
            root = {"export_all": self.out / "bundle-all", "export_unet": self.bundle}
            shutil.rmtree(root.get(variant.name, variant.result.parent), ignore_errors=True)
            if not variant.name.startswith("export"):
                variant.result.parent.mkdir(parents=True)

    def _describe(self, variant: Variant) -> dict[str, Any]:
        command = (sys.executable, "-m", "benchmarks.tools", "describe", str(variant.result))
        done = measure(command, self.timeout_seconds, {"PYTHONPATH": str(ROOT)})
        return json.loads(done.message) if done.ok else {"unreadable": done.message}


def main() -> None:
    """Read the command line, measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--only", help="names of rows, joined by commas")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each row")
    parser.add_argument("--keep", action="store_true", help="keep what the other tools wrote")
    args = parser.parse_args()
    bench = Bench(args.out.resolve() / args.architecture, args.architecture, args.timeout)
    variants = bench.variants()
    names = args.only.split(",") if args.only else list(variants)
    if unknown := set(names) - set(variants):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(variants)}")
    bench.out.mkdir(parents=True, exist_ok=True)
    bench.prepare(names)
    file = bench.out / "compile.json"
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else {}
    for name in variants:
        if name not in names:
            continue
        rows[name] = bench.run(variants[name])
        if name in ("ort", "onnxsim", "float16") and not args.keep:
            shutil.rmtree(bench.out / name, ignore_errors=True)
        report = {
            "architecture": args.architecture,
            "command": shlex.join(["python", "benchmarks/compile.py", *sys.argv[1:]]),
            "machine": machine(),
            "versions": versions(*PACKAGES),
            "rows": {known: rows[known] for known in variants if known in rows},
        }
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    tell(f"written to {file}")


def table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table, with the machine and the command below."""
    lines = ["| tool | wall s | CPU s | peak RSS GB | result |", "| --- | --- | --- | --- | --- |"]
    for row in report["rows"].values():
        seconds, cpu = f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"
        peak = f"{row['peak_bytes'] / 1e9:.2f}"
        text = result_text(row["result"]) if row["ok"] else f"fails: {row['message']}"
        lines.append(f"| {row['what']} | {seconds} | {cpu} | {peak} | {escape(text)} |")
    host, packages = report["machine"], report["versions"]
    lines += [
        "",
        f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB; "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + f". `{report['command']}`",
    ]
    return "\n".join(lines)


def result_text(result: dict[str, Any]) -> str:
    """``361 nodes; 32 Attention, 61 GroupNormalization; 1.72 GB float16``."""
    if "unreadable" in result:
        return f"its result cannot be read: {result['unreadable']}"
    if result["refused"]:
        return f"writes {result['nodes']} nodes that onnxruntime refuses: {result['refused']}"
    parts = [f"{result['nodes']} nodes"]
    parts.append(", ".join(f"{count} {name}" for name, count in result["ops"].items()))
    large = {kind: size for kind, size in result["weight_bytes"].items() if size >= 1e6}
    parts.append(", ".join(f"{size / 1e9:.3g} GB {kind}" for kind, size in large.items()))
    return "; ".join(part for part in parts if part)


def row_text(done: Measurement, result: dict[str, Any]) -> str:
    """One row for the log on stderr."""
    text = result_text(result) if done.ok else f"failed: {done.message}"
    took = f"{done.seconds:.1f} s ({done.cpu_seconds:.1f} s CPU), {done.peak_bytes / 1e9:.2f} GB"
    return f"{took}, {text}"


def escape(text: str) -> str:
    """Text that stays in its cell of the table."""
    return text.replace("|", "\\|").replace("\n", " ")[:200]


def warm_cache(folder: Path) -> None:
    """Read the checkpoint once, so that no variant pays for another's cold disk."""
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            read: Callable[[int], bytes | None] = file.read
            while read(1 << 24):
                pass


def tell(text: str) -> None:
    """Say on stderr what happens; stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
