"""Prompts, data and yardstick of the digits model; importable without torch.

The data are scikit-learn's handwritten digits: 1797 grey images of 8x8 cells with
ink from 0 to 16.  A picture of a digit is white ink on black, drawn so that the mean over
each cell gives the 8x8 numbers back: ``to_8x8(draw(digit))`` is close to ``digit``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {word}" for word in WORDS)

# The settings the quality in README.md is measured with.
STEPS = 10
GUIDANCE = 2.0
SEED = 0
SIZE = 128

CAPTIONS = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "a handwritten digit {word}",
    "the digit {numeral} written by hand",
    "the digit {word} written by hand",
    "the number {word} written by hand",
    "the number {numeral} in handwriting",
    "the number {word} in white ink on black",
    "a photo of a handwritten {word}",
    "a photo of the digit {numeral}",
    "a drawing of the number {word}",
    "someone wrote the number {numeral}",
    "handwritten digit {numeral}",
    "the digit {word}",
    "number {numeral}",
    "a {word}",
    "{word}",
    "{numeral}",
)

_CELLS = 8
_INK = 16.0


@dataclass(frozen=True)
class Data:
    """The real digits: features of shape (n, 8, 8) with ink 0..16, and their labels."""

    train_x: np.ndarray
    train_y: np.ndarray
    held_x: np.ndarray
    held_y: np.ndarray


def load_data() -> Data:
    """Return the digits, split the same way every time: 1347 to train on, 450 held out."""
    raw = load_digits()
    x, y = raw.images.astype(np.float32), raw.target.astype(np.int64)
    train, held = train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    return Data(x[train], y[train], x[held], y[held])


def captions(digit: int) -> list[str]:
    """Return every caption that the training uses for one digit."""
    return [text.format(word=WORDS[digit], numeral=digit) for text in CAPTIONS]


def _bicubic(size: int) -> np.ndarray:
    """Return the (size, 8) matrix of bicubic interpolation with repeated borders."""
    centres = (np.arange(size) + 0.5) * _CELLS / size - 0.5
    base = np.floor(centres).astype(int)
    matrix = np.zeros((size, _CELLS))
    a = -0.75
    for tap in range(-1, 3):
        d = np.abs(centres - base - tap)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        cell = np.clip(base + tap, 0, _CELLS - 1)
        np.add.at(matrix, (np.arange(size), cell), np.where(d <= 1, near, far))
    return matrix


def sharpen(x: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Return control points whose bicubic picture has about the cell means ``x``.

    Plain bicubic enlargement blurs: averaging it over the cells again would lose a third
    of the variance between digits.  A few fixed-point rounds win most of it back.
    """
    up = _bicubic(32)
    points = x.astype(np.float64)
    for _ in range(rounds):
        picture = np.clip(up @ points @ up.T, 0, _INK)
        points = points + x - picture.reshape(-1, _CELLS, 4, _CELLS, 4).mean((2, 4))
    return points.astype(np.float32)


def draw(x: np.ndarray, size: int = SIZE) -> list[Image.Image]:
    """Draw digits of shape (n, 8, 8) as square RGB pictures, smoothly enlarged."""
    up = _bicubic(size)
    ink = np.clip(up @ sharpen(x) @ up.T, 0, _INK)
    grey = np.round(ink * 255 / _INK).astype(np.uint8)
    return [Image.fromarray(picture).convert("RGB") for picture in grey]


def to_8x8(images: Iterable[Image.Image | np.ndarray]) -> np.ndarray:
    """Return the cell means of pictures as (n, 8, 8) features from 0 to 16.

    Takes PIL images or uint8 arrays of shape (h, w) or (h, w, channels).  A picture that is not
    square holds its digit in the central square.
    """
    rows = []
    for image in images:
        pixels = np.asarray(image)
        grey = pixels.mean(-1) if pixels.ndim == 3 else pixels
        side = min(grey.shape)
        top, left = (grey.shape[0] - side) // 2, (grey.shape[1] - side) // 2
        square = Image.fromarray(grey[top : top + side, left : left + side].astype(np.float32))
        cells = square.resize((_CELLS, _CELLS), Image.Resampling.BOX)
        rows.append(np.asarray(cells) * (_INK / 255))
    return np.stack(rows).astype(np.float32)


def train_classifier() -> tuple[SVC, float]:
    """Fit the judge on the real train digits; return it and its held-out accuracy."""
    data = load_data()
    judge = SVC(C=10.0, gamma=0.001).fit(data.train_x.reshape(-1, 64), data.train_y)
    return judge, float(judge.score(data.held_x.reshape(-1, 64), data.held_y))


@dataclass(frozen=True)
class Score:
    """How good generated digits are.

    ``accuracy`` is the share of images that the judge takes for the digit asked for.
    ``variance_ratio`` has, for each digit, the mean pixel variance within the class of the
    generated images over that of the held-out real ones, at 8x8 (nan without images).
    ``novelty`` is the median distance of a generated image to its nearest train digit over
    the same median of the held-out digits: near 0 for copies, 1 for images as new as those.
    """

    images: int
    accuracy: float
    variance_ratio: tuple[float, ...]
    novelty: float

    @property
    def least_variance_ratio(self) -> float:
        """The variance ratio of the digit that varies least."""
        return float(np.nanmin(self.variance_ratio))

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers, rounded, ready for JSON."""
        numbers = asdict(self)
        numbers["accuracy"] = round(self.accuracy, 4)
        numbers["variance_ratio"] = [round(ratio, 3) for ratio in self.variance_ratio]
        numbers["least_variance_ratio"] = round(self.least_variance_ratio, 3)
        numbers["novelty"] = round(self.novelty, 3)
        return numbers


def _spread(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return for each digit the mean over the pixels of the variance within the class."""
    return np.array([x[y == d].var(0).mean() if (y == d).any() else np.nan for d in range(10)])


def _nearest(x: np.ndarray, others: np.ndarray) -> float:
    """Return the median distance of ``x`` to the nearest of ``others``."""
    a, b = x.reshape(len(x), -1), others.reshape(len(others), -1)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.median(np.sqrt(np.maximum(squares.min(1), 0))))


def score(
    images: Sequence[Image.Image | np.ndarray], labels: Sequence[int], classifier: SVC
) -> Score:
    """Judge generated images; ``labels`` are the digits that were asked for."""
    data = load_data()
    x, y = to_8x8(images), np.asarray(labels)
    ratio = _spread(x, y) / _spread(data.held_x, data.held_y)
    return Score(
        images=len(y),
        accuracy=float(classifier.score(x.reshape(-1, 64), y)),
        variance_ratio=tuple(float(r) for r in ratio),
        novelty=_nearest(x, data.train_x) / _nearest(data.held_x, data.train_x),
    )
