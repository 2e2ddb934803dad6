"""The digits' judge for ``sdopt eval --scorer examples/digits/scorer.py:right``, or ``:sure``."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def right(images: list[Image], prompts: list[str]) -> list[float]:
    """Return 1 where the classifier reads the digit that the prompt asks for, else 0."""
    digits, judge = _digits()
    read = judge.predict(digits.to_8x8(images).reshape(-1, 64))
    wanted = [digit_of(prompt) for prompt in prompts]
    return [float(found == asked) for found, asked in zip(read, wanted, strict=True)]


def sure(images: list[Image], prompts: list[str]) -> list[float]:
    """Return the probability that the classifier gives to the digit that the prompt asks for."""
    shares = _calibrated().predict_proba(_digits()[0].to_8x8(images).reshape(-1, 64))
    wanted = [digit_of(prompt) for prompt in prompts]
    return [float(row[asked]) for row, asked in zip(shares, wanted, strict=True)]


def digit_of(prompt: str) -> int:
    """Return the digit that a prompt names, as a word or as a numeral."""
    words = _digits()[0].WORDS
    numbers = {word: digit for digit, word in enumerate(words)}
    numbers |= {str(digit): digit for digit in range(10)}
    named = {numbers[one] for one in re.findall(r"[a-z]+|\d", prompt.lower()) if one in numbers}
    if len(named) != 1:
        raise ValueError(f"{prompt!r} names {len(named)} digits")
    return named.pop()


@functools.cache
def _calibrated() -> Any:
    """The classifier with probabilities: Platt's sigmoids, fitted on the train digits by folds."""
    from sklearn.base import clone
    from sklearn.calibration import CalibratedClassifierCV

    digits, judge = _digits()
    data = digits.load_data()
    made = CalibratedClassifierCV(clone(judge), method="sigmoid", cv=5, ensemble=False)
    return made.fit(data.train_x.reshape(-1, 64), data.train_y)


@functools.cache
def _digits() -> tuple[ModuleType, Any]:
    """The module beside this file and its classifier, whatever the import path is."""
    path = Path(__file__).with_name("digits.py")
    spec = importlib.util.spec_from_file_location("sdopt_digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their module
    spec.loader.exec_module(module)
    return module, module.train_classifier()[0]
