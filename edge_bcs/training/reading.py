"""Which images each step of a training sees, and who of its replicas reads them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.balance import Balanced
from edge_bcs.data.dataset import Data, Dataset, check_finite, check_pixels
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.backends.base import Batch
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.replicas import Replicas

_CACHED_BYTES = 2**31


class Batches:
    """The batches of a training.

    Attributes:
        labelled: images of a step that come from ``data``; the others are pseudo-labelled.
        per_epoch: steps of an epoch; a last batch that is not full is left out.
        total: steps of the training.
    """

    def __init__(
        self, plan: TrainingPlan, replicas: Replicas, data: Part | Balanced, pseudo_labelled: Part | None
    ) -> None:
        self._plan, self._replicas, self._data, self._pseudo_labelled = plan, replicas, data, pseudo_labelled
        self.labelled = plan.batch_size // 2 if pseudo_labelled is not None else plan.batch_size
        self.per_epoch = max(1, len(data) // max(1, self.labelled))
        self.total = plan.schedule.steps or plan.schedule.epochs * self.per_epoch
        self._order: NDArray[Any] | None = None

    def check(self, sparse: SparseModel) -> None:
        """Raise `EdgeBcsError` if a batch is too small for the network's batch norm, or for all replicas."""
        size = self._plan.batch_size
        images = min(self.labelled, len(self._data)) + size - self.labelled
        normalised = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in sparse.modules())
        if normalised and self._plan.batch_norm == "batch" and images < 2 * self._replicas.count:
            raise EdgeBcsError(
                f"a batch of 1 image has no statistics ({len(self._data)} images to train on, batches of "
                f"{size}): take larger batches, more images, or batch norm frozen"
            )
        smallest = size // (2 if len(self._bounds(size)) == 3 else 1)
        if smallest < self._replicas.count:
            raise EdgeBcsError(f"batches of {size} images are too few for {self._replicas.count} processes")

    def read(self, step: int) -> Batch:
        """Return this replica's share of the batch of a step; steps are read one after the other."""
        epoch, number = divmod(step, self.per_epoch)
        if self._order is None or number == 0:
            self._order = self._data.order(self._plan.seed, epoch)
        positions = self._order[number * self.labelled : (number + 1) * self.labelled]
        seed, augment = self._plan.seed, self._plan.augment
        labelled = len(positions)
        more = self._plan.batch_size - self.labelled
        bounds = self._bounds(labelled + more)
        segments = [self._replicas.share(begin, end) for begin, end in itertools.pairwise(bounds)]
        parts = []
        for begin, end in segments:
            if begin < labelled:
                chosen = positions[begin : min(end, labelled)]
                parts.append(self._data.read(chosen, seed=seed, epoch=epoch, augment=augment))
            if end > labelled and self._pseudo_labelled is not None:
                first = max(begin, labelled) - labelled
                second, begun = self._pseudo_labelled, step * more + first
                for lap, chosen in _laps(second, seed, begun, end - labelled - first):
                    parts.append(second.read(chosen, seed=seed + 1, epoch=lap, augment=augment))
        images = parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        places = [(begin, end - begin) for begin, end in segments]
        return Batch(images, labels, places, labelled + more)

    def _bounds(self, whole: int) -> list[int]:
        """Return where the parts of a batch begin and end that replicas share one by one: all, or two halves.

        Mixed batches are half adversarial, those of rst half pseudo-labelled: every replica gets of both.
        """
        halves = self._plan.objective.adversarial_part == 0.5 or self._pseudo_labelled is not None
        return [0, whole // 2, whole] if halves and self._replicas.count > 1 else [0, whole]


class Part(Dataset):
    """Some positions of a data set, whose pixels are checked when they are read.

    Pixels that are multiples of 1/255 stay in memory, unless the data may give others the next time.
    """

    def __init__(self, data: Data, positions: NDArray[Any]) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels[positions]
        self._data, self._where = data, positions
        kept = len(positions) * math.prod(data.shape) <= _CACHED_BYTES and not getattr(data, "varies", False)
        self._pixels = np.empty((len(positions), *data.shape), np.uint8) if kept else None
        self._known = np.zeros(len(positions), dtype=bool)

    def images(self, positions: NDArray[Any]) -> NDArray[Any]:
        """Return the images f32 [m, C, H, W] in [0, 1] at positions i64[m] of this part, as they are."""
        missing = positions[~self._known[positions]]
        if self._pixels is not None and len(missing):
            images = self._read(missing)
            pixels = np.rint(images * 255).astype(np.uint8)
            if np.array_equal(pixels.astype(np.float32) / np.float32(255), images):
                self._pixels[missing], self._known[missing] = pixels, True
            else:
                self._pixels = None
        if self._pixels is None:
            return self._read(positions)
        known: NDArray[Any] = self._pixels[positions].astype(np.float32) / np.float32(255)
        return known

    def _read(self, positions: NDArray[Any]) -> NDArray[Any]:
        places = self._where[positions]
        images = self._data.read(places)[0]
        check_finite(images, lambda number: f"image {places[number]} of the data")
        check_pixels(images, "the images of the data")
        return images


def _laps(data: Part, seed: int, first: int, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (pass, positions) for images first to first + count of endless shuffled passes over `data`."""
    while count > 0:
        lap, begin = divmod(first, len(data))
        chosen = data.order(seed + 1, lap)[begin : begin + count]
        yield lap, chosen
        first, count = first + len(chosen), count - len(chosen)
