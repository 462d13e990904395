"""How long an operator takes: the longer of its arithmetic and its traffic with memory.

The roofline of Williams, Waterman & Patterson (CACM 2009) with fractions of the peaks that are assumed to be
reached, and a fixed time to start an operator. The planner compares plans by it, the simulator predicts steps
with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """What is assumed of the kernels: cautious, for cores in order; an AVX-512 core reached 0.4 and 0.7
    of its peak.

    Attributes:
        sparse, dense: fraction of the cores' peak arithmetic that the sparse and the blocked dense
            kernels reach.
        vector_loss: kernels walk along rows of pixels × images, which fill vector registers the worse, the
            fewer images lie side by side: lanes/(lanes + vector_loss·numbers in a register) of them is used.
        bandwidth: fraction of the memory's peak bandwidth that all cores together reach.
        node_seconds: time to start an operator, whatever it does.
    """

    sparse: float = 0.3
    dense: float = 0.5
    vector_loss: float = 0.05
    bandwidth: float = 0.6
    node_seconds: float = 20e-6


@dataclass(frozen=True)
class Machine:
    """What runs the operators.

    Attributes:
        arithmetic: peak float32 operations a second of all cores in use.
        bandwidth: peak bytes a second between them and memory.
        vector: float32 numbers in a vector register.
    """

    arithmetic: float
    bandwidth: float
    vector: int

    def filled(self, lanes: int, assumed: Efficiency) -> float:
        """Share of the vector registers that ``lanes`` images side by side fill.

        Three images were measured to be no faster, each, than two: what counts is the power of two below.
        """
        useful = 1 << (lanes.bit_length() - 1)
        return useful / (useful + assumed.vector_loss * self.vector)

    def seconds(
        self, flops: int, moved: int, dense: bool, lanes: int, assumed: Efficiency
    ) -> tuple[float, float]:
        """(arithmetic, traffic) of one operator in seconds; it takes the longer, and the time to start it.

        Args:
            flops: its floating-point operations. moved: bytes that it reads and writes.
            dense: whether it runs the blocked dense kernel. lanes: images side by side.
        """
        fraction = assumed.dense if dense else assumed.sparse
        peak = self.filled(lanes, assumed) * self.arithmetic * fraction
        return flops / peak, moved / (assumed.bandwidth * self.bandwidth)


TYPICAL_BOARD = Machine(arithmetic=4 * 1.5e9 * 8, bandwidth=4e9, vector=4)
"""Four Cortex-A72 cores at 1.5 GHz (a Raspberry Pi 4): for whom plans are made when no board is named."""
