"""Images of many prompts by several stages, and how well they show what was asked for."""

from sdopt.evaluating.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
