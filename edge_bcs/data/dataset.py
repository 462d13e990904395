"""What every data set can do: say its order, and read some of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_bcs import random
from edge_bcs.errors import EdgeBcsError

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int]
SHIFT = 0.1  # of the size, on each axis


class Dataset(ABC):
    """Labelled images that are read when they are asked for.

    Attributes:
        classes: names of the classes, in the order of their labels.
        shape: (C, H, W) of every image.
        labels: i64[N], the label of each position.
    """

    classes: tuple[str, ...]
    shape: Shape
    labels: Array

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @abstractmethod
    def images(self, positions: Array) -> Array:
        """Return the images f32 [m, C, H, W] in [0, 1] at positions i64[m], as they are."""

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        """Return the positions i64[N] in the order of an epoch: as stored, or a permutation of (seed,
        epoch)."""
        if not shuffle:
            return np.arange(len(self))
        words = random.words(2 * len(self), seed=seed, step=epoch, purpose=random.SHUFFLE)
        return np.argsort(words.view(np.uint64), kind="stable")

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: bool = False
    ) -> tuple[Array, Array]:
        """Return images f32 [m, C, H, W] in [0, 1] and labels i64[m] at ``positions``.

        With ``augment`` each image is shifted and flipped as (seed, epoch, position) says, whoever reads it
        with whom.
        """
        positions = np.asarray(positions, np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            raise EdgeBcsError(f"positions must lie in [0, {len(self)}).")
        images = self.images(positions)
        if augment:
            images = shift_and_flip(images, positions, seed=seed, epoch=epoch)
        return images, self.labels[positions]

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Array, Array]]:
        """Yield the epoch's batches (x f32 [n, C, H, W] in [0, 1], y i64[n]) from batch number ``start`` on.

        Every batch but the last has ``batch_size`` images; only the current one is in memory.
        """
        if batch_size < 1 or start < 0:
            raise EdgeBcsError("the batch size must be at least 1 and the first batch at least 0.")
        order = self.order(seed, epoch, shuffle)
        for first in range(start * batch_size, len(order), batch_size):
            yield self.read(order[first : first + batch_size], seed=seed, epoch=epoch, augment=augment)


def shift_and_flip(images: Array, positions: Array, *, seed: int, epoch: int) -> Array:
    """Return images f32 [m, C, H, W] shifted by up to ±10 % on each axis and mirrored with probability ½.

    What leaves on one side is filled with the nearest pixel on the other. Word 0, 1 and 2 of block
    ``position`` of the stream (seed, epoch, AUGMENT) give the vertical shift, the horizontal shift and the
    mirror.
    """
    height, width = images.shape[2:]
    words = random.blocks(positions, seed=seed, step=epoch, purpose=random.AUGMENT).astype(np.int64)
    result = np.empty_like(images)
    for number, image in enumerate(images):
        rows = _shifted(height, int(words[number, 0]))
        columns = _shifted(width, int(words[number, 1]))
        if words[number, 2] >> 31:
            columns = columns[::-1]
        result[number] = image[:, rows[:, None], columns]
    return result


def _shifted(length: int, word: int) -> Array:
    reach = round(SHIFT * length)
    shift = (word * (2 * reach + 1) >> 32) - reach
    return np.clip(np.arange(length) - shift, 0, length - 1)


class ArrayDataset(Dataset):
    """Images that are already in memory: f32 [N, C, H, W] in [0, 1] and labels int [N]."""

    def __init__(self, images: Array, labels: Array, classes: tuple[str, ...] | None = None) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.dtype.kind != "f":
            raise EdgeBcsError(f"images must be floats [N, C, H, W], not {images.dtype}{list(images.shape)}.")
        if (
            labels.shape != (len(images),)
            or labels.dtype.kind not in "iu"
            or (len(labels) and labels.min() < 0)
        ):
            raise EdgeBcsError(f"labels must be whole numbers from 0, of shape [{len(images)}].")
        count = int(labels.max()) + 1 if len(labels) else 0
        self.classes = classes or tuple(str(label) for label in range(count))
        if count > len(self.classes):
            raise EdgeBcsError(f"label {count - 1} has no name among {len(self.classes)} classes.")
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.labels = labels.astype(np.int64)
        self._images = images

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``."""
        return self._images[positions].astype(np.float32)


def held_out(labels: Array) -> Array:
    """Return bool[N]: the images kept for testing where a source has no test split of its own.

    Every tenth image of each class in stored order, and at least one of every class that has two.
    """
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[members[9::10] if len(members) >= 10 else members[1:][-1:]] = True
    return mask
