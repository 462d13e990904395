"""What a network answered, image by image: what it takes for what, and where it is most wrong."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Images that were answered.

    Attributes:
        places: i64[n], where they are in the data.
        images: f32 [n, C, H, W] in [0, 1]. labels: i64[n].
        logits: f32 [n, classes], of the images as they are.
        robust: bool[n], right as they are and under attack; None where nothing attacked.
    """

    places: Array
    images: Array
    labels: Array
    logits: Array
    robust: Array | None = None


OnAnswers = Callable[[Batch], None]

NO_ANSWER = -1
"""In the place of a class: the network has diverged."""
DIVERGED = (
    "its training has diverged. Go back to the artifact or an earlier run, and train with a lower learning "
    "rate."
)


def answers_of(logits: Array) -> Array:
    """Return the classes i64[n] that logits [n, classes] answer: the largest, or `NO_ANSWER` where that is no
    finite number."""
    answers = logits.argmax(axis=1)  # the first NaN, where there is one
    largest = np.take_along_axis(logits, answers[:, None], axis=1)[:, 0]
    return np.where(np.isfinite(largest), answers, NO_ANSWER)


def without_answer(count: int, samples: int) -> list[str]:
    """Return what is said of a network that has no answer to ``count`` of the images that it was given."""
    if not count:
        return []
    return [
        f"the network's answers to {count:,} of {samples:,} images are not finite and count as wrong: "
        f"{DIVERGED}"
    ]


@dataclass(frozen=True)
class Mistake:
    """One image that was taken for another class.

    Attributes:
        place: where it is in the data. image: f32 [C, H, W].
        label, answer: its class, and the one that it was taken for, or `NO_ANSWER`.
        share, wrong_share: the probability of the one, and of the other.
    """

    place: int
    image: Array
    label: int
    answer: int
    share: float
    wrong_share: float


class Answers:
    """Counts batches of answers and keeps the worst.

    Args:
        classes: names of the network's outputs.
        keep: how many of the worst images are kept.

    Attributes:
        confusion: i64 [classes, classes]: images of a class (row) that were taken for another (column).
        robust: i64[classes], images of each class that were right under attack, too.
        unanswered: i64[classes], images of each class that got no answer.
        attacked: whether there was an attack.
    """

    def __init__(self, classes: Sequence[str], keep: int = 24) -> None:
        self.classes = tuple(classes)
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)
        self.robust, self.unanswered = (np.zeros(len(classes), np.int64) for _ in range(2))
        self.attacked = False
        self._keep = keep
        self._worst: list[tuple[float, int, Mistake]] = []  # the least wrong of them first

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        with np.errstate(invalid="ignore"):
            shares = np.nan_to_num(softmax(batch.logits))
        answers = answers_of(batch.logits)
        told = answers != NO_ANSWER
        np.add.at(self.confusion, (batch.labels[told], answers[told]), 1)
        np.add.at(self.unanswered, batch.labels[~told], 1)
        if batch.robust is not None:
            self.attacked = True
            np.add.at(self.robust, batch.labels[batch.robust], 1)
        for n in np.flatnonzero(answers != batch.labels):
            place, label, answer = int(batch.places[n]), int(batch.labels[n]), int(answers[n])
            share = float(shares[n, label])
            wrong = 0.0 if answer == NO_ANSWER else float(shares[n, answer])
            entry = (-share, -place)
            if len(self._worst) == self._keep and entry <= self._worst[0][:2]:
                continue
            mistake = Mistake(place, batch.images[n].copy(), label, answer, share, wrong)
            (heapq.heappushpop if len(self._worst) == self._keep else heapq.heappush)(
                self._worst, (*entry, mistake)
            )

    @property
    def samples(self) -> Array:
        """Images of each class, i64[classes]."""
        return np.asarray(self.confusion.sum(axis=1) + self.unanswered)

    @property
    def worst(self) -> list[Mistake]:
        """The images whose own class got the least probability, the worst first."""
        return [mistake for *_, mistake in sorted(self._worst, key=lambda entry: entry[:2], reverse=True)]

    def per_class(self) -> list[dict[str, Any]]:
        """Return {"class", "samples", "accuracy", "robust_accuracy" (under attack)} of each class of which
        there were images."""
        found = []
        for label in np.flatnonzero(self.samples):
            count = int(self.samples[label])
            entry = {"class": self.classes[label], "samples": count}
            entry["accuracy"] = int(self.confusion[label, label]) / count
            if self.attacked:
                entry["robust_accuracy"] = int(self.robust[label]) / count
            found.append(entry)
        return found

    def confused(self) -> list[dict[str, Any]]:
        """Return {"class", "taken_for", "images"} of what was confused, the most frequent first."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        pairs = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda pair: (-wrong[pair], pair))
        return [
            {"class": self.classes[label], "taken_for": self.classes[answer],
             "images": int(wrong[label, answer])}
            for label, answer in pairs
        ]  # fmt: skip


def softmax(logits: Array) -> Array:
    """Return the probabilities f32 [n, classes] of logits f32 [n, classes]; computed in double precision."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)
