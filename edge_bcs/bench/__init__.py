"""`edge-bcs bench`: what a robust training step and its parts take, beside what else there is.

`machine` measures the roof, `roofline` says how near to it an operator can come, `operators` times single
convolutions, `step` whole training steps, `suite` runs everything that `make bench` reports, `report` writes
it down, `calibrate` measures the constants of the compiler's cost model.
"""

from __future__ import annotations

from edge_bcs.bench.step import StepComparison, compare_step

__all__ = ["StepComparison", "compare_step"]
