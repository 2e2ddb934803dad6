"""Every shipped graph of torch's older exporter: N of N raised, and the same numbers."""

from __future__ import annotations

import pytest

from tests.surgery import cells, checking
from tests.surgery.cells import Cell


@pytest.mark.parametrize("cell", cells.shipped("torchscript"), ids=str)
def test_raised_whole_with_equal_outputs(cell: Cell) -> None:
    checking.check(cell)
