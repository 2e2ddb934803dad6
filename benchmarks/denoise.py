"""One denoising step of Stable Diffusion 1.5 on a CUDA card: torch beside what sdopt makes of it.

Every variant runs in this one process on the same seeded inputs; weights are random (they change
no timing, and hide overflow in fp16). The time is the median over synchronised launches, inputs
and outputs on the card; relerr is the relative L2 distance from torch in fp32.

    python benchmarks/denoise.py --work /tmp/denoise
    python benchmarks/denoise.py --variants eager,graph,compile,ort --batch 2 --latent 64x64

The bundle is exported once into ``--work`` and kept. Needs torch with CUDA, diffusers and
onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from anywhere

from benchmarks.make_checkpoint import write_checkpoint  # noqa: E402

TOKENS, WIDTH = 77, 768
TIMESTEP = 501

_FUSED = "clean,cast_fp16,flash_attention=ort,lower_attention"

_LAST = "fuse_shared_linears,fuse_geglu,lower_channels_last,fuse_skip_norm"

LADDER: dict[str, str] = {
    "raw": "clean,cast_fp16",
    "attention": _FUSED,
    "nhwc": f"{_FUSED},lower_channels_last",
    "geglu": f"{_FUSED},fuse_geglu,lower_channels_last",
    "skip": f"{_FUSED},fuse_geglu,lower_channels_last,fuse_skip_norm",
    "shared": f"{_FUSED},{_LAST}",
    "tome": "clean,tome=5,cast_fp16,lower_token_merging,flash_attention=ort,lower_attention,"
    + _LAST,
    "tome-as-onnx": f"clean,tome=5,cast_fp16,flash_attention=ort,lower_attention,{_LAST}",
}
"""Variants of the graph, each a pipeline over the exported one."""

LONG = ("autotune", "ort-tome", "ort-tome-as-onnx")
"""What takes minutes, or merges tokens and so computes something else: only when asked for."""


@dataclasses.dataclass
class Row:
    """One variant: median milliseconds, relative L2 from fp32, seconds to set up."""

    name: str
    ms: float
    relerr: float
    setup_s: float
    note: str = ""


class Bench:
    """The inputs, the reference, and how each variant is made."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.torch = torch
        self.work: Path = options.work
        self.count: int = options.count
        self.kernels: int = options.profile
        self.batch: int = options.batch
        self.height, self.width = map(int, options.latent.split("x"))
        rng = np.random.default_rng(0)
        self.feeds = {
            "sample": rng.standard_normal((self.batch, 4, self.height, self.width), np.float32),
            "timestep": np.array(TIMESTEP, np.float32),
            "encoder_hidden_states": rng.standard_normal((self.batch, TOKENS, WIDTH), np.float32),
        }
        self.checkpoint = self.work / "sd15-random"
        self.bundle = self.work / "bundle"
        self.wanted = np.empty(0)

    def prepare(self) -> None:
        """Make the checkpoint, the bundle, and the answer in fp32."""
        if not (self.checkpoint / "unet" / "config.json").is_file():
            write_checkpoint(self.checkpoint, "sd15", "fp32", ["unet"])
        if not (self.bundle / "unet" / "model.onnx").is_file():
            from sdopt import api

            api.export(str(self.checkpoint), self.bundle, components=["unet"])
        self.torch.backends.cuda.matmul.allow_tf32 = False
        self.torch.backends.cudnn.allow_tf32 = False
        unet = self.unet("float32")
        with self.torch.no_grad():
            self.wanted = unet(*self.tensors("float32"), return_dict=False)[0].cpu().numpy()
        del unet
        self.torch.cuda.empty_cache()

    def unet(self, dtype: str) -> Any:
        """Diffusers' own model on the card."""
        from diffusers import UNet2DConditionModel

        kind = getattr(self.torch, dtype)
        made = UNet2DConditionModel.from_pretrained(self.checkpoint / "unet", torch_dtype=kind)
        return made.to("cuda").eval().requires_grad_(False)

    def tensors(self, dtype: str) -> list[Any]:
        """The inputs on the card."""
        kind = getattr(self.torch, dtype)
        return [self.torch.from_numpy(array).to("cuda", kind) for array in self.feeds.values()]

    def time(self, launch: Callable[[], Any]) -> float:
        """Median milliseconds of a launch that is waited for."""
        for _ in range(5):
            launch()
        self.torch.cuda.synchronize()
        taken = []
        for _ in range(self.count):
            start = time.perf_counter()
            launch()
            self.torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
        if self.kernels:
            self.profile(launch)
        return statistics.median(taken)

    def profile(self, launch: Callable[[], Any]) -> None:
        """Print the kernels that a launch spends most time in, onnxruntime's too."""
        activities = [self.torch.profiler.ProfilerActivity.CUDA]
        with self.torch.profiler.profile(activities=activities) as found:
            launch()
            self.torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        for row in rows[: self.kernels]:
            took = row.self_device_time_total / 1e3
            print(f"    {took:7.3f} ms {row.count:4} x {row.key[:90]}", flush=True)

    def distance(self, found: np.ndarray) -> float:
        """Relative L2 from the answer in fp32."""
        wide = found.astype(np.float64)
        return float(np.linalg.norm(wide - self.wanted) / np.linalg.norm(self.wanted))

    def eager(self, *, graph: bool) -> Row:
        """Torch in fp16, channels last, with or without a CUDA graph around the step."""
        start, torch = time.perf_counter(), self.torch
        unet = self.unet("float16").to(memory_format=torch.channels_last)
        inputs = self.tensors("float16")
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)

        def step() -> Any:
            with torch.no_grad():
                return unet(*inputs, return_dict=False)[0]

        out, launch = step(), step
        if graph:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                out = step()
            launch = captured.replay
            launch()
        setup = time.perf_counter() - start
        name = "torch fp16 channels_last" + (", CUDA graph" if graph else "")
        torch.cuda.synchronize()
        found = out.float().cpu().numpy()
        return Row(name, self.time(launch), self.distance(found), setup)

    def compiled(self, mode: str) -> Row:
        """torch.compile of the same."""
        start, torch = time.perf_counter(), self.torch
        unet = self.unet("float16").to(memory_format=torch.channels_last)
        inputs = self.tensors("float16")
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
        fast = torch.compile(unet, mode=mode, fullgraph=True, dynamic=False)

        def step() -> Any:
            with torch.no_grad():
                return fast(*inputs, return_dict=False)[0]

        found = step().float().cpu().numpy()
        setup = time.perf_counter() - start
        return Row(f"torch.compile {mode}", self.time(step), self.distance(found), setup)

    def ort(self, name: str, passes: str, **session: Any) -> Row:
        """A pipeline over the exported graph, on onnxruntime's CUDA provider."""
        from sdopt import api
        from sdopt.targets._ort_cuda_session import OrtCudaSession

        stage = "bench_" + name.split(",")[0].replace(" ", "_")
        api.optimize(self.bundle, passes, components=["unet"], stage=stage)
        start = time.perf_counter()
        opened = OrtCudaSession(
            self.bundle / "unet" / f"{stage}.onnx",
            free_dims={
                "batch_size": self.batch,
                "height": self.height,
                "width": self.width,
                "sequence_length": TOKENS,
            },
            **session,
        )
        arrays = {key: self.feeds[key].astype(port.dtype) for key, port in opened.inputs.items()}
        found = opened.run(arrays)["out_sample"]
        setup = time.perf_counter() - start
        bound = opened.bind(arrays)
        ms = self.time(lambda: opened.launch(bound))
        found = opened.run(arrays)["out_sample"]
        return Row(f"ort {name}", ms, self.distance(found), setup)

    def variants(self, extra: list[str]) -> dict[str, Callable[[], Row]]:
        """Every variant by its word; ``extra`` are texts like ``NAME:PASSES@OPTION=VALUE``."""
        made: dict[str, Callable[[], Row]] = {
            "eager": lambda: self.eager(graph=False),
            "graph": lambda: self.eager(graph=True),
            "compile": lambda: self.compiled("reduce-overhead"),
            "autotune": lambda: self.compiled("max-autotune"),
        }
        for name, passes in LADDER.items():
            made[f"ort-{name}"] = lambda n=name, p=passes: self.ort(n, p)
        for text in extra:
            name, _, rest = text.partition(":")
            passes, *given = rest.split("@")
            chosen = dict(one.split("=", 1) for one in given)
            passes = LADDER.get(passes, passes)
            made[name] = lambda n=name, p=passes, c=chosen: self.ort(n, p, provider_options=c)
        return made


def main() -> None:
    """Measure what the command line names and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/denoise"))
    parser.add_argument("--variants", help="comma-separated; all but autotune and tome by default")
    parser.add_argument(
        "--ort",
        action="append",
        default=[],
        metavar="NAME:PASSES[@OPTION=VALUE...]",
        help="one more variant: passes, or a rung's word, and options of the CUDA provider",
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latent", default="64x64", help="HEIGHTxWIDTH")
    parser.add_argument("--count", type=int, default=50, help="launches of each")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="list the N longest kernels of each"
    )
    options = parser.parse_args()
    bench = Bench(options)
    known = bench.variants(options.ort)
    names = (
        options.variants.split(",") if options.variants else [n for n in known if n not in LONG]
    )
    bench.prepare()
    rows = []
    print(f"{bench.torch.cuda.get_device_name()}, batch {bench.batch}, latent {options.latent}")
    for name in names:
        row = known[name]()
        rows.append(row)
        print(
            f"{row.name:44} {row.ms:8.2f} ms  {row.relerr:.4f}  {row.setup_s:6.1f} s", flush=True
        )
        bench.torch.cuda.empty_cache()
    report = {
        "card": bench.torch.cuda.get_device_name(),
        "rows": [dataclasses.asdict(r) for r in rows],
    }
    (bench.work / "denoise.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
