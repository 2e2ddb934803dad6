"""Images of many prompts by several stages, and how well they show what was asked for."""

from sdopt.evaluating.evaluation import evaluate
from sdopt.evaluating.results import Evaluation

__all__ = ["Evaluation", "evaluate"]
