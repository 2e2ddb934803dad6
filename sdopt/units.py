"""Numbers with their units, as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    number = float(count)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def seconds(value: float) -> str:
    """A duration in seconds, to the millisecond where it is short."""
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"
