"""A denoising step of several stages of a bundle, side by side on ONNX Runtime's CPU.

The times of ``hoist`` and ``deep_cache`` in docs/design.md come from here:

    python benchmarks/companions.py BUNDLE optimized hoisted deep

The stages take each step in turn, on one thread; of each round the CPU time of all steps is kept,
and shown is the median over the rounds of its ratio to the first stage, with the quartiles, so
that other work on the machine disturbs it little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import numpy as np

from sdopt.bundle import Bundle
from sdopt.runtime.scheduled import open_stage
from sdopt.session import Session
from sdopt.targets.ort import Ort

TRAINED = 1000


def main() -> None:
    """Open the stages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("stages", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--size", type=int, default=16, help="height and width of the latent")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    bundle, target = Bundle.open(given.bundle), Ort(threads=1)
    sessions = {
        stage: open_stage(target, bundle.stage("unet", stage).path) for stage in given.stages
    }
    seconds = measure(sessions, given.size, given.steps, given.rounds)
    for stage, rounds in seconds.items():
        ratio = np.array(rounds) / np.array(seconds[given.stages[0]])
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        step = np.median(rounds) / given.steps * 1000
        print(f"{stage:<16} {step:7.2f} ms a step   {middle:.3f} ({low:.3f} to {high:.3f})")


def measure(
    sessions: Mapping[str, Session], size: int, steps: int, rounds: int
) -> dict[str, list[float]]:
    """CPU seconds that each session takes for all steps, round by round."""
    rng = np.random.default_rng(0)
    ports = next(iter(sessions.values())).inputs
    context = ports["encoder_hidden_states"].dims[-1]
    feeds = {
        "sample": rng.standard_normal((2, 4, size, size), np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, context), np.float32),
    }
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds):
        order = _turned(list(sessions), turn)
        spent = dict.fromkeys(sessions, 0.0)
        for moment in np.linspace(TRAINED - 1, 1, steps).round():
            timestep = np.array(moment, np.float32)
            for name in order:
                start = time.process_time()
                sessions[name].run({**feeds, "timestep": timestep})
                spent[name] += time.process_time() - start
        for name, one in spent.items():
            found[name].append(one)
    return found


def _turned(names: Sequence[str], turn: int) -> Sequence[str]:
    return names if turn % 2 else names[::-1]


if __name__ == "__main__":
    main()
