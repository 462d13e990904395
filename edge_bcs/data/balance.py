"""Classes that come up unevenly: what is said of them, and an order in which they come up evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_bcs.core import random
from edge_bcs.core.text import shown
from edge_bcs.data.augmentation import Augment, augmented
from edge_bcs.data.dataset import Array, Data, Dataset

_UNEVEN = 2.0
"""From this ratio of the most to the fewest images on, it is worth a word."""
_FEW = 10
"""A smaller difference than so many images is none."""
_NAMED = 3  # classes at each end


def imbalance(labels: Array, classes: Sequence[str]) -> str:
    """Return how many images which classes have, such as "nothing 12, peace 240 images"; "" where no class
    has twice as many as another, and ten more. Classes without any do not count.

    Args:
        labels: i64[N]. classes: their names.
    """
    found, counts = np.unique(labels, return_counts=True)
    most, fewest = counts.max(initial=0), counts.min(initial=len(labels))
    if len(found) < 2 or most < _UNEVEN * fewest or most - fewest < _FEW:
        return ""
    order = np.argsort(counts, kind="stable")
    named = [f"{shown(classes[found[place]])} {counts[place]}" for place in order]
    if len(named) > 2 * _NAMED + 1:
        named = [*named[:_NAMED], "…", *named[-_NAMED:]]
    return f"{', '.join(named)} images"


def uneven(labels: Array, classes: Sequence[str], balanced: bool) -> tuple[str, ...]:
    """Return what is worth telling of the images of a training: nothing, or one sentence; see `imbalance`."""
    counts = imbalance(labels, classes)
    if not counts:
        return ()
    drawn = "they are drawn evenly" if balanced else "balance (--balance) draws them evenly"
    return (f"the classes come up unevenly, {counts}; {drawn}",)


class Balanced(Dataset):
    """Another data set in an order in which its classes come up evenly.

    An epoch is as long as before. It goes round the classes, each round in a shuffled order of its own. The
    images of a class come in an order that is shuffled every epoch: some are left out of it where the class
    has many, and come in several passes where it has few. Position k·N + n is image n in pass k of its class:
    each time it is augmented differently. All of it follows from (seed, epoch).
    """

    named = True

    def __init__(self, data: Data) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels
        self.varies = bool(getattr(data, "varies", False))
        self._data = data
        # What a data set of somebody else's does to augment is its own; it then repeats itself.
        self._augments_as_we_do = isinstance(data, Dataset)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._data)

    def name_of(self, position: int) -> str:
        """Return what people know an image by."""
        name: str = getattr(self._data, "name_of", "image {}".format)(position % len(self))
        return name

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``, as they are."""
        return np.asarray(self._data.read(np.asarray(positions) % len(self))[0])

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        """Return the positions i64[N] of an epoch, evenly over the classes; as stored without ``shuffle``."""
        if not shuffle:
            return np.arange(len(self))
        shuffled = self._data.order(seed, epoch)
        labels = self.labels[shuffled]
        members = [shuffled[labels == label] for label in np.unique(labels)]
        rounds = -(-len(self) // len(members))
        words = random.words(2 * rounds * len(members), seed=seed, step=epoch, purpose=random.BALANCE).view(
            np.uint64
        )
        turns = np.argsort(words.reshape(rounds, len(members)), axis=1, kind="stable").reshape(-1)
        result = np.empty(len(turns), np.int64)
        for number, own in enumerate(members):
            numbers = np.arange(rounds)
            result[turns == number] = own[numbers % len(own)] + len(self) * (numbers // len(own))
        return result[: len(self)]

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: Augment = False
    ) -> tuple[Array, Array]:
        """Return images and labels; see `Dataset.read`."""
        positions = np.asarray(positions, np.int64)
        places = positions % len(self)
        if not self._augments_as_we_do:
            return self._data.read(places, seed=seed, epoch=epoch, augment=augment)
        images, labels = self._data.read(places)
        return augmented(images, positions, augment, seed=seed, epoch=epoch), labels
