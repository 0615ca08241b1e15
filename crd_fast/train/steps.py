"""Optimizer steps: those whose loss or gradient is not finite are left out."""

from __future__ import annotations

import logging
import math

from crd_fast.errors import RaisedByAll

IN_A_ROW = 5  # so many end the run: what is wrong then is not one batch

logger = logging.getLogger("crd_fast")


class FiniteSteps:
    """Whether a step can be made. say: whether this process warns where one cannot; all of them know."""

    def __init__(self, say: bool) -> None:
        self._say, self._in_a_row = say, 0

    def usable(self, metrics: dict[str, float], iteration: int) -> bool:
        """metrics: of the step, on all ranks the same. Raises RaisedByAll for the last of `IN_A_ROW`."""
        bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if bad is None:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        what = f"{bad}: expected a finite number, got {metrics[bad]}"
        if self._in_a_row >= IN_A_ROW:
            raise RaisedByAll(f"{what}, in {IN_A_ROW} optimizer steps in a row, which were left out")
        if self._say:
            logger.warning(
                "warning: iteration %d: %s: optimizer step left out, %d in a row (%d end the run)",
                iteration,
                what,
                self._in_a_row,
                IN_A_ROW,
            )
        return False
