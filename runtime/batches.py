"""Which images each step of a training on the board sees, and how they weigh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from edge_bcs.runtime.checks import Name, in_data
from edge_bcs.runtime.course import Course
from edge_bcs.runtime.step import Reader

from edge_bcs.data.augmentation import augmentation_of
from edge_bcs.data.dataset import Data

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """The images of one step.

    Attributes:
        count: how many. read: reads some of them.
        name: says which image stands at a place of the batch.
        weights: of the images in the loss, f64[count], where they differ.
        noted: what the step's line of metrics says of them.
    """

    count: int
    read: Reader
    name: Name
    weights: Array | None = None
    noted: dict[str, Any] = field(default_factory=dict)


class Batches(Protocol):
    """Gives each step its images."""

    def batch(self, done: int) -> Batch:
        """Return the images of the step after ``done`` steps."""
        ...

    def report(self) -> dict[str, Any]:
        """Return what the training's report says of its images."""
        ...


class InOrder:
    """Batches of labelled images: those of an epoch in its order, piece by piece.

    Args:
        data: they. course: of the training. seed: of the order and the augmentation.
    """

    def __init__(self, data: Data, course: Course, seed: int) -> None:
        self._data, self._training, self._seed = data, course, seed
        self._order: Array | None = None
        self._order_epoch = -1

    def batch(self, done: int) -> Batch:
        """Return the images of the step after ``done`` steps."""
        course = self._training
        epoch = course.epoch(done)
        if self._order is None or self._order_epoch != epoch:
            self._order, self._order_epoch = self._data.order(self._seed, epoch), epoch
        chosen = self._order[course.images(done)]
        augment = augmentation_of(course.augment)

        def read(first: int, end: int) -> tuple[Array, Array]:
            return self._data.read(chosen[first:end], seed=self._seed, epoch=epoch, augment=augment)

        return Batch(len(chosen), read, in_data(chosen % len(self._data)))

    def report(self) -> dict[str, Any]:
        """Return nothing: what is trained on is what was given."""
        return {}
