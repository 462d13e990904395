"""What every data set can do: say its order, and read some of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.augmentation import Augment, augmented
from edge_bcs.data.faults import LeftOut

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int]
MOST_CLASSES = 100_000
# The shuffle of what is held out is that of an epoch which no training reaches.
_SPLIT_EPOCH = 1 << 55
_CHECKED = 256  # images whose pixels are looked at at a time


@runtime_checkable
class Data(Protocol):
    """What training and evaluation read from: every `Dataset`, and whatever else can do this much."""

    classes: tuple[str, ...]
    shape: Shape
    labels: Array

    def __len__(self) -> int:
        """Number of images."""
        ...

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        """Return the positions i64[N] in the order of one epoch."""
        ...

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: Augment = False
    ) -> tuple[Array, Array]:
        """Return images f32 [m, C, H, W] in [0, 1] and labels i64[m] at these positions; True and "shift" are
        the same, and False and "none"."""
        ...


class Dataset(ABC):
    """Labelled images that are read when they are asked for.

    Attributes:
        classes: names of the classes, in the order of their labels.
        shape: (C, H, W) of every image.
        labels: i64[N], the label of each position.
        named: whether names that look like label numbers ("0", "1", …) are names all the same.
        varies: whether an image may be another one each time it is read, so that none may be kept.
        left_out: images of the source that cannot be used and are not among them.
    """

    named = False
    classes: tuple[str, ...]
    shape: Shape
    labels: Array
    varies: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def name_of(self, position: int) -> str:
        """Return what people know an image by: its file, or its number."""
        return f"image {position}"

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
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: Augment = False
    ) -> tuple[Array, Array]:
        """Return images f32 [m, C, H, W] in [0, 1] and labels i64[m] at ``positions``.

        With ``augment`` (True is "shift") each image is changed as (seed, epoch, position) says, whoever
        reads it with whom; see `edge_bcs.data.augmentation`.
        """
        positions = np.asarray(positions, np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            raise EdgeBcsError(f"positions must lie in [0, {len(self)}).")
        images = self.images(positions)
        images = augmented(images, positions, augment, seed=seed, epoch=epoch)
        return images, self.labels[positions]

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        augment: Augment = False,
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


class ArrayDataset(Dataset):
    """Images that are already in memory, [N, C, H, W]: floats in [0, 1], or u8, which are divided by 255; and
    labels, whole numbers [N] from 0.

    A pixel that is not a finite number is left to whoever reads it: a board may skip its batch.
    """

    def __init__(self, images: Array, labels: Array, classes: tuple[str, ...] | None = None) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or (images.dtype.kind != "f" and images.dtype != np.uint8):
            raise EdgeBcsError(
                "images must be floats in [0, 1] or uint8, of shape [N, C, H, W], not "
                f"{images.dtype}{list(images.shape)}."
            )
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise EdgeBcsError(
                f"labels must be whole numbers from 0, of shape [{len(images)}], not "
                f"{labels.dtype}{list(labels.shape)}."
            )
        if images.dtype != np.uint8:
            check_pixels(images, "the images")
        self.classes = class_names(labels, classes)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.labels = labels.astype(np.int64)
        self._images = images

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``."""
        chosen = self._images[positions].astype(np.float32)
        return chosen / np.float32(255) if self._images.dtype == np.uint8 else chosen

    def check_finite(self) -> None:
        """Raise EdgeBcsError for a pixel that is not a finite number."""
        if self._images.dtype != np.uint8:
            check_finite(self._images, lambda place: f"image {place} of the data")


class Subset(Dataset):
    """Some images of another data set, by places of their own from 0.

    Args:
        data: the other one. places: i64[n], where the images are in it.
    """

    named = True

    def __init__(self, data: Data, places: Array) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels[places]
        self.varies = bool(getattr(data, "varies", False))
        self._data, self._places = data, places

    def name_of(self, position: int) -> str:
        """Return what people know an image by."""
        name: str = getattr(self._data, "name_of", "image {}".format)(int(self._places[position]))
        return name

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``, as they are."""
        return np.asarray(self._data.read(self._places[positions])[0])


def held_apart(data: Data, share: float, seed: int) -> tuple[Array, Array]:
    """Return places of the images to train on and of those that are held out to choose by, both i64 and
    ascending.

    Args:
        data: whose order decides, by the seed. share: of the images that is held out, at least 0 and below 1.

    Raises:
        EdgeBcsError: no image is left to train on.
    """
    held = round(share * len(data))
    if held >= len(data):
        raise EdgeBcsError(f"{len(data)} images are too few to hold {held} of them out")
    order = data.order(seed, _SPLIT_EPOCH)
    return np.sort(order[held:]), np.sort(order[:held])


def some_of(data: Data, count: int, seed: int) -> Array:
    """Return places i64 of up to so many images, ascending: the first in an order by the seed."""
    return np.sort(data.order(seed, _SPLIT_EPOCH)[:count])


def class_names(labels: Array, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return ``names``, or a number for each class where there are none, after checking labels int[N].

    Raises EdgeBcsError for a label below 0, or one that is no class.
    """
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    if low < 0 or high >= MOST_CLASSES:
        wrong = low if low < 0 else high
        raise EdgeBcsError(
            f"label {wrong} of image {int(np.argmax(labels == wrong))} is out of range: labels are whole "
            f"numbers from 0 and below {MOST_CLASSES}."
        )
    names = names or tuple(str(label) for label in range(high + 1))
    if high >= len(names):
        raise EdgeBcsError(f"label {high} has no name among {len(names)} classes.")
    return names


def check_pixels(images: Array, name: str) -> None:
    """Raise EdgeBcsError for floats of any shape beyond [0, 1], of which ``name`` is what they are called.

    What is not a finite number passes; see `check_finite`.
    """
    low, high = np.inf, -np.inf
    for first in range(0, len(images), _CHECKED):
        part = images[first : first + _CHECKED]
        if not _all_finite(part):
            part = part[np.isfinite(part)]
        if part.size:
            low, high = min(low, float(part.min())), max(high, float(part.max()))
    if low < 0 or high > 1:
        raise EdgeBcsError(
            f"{name} must lie in [0, 1], but they reach {low:g} to {high:g}: {advice(low, high)}."
        )


def check_finite(images: Array, name: Callable[[int], str]) -> None:
    """Raise EdgeBcsError, naming the image, for a pixel of images [m, …] that is not a finite number."""
    for first in range(0, len(images), _CHECKED):
        part = images[first : first + _CHECKED]
        if not _all_finite(part):
            place = first + int(np.argmin(np.isfinite(part.reshape(len(part), -1)).all(axis=1)))
            raise EdgeBcsError(f"{name(place)} has a pixel that is not a finite number; remove or repair it.")


def _all_finite(values: Array) -> bool:
    return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def advice(low: float, high: float) -> str:
    """What makes pixels that reach from ``low`` to ``high`` lie in [0, 1]."""
    if low < 0:
        return (
            "leave out the normalisation by mean and deviation, for which a batch norm may be the network's "
            "first layer"
        )
    if high > 255:
        return "divide by the largest value that a pixel can have"
    return "divide by 255" if high > 2 else "clip them"


def held_out(labels: Array) -> Array:
    """Return bool[N]: the images kept for testing where a source has no test split of its own.

    Every tenth image of each class in stored order, and at least one of every class that has two.
    """
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[members[9::10] if len(members) >= 10 else members[1:][-1:]] = True
    return mask
