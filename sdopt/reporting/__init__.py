"""One page about a whole bundle: how it was made, what that cost, what it computes and draws."""

from sdopt.reporting.writing import Options, Written, report

__all__ = ["Options", "Written", "report"]
