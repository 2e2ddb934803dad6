"""``python -m tests.fuzz HARNESS --seconds 60``: a harness driven by atheris, guided by coverage.

Only sdopt is instrumented. Inputs are mutated with their structure known (``mutations``), or by
libFuzzer itself every fourth time. What is found is left in the folder ``--found``; add it to
``test_found.py`` with what was done about it.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

ADDRESS_SPACE = 6 << 30
"""Bytes that the process may map: torch and onnxruntime alone take some GiB of it."""

with atheris.instrument_imports(include=["sdopt"], enable_loader_override=False):
    from tests.fuzz.harnesses import HARNESSES
    from tests.fuzz.sandbox import sandbox


def main() -> None:
    """Run one harness until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("harness", choices=HARNESSES)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="at most so many inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"))
    given = parser.parse_args()
    one = HARNESSES[given.harness]
    seeds = one.seeds()
    logging.disable(logging.CRITICAL)  # onnx-ir tells of each odd graph
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    given.found.mkdir(parents=True, exist_ok=True)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 4 == 0:
            return atheris.Mutate(data, most)
        return one.mutate(Random(seed), data)[:most]

    with sandbox(measured=False) as box, tempfile.TemporaryDirectory() as corpus:
        for index, data in enumerate(seeds):
            (Path(corpus) / f"seed{index}").write_bytes(data)
        options = [
            f"-max_total_time={given.seconds}",
            f"-runs={given.runs}",
            f"-artifact_prefix={given.found}/{given.harness}-",
            f"-seed={given.seed}",
            "-timeout=30",
            # Its limit of memory goes by the largest size that Linux tells of the process, which
            # begins with that of the one that started it; RLIMIT_AS holds this one alone.
            "-rss_limit_mb=0",
            "-max_len=100000",
            "-print_final_stats=1",
            corpus,
        ]
        atheris.Setup(
            [sys.argv[0], *options],
            lambda data: one.run(box, data),
            custom_mutator=mutate,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
