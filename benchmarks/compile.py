"""Time and memory to export and optimize models of full size, beside other tools.

Everything runs in this one call, one process after the other; weights are random (they change no
timing, and hide fp16 overflow). Results go to OUT/compile.json, the table to stdout.

    python benchmarks/compile.py                             all; 24 GB memory, 25 GB disk
    python benchmarks/compile.py --only export_unet,optimize   some rows; the others are kept
    python benchmarks/compile.py --architecture sdxl         after `make optimum`
    python benchmarks/compile.py --architecture sd35-large   on a checkpoint of holes; 50 GB disk
    python benchmarks/compile.py --architecture tiny         sd15's rows in a minute, to try it out
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from anywhere

from benchmarks.compile_rows import PLANS, Places, Row  # noqa: E402
from benchmarks.measure import Measurement, machine, measure, versions  # noqa: E402

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


class Bench:
    """Where things lie, and how to make what a row needs."""

    def __init__(self, out: Path, architecture: str, timeout_seconds: float) -> None:
        self.out = out
        self.architecture = architecture
        self.timeout_seconds = timeout_seconds
        self.plan = PLANS[architecture]
        self.checkpoint = out / f"{architecture}-{self.plan.dtype}"
        self.rows = self.plan.rows(Places(out, self.checkpoint))

    def prepare(self, names: list[str]) -> None:
        """Make the checkpoint, and what these rows start from and no row of this call makes."""
        if not (self.checkpoint / "model_index.json").is_file():
            tell(f"writing {self.checkpoint}")
            # Not in this process: a child's peak memory begins with what its parent had at the
            # fork, so the one that measures stays small (no torch).
            self._must("make_checkpoint", self.plan.checkpoint(self.architecture, self.checkpoint))
        for name in names:
            before = self.rows[name].after
            if before and before not in names and not self.rows[before].result.is_file():
                self._must(before, self.rows[before].command)
            first = self.rows[name].prepared
            if first is not None and not first.result.is_file():
                tell(f"making {first.result}")
                self._must(first.name, first.command)

    def _must(self, name: str, command: tuple[str, ...]) -> None:
        done = measure(command, self.timeout_seconds, {"PYTHONPATH": str(ROOT)})
        if not done.ok:
            sys.exit(f"{name} failed, and the rest needs it: {done.message}")

    def run(self, row: Row, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Measure one row from a clean start; a failure is a result too."""
        tell(f"running {row.name}: {row.what}")
        for path in row.fresh:  # so that nothing is found up to date
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if row.tool:
            row.result.parent.mkdir(parents=True, exist_ok=True)
        if not self.plan.sparse:
            warm_cache(self.checkpoint)
        done = measure(row.command, self.timeout_seconds, {"PYTHONPATH": str(ROOT)})
        result = self._describe(row) if done.ok else {}
        if done.ok and row.writes:
            files = [path.stat() for path in row.result.parent.glob(row.writes)]
            result["bytes_written"] = sum(file.st_size for file in files)
            result["bytes_on_disk"] = sum(file.st_blocks * 512 for file in files)
            beside = known.get(row.copies, {}).get("seconds")
            if beside is not None and done.seconds > beside + 0.5:
                result["copied_bytes_per_second"] = result["bytes_on_disk"] / (
                    done.seconds - beside
                )
        tell(f"  {row_text(done, result)}")
        shown = shlex.join(row.command).replace(sys.executable, "python")
        return {
            **dataclasses.asdict(done),
            "what": row.what,
            "command": shown.replace(str(self.out), "OUT").replace(f"{ROOT}/", ""),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "result": result,
        }

    def _describe(self, row: Row) -> dict[str, Any]:
        if row.result.suffix != ".onnx":
            return {}
        command = (sys.executable, "-m", "benchmarks.tools", "describe", str(row.result))
        command += ("--unopened",) if self.plan.sparse else ()
        done = measure(command, self.timeout_seconds, {"PYTHONPATH": str(ROOT)})
        return json.loads(done.message) if done.ok else {"unreadable": done.message}


def main() -> None:
    """Read the command line, measure, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--only", help="names of rows, joined by commas")
    parser.add_argument("--architecture", choices=PLANS, default="sd15")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each row")
    parser.add_argument("--keep", action="store_true", help="keep what the other tools wrote")
    args = parser.parse_args()
    bench = Bench(args.out.resolve() / args.architecture, args.architecture, args.timeout)
    variants = bench.rows
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
        rows[name] = bench.run(variants[name], rows)
        if variants[name].tool and not args.keep:
            shutil.rmtree(variants[name].result.parent, ignore_errors=True)
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
    if result.get("refused"):
        return f"writes {result['nodes']} nodes that onnxruntime refuses: {result['refused']}"
    parts = []
    if "nodes" in result:
        parts.append(f"{result['nodes']} nodes")
        parts.append(", ".join(f"{count} {name}" for name, count in result["ops"].items()))
    sizes = result.get("weight_bytes", {})
    large = {kind: size for kind, size in sizes.items() if size >= 1e6}
    parts.append(", ".join(f"{size / 1e9:.3g} GB {kind}" for kind, size in large.items()))
    if written := result.get("bytes_written"):
        parts.append(f"{written / 1e9:.3g} GB written")
        if result["bytes_on_disk"] < written / 2:
            parts.append(f"of which {result['bytes_on_disk'] / 1e9:.2g} GB are no holes")
        elif rate := result.get("copied_bytes_per_second"):
            parts.append(f"copied at {rate / 1e6:.0f} MB/s")
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
