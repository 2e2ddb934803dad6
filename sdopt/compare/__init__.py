"""Do two things compute the same? Both on the same seeded inputs, output by output."""

from sdopt.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
