"""What changing the adapter of a stage costs, on ONNX Runtime's CPU.

The times of adapters in docs/design.md come from here:

    python benchmarks/make_checkpoint.py sd15 -o sd15 --dtype fp16 --component unet
    sdopt export sd15 -o bundle --component unet
    sdopt optimize bundle --passes @fast
    python benchmarks/adapters.py bundle --stage optimized --open

It writes random adapters of rank 16, one for the attentions and one for every matrix and kernel,
and computes the weights that they change, one after another; none is kept. ``--open`` also makes a
session with and without each.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sdopt import origins
from sdopt.bundle import Bundle
from sdopt.origins import Leaf
from sdopt.runtime.adapting import adapt
from sdopt.runtime.scheduled import open_stage
from sdopt.targets.ort import Ort

RANK = 16
KINDS = {"attention": (".attn1.to_", ".attn2.to_"), "everything": ("",)}
"""Name of an adapter to what the paths of its layers hold."""


def main() -> None:
    """Measure and print a line of JSON for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--stage", default="optimized")
    parser.add_argument("--component", default="unet")
    parser.add_argument("--open", action="store_true", help="also make sessions")
    given = parser.parse_args()
    for row in measure(given.bundle, given.component, given.stage, sessions=given.open):
        print(json.dumps(row), flush=True)


def measure(
    bundle: Path, component: str, stage: str, *, sessions: bool
) -> list[dict[str, float | str]]:
    """Seconds, bytes and the peak of resident memory for each kind of adapter."""
    opened = Bundle.open(bundle)
    found = opened.stage(component, stage)
    rows: list[dict[str, float | str]] = []
    if sessions:
        start = time.perf_counter()
        open_stage(Ort(), found.path)
        rows.append({"adapter": "none", "open s": round(time.perf_counter() - start, 2)})
    with tempfile.TemporaryDirectory() as folder:
        for kind, words in KINDS.items():
            file = Path(folder) / f"{kind}.safetensors"
            write(file, [one for one in leaves(opened, component) if _has(one.name, words)])
            start = time.perf_counter()
            changed = adapt(opened, {component: found}, [file]).replaced[component]
            planned, work = time.perf_counter() - start, time.process_time()
            sizes = [tensor.numpy().nbytes for g in changed.values() for tensor in g.values()]
            row: dict[str, float | str] = {
                "adapter": kind,
                "weights": len(sizes),
                "GB": round(sum(sizes) / 1e9, 3),
                "plan s": round(planned, 2),
                "compute s": round(time.perf_counter() - start - planned, 2),
                "of the CPU s": round(time.process_time() - work, 2),
                "peak RSS GB": round(peak(), 2),
            }
            if sessions:
                start = time.perf_counter()
                open_stage(Ort(), found.path, replaced=changed)
                row["open s"] = round(time.perf_counter() - start, 2)
            rows.append(row)
    return rows


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)


def leaves(bundle: Bundle, component: str) -> list[Leaf]:
    """The matrices and kernels of a component's raw stage."""
    known = origins.known(bundle.stage(component, "model").load())
    assert known is not None
    every = (one for table in known.tables for one in table.values())
    return [o for o in every if isinstance(o, Leaf) and len(o.shape) > 1 and "bias" not in o.name]


def write(file: Path, adapted: list[Leaf]) -> None:
    """A random adapter in half precision."""
    rng = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}
    for one in adapted:
        rows, *columns = one.shape
        key = "unet." + one.name.removesuffix(".weight")
        down, up = (RANK, *columns), (rows, RANK, *[1] * (len(columns) - 1))
        state[f"{key}.lora_A.weight"] = rng.standard_normal(down).astype(np.float16) / 100
        state[f"{key}.lora_B.weight"] = rng.standard_normal(up).astype(np.float16) / 100
    save_file(state, file)


def peak() -> float:
    """The process's peak of resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
