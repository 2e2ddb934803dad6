"""Which modules must stay in float32? Ranges looked at, then bisected in real half precision."""

from sdopt.precision.choosing import choose
from sdopt.precision.report import PrecisionReport

__all__ = ["PrecisionReport", "choose"]
