"""What a backend is: it does training steps on one `SparseModel`, which it reads and writes.

Everything around the step (schedules, selection, checkpoints, resumption) is the same code for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_bcs.core.settings import Attack, Coefficients
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.dataset import Data
from edge_bcs.training.settings import Growth

Segments = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """What one process reads of a batch.

    Attributes:
        images, labels: f32 [n, C, H, W] in [0, 1], i64[n].
        segments: (place in the whole batch, length) of the runs that they consist of, in order.
        whole: images of the whole batch.
    """

    images: NDArray[Any]
    labels: NDArray[Any]
    segments: Segments
    whole: int


@dataclass(frozen=True)
class Numbers:
    """What a step gave: mean loss, correct answers of each branch in the whole batch, deaths."""

    loss: float
    correct: list[float]
    deaths: int


class Backend(Protocol):
    """Does training steps.

    Attributes:
        lag: steps that may be under way while the numbers of an earlier one are read.
        attack: with which the next step crafts its images.
    """

    lag: int
    attack: Attack

    def load(self, step: int) -> None:
        """Start from the state of the network, before training step `step`."""
        ...

    def step(
        self, batch: Batch, hyper: Coefficients, step: int, signals: HeldSignals
    ) -> Callable[[], Numbers]:
        """Do one step of Algorithm 1, and return what tells its numbers (and raises if it failed).

        From where the state changes on, ``signals`` are held: so that the step is done, and counted by the
        caller, or not begun.
        """
        ...

    def grow(self, batch: Batch, count: int, growth: Growth, step: int) -> int:
        """Move ``count`` connections, or more where ``growth`` recycles, to where the batch's gradient is
        large (`method.growth`), before step ``step``; return how many moved. The momentum of the others,
        other parameters and running statistics stay."""
        ...

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """Return clean and robust accuracy (PGD with the training attack; None for natural training)."""
        ...

    def watch(self, data: Data) -> tuple[float, float]:
        """Return which shares of the images are right under the training's own attack and under PGD (see
        `edge_bcs.core.collapse`)."""
        ...

    def store(self) -> None:
        """Put the state into the network, and how many steps that is."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
