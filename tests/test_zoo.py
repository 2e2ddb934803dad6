"""onnx's own backend models through every pass that keeps the result; counts as docs/zoo.md says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline
from sdopt.tolerance import Numerics
from tests import zoo

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"


def test_every_preset_without_a_lossy_pass_is_tried() -> None:
    kept = [
        f"@{name}"
        for name in PRESETS
        if all(one.exactness() is not Numerics.LOSSY for one in Pipeline.parse(f"@{name}").passes)
    ]
    assert set(kept) <= set(zoo.SPECS)


@pytest.mark.parametrize("index", range(zoo.CHUNKS))
def test_no_crash_and_no_changed_result(index: int, tmp_path: Path) -> None:
    found = list(zoo.outcomes(zoo.chunk(index), zoo.SPECS, tmp_path))
    wrong = [f"{one.case.name} {one.spec}: {one.error}" for one in found if one.error]
    assert not wrong, "\n".join(wrong)
    assert Counter(one.spec for one in found).keys() == set(zoo.SPECS)


def test_the_page_counts_what_is_in_the_package() -> None:
    counts = Counter(case.category for case in zoo.cases())
    rows = [line.split("|")[1:3] for line in PAGE.read_text("utf-8").splitlines() if "|" in line]
    said = {row[0].strip(): int(row[1]) for row in rows if row[1].strip().isdecimal()}
    assert {name: said.get(name) for name in counts} == dict(counts)
    assert said["all"] == sum(counts.values())
