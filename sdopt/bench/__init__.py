"""How fast, and in how much memory: several stages and targets side by side in one run."""

from sdopt.bench.benching import bench
from sdopt.bench.report import BenchReport

__all__ = ["BenchReport", "bench"]
