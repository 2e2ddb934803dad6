"""Do two things compute the same? Both on the same inputs, output by output, layer by layer."""

from sdopt.compare.comparison import Comparison, compare
from sdopt.compare.layer_report import LayerComparison
from sdopt.compare.layers import compare_layers

__all__ = ["Comparison", "LayerComparison", "compare", "compare_layers"]
