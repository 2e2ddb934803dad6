"""Sessions that speak up where a graph computes NaN or infinity, before that is drawn in black."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdopt.bundle import Bundle, Stage
from sdopt.errors import NotFiniteError
from sdopt.session import Session, Wrapped


class Finite(Wrapped):
    """A component's session whose outputs are looked at; it computes nothing else."""

    def __init__(self, session: Session, bundle: Bundle, stage: Stage) -> None:
        super().__init__(session)
        self._bundle, self._stage = bundle, stage

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session computes.

        Raises:
            NotFiniteError: an output holds NaN or infinity; names component, stage and output.
        """
        found = self.session.run(feeds)
        for name, array in found.items():
            # ml_dtypes' bfloat16 is of kind "V" to numpy, and has isfinite all the same.
            if array.dtype.kind not in "iub" and not np.isfinite(array).all():
                raise self._error(name, array)
        return found

    def _error(self, output: str, array: np.ndarray) -> NotFiniteError:
        record, path = self._stage.record, self._bundle.path
        half = record.dtype in ("fp16", "float16")
        return NotFiniteError(
            f"{record.component} computed {np.isnan(array).sum()} NaN and "
            f"{np.isinf(array).sum()} infinities of {array.size}: the image would be black",
            where=f"{self._stage.path}, output {output}",
            why="half precision holds nothing beyond 65504" if half else None,
            hint=f"see whether its weights are finite: sdopt inspect {path} "
            f"-c {record.component} --weights\n"
            f"find what must stay in float32: sdopt precision {path} -c {record.component}",
        )
