"""Images without labels in a training on the board: robust self-training (Carmon et al., 2019).

At the beginning of each epoch the network, as it is, answers to all of them; an answer that it is sure of is
the image's label for this epoch. Its labels are saved with the state, so that a training that is resumed
within an epoch goes on with the same ones.

Every batch has places for labelled and for unlabelled images. Both are taken from endless shuffled passes, so
that the fewer of them come up more often; an image is augmented differently in each pass. Where the loss has
no use for an image without a label, its place stays empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.batches import Batch
from edge_bcs.runtime.checks import Name, check_images
from edge_bcs.runtime.course import Course, packed, unpacked

from edge_bcs.core.answers import softmax
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import NO_LABEL
from edge_bcs.core.progress import Progress
from edge_bcs.core.settings import Unlabelled
from edge_bcs.data.adapt import as_array, dataset_of, is_pair
from edge_bcs.data.augmentation import augmentation_of
from edge_bcs.data.balance import imbalance
from edge_bcs.data.classes import say, shown
from edge_bcs.data.dataset import ArrayDataset, Data, Subset

if TYPE_CHECKING:
    from edge_bcs.runtime.trainer import Trainer

Array = np.ndarray[Any, Any]
_KEPT_ORDERS = 4
MOST_NAMED = 500  # classes in a line of metrics, which must not grow beyond 1 MiB whatever they are called


def wished(given: Any) -> Unlabelled:
    """Return what `Trainer.fit` takes as unlabelled images: an `Unlabelled`, or its data."""
    return given if isinstance(given, Unlabelled) else Unlabelled(given)


def beside(labelled: Data, given: Unlabelled, artifact: Artifact) -> Data:
    """Return the images of ``given`` as a data set, without those whose files are among the labelled ones.

    Args:
        labelled: the data of the training, as it was opened: held-out images of it, of any split, are
            looked for, too.

    Raises EdgeBcsError for what holds no images, or images of another shape.
    """
    from edge_bcs.data.photographs import repeated

    data = _dataset(given.data, artifact)
    if tuple(data.shape) != artifact.input_shape:
        raise EdgeBcsError(
            f"the network takes {artifact.input_shape} images; the unlabelled ones are {tuple(data.shape)}."
        )
    if len(data) == 0:
        raise EdgeBcsError("there is no unlabelled image.")
    twins = repeated(data, labelled)
    if not twins:
        return data
    place, twin = next(iter(twins.items()))
    if len(twins) == len(data):
        raise EdgeBcsError(
            f"all {len(data)} unlabelled images are among the labelled ones, too: give others, or leave "
            "them out."
        )
    name = getattr(data, "name_of", "image {}".format)(place)
    several = f", and {len(twins) - 1} more, are" if len(twins) > 1 else ", is"
    say((f"the unlabelled {name}, the same file as {twin} of the labelled data{several} left out",))
    return Subset(data, np.setdiff1d(np.arange(len(data)), list(twins)))


def _dataset(source: Any, artifact: Artifact) -> Data:
    if isinstance(source, (str, PathLike)):
        from edge_bcs.data.photographs import open_photographs

        return open_photographs(source, artifact.input_shape, resize=artifact.resize)
    if hasattr(source, "shape") and not hasattr(source, "read") and not is_pair(source):
        images = as_array(source)
        return ArrayDataset(images, np.zeros(len(images) if images.ndim else 0, np.int64))
    return dataset_of(source, finite=False)


def answers(trainer: Trainer, x: Array) -> tuple[Array, Array]:
    """Return the most likely class i64[n] of each of the images ``x``, and its probability f32[n]; −1, which
    is sure of nothing, where an answer is not finite."""
    logits = trainer.logits(x)
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    shares = softmax(np.where(finite[:, None], logits, np.float32(0)))
    return shares.argmax(axis=1), np.where(finite, shares.max(axis=1), np.float32(-1))


class Laps:
    """The images of a data set in endless shuffled passes.

    Args:
        data: they. seed: of the orders.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        self._order = lru_cache(_KEPT_ORDERS)(lambda lap: data.order(seed, lap))

    def items(self, first: int, count: int) -> tuple[Array, Array]:
        """Return the passes i64[count] and the positions i64[count] of ``count`` images from number ``first``
        on."""
        laps, places = np.divmod(np.arange(first, first + count), len(self.data))
        positions = np.empty(count, np.int64)
        for lap in np.unique(laps):
            here = laps == lap
            positions[here] = self._order(int(lap))[places[here]]
        return laps, positions


class Mixed:
    """Batches of labelled and unlabelled images, spread evenly over a batch and so over its micro-batches.

    Args:
        trainer: its network labels the images.
        data, unlabelled: labelled images, with the network's labels, and others, whose labels do not count.
        course: of the training; its pseudo-labels are saved with the state.
        between: called with (images done, all) between the micro-batches that are labelled; what it raises
            ends that, and the epoch has not begun.
        tell: says a sentence. progress: whether a bar is shown meanwhile.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Data,
        unlabelled: Data,
        course: Course,
        *,
        between: Callable[[int, int], None],
        tell: Callable[[str], None],
        progress: bool,
    ) -> None:
        self._trainer, self._training = trainer, course
        self._parts = (Laps(data, trainer.seed), Laps(unlabelled, (trainer.seed + 1) % 2**64))
        self._between, self._tell, self._progress = between, tell, progress
        objective = trainer.artifact.objective
        self._keeps_all = objective.kind.learns_without_labels and objective.beta > 0
        self._labels = np.full(len(unlabelled), NO_LABEL)
        if course.pseudo_epoch >= 0:
            self._labels = unpacked(course.pseudo_labels)
            if self._labels.max(initial=NO_LABEL) >= trainer.artifact.num_classes:
                raise EdgeBcsError("the saved position of the training is damaged.")

    def batch(self, done: int) -> Batch:
        """Return the images of the step after ``done`` steps; at the beginning of an epoch label first."""
        course = self._training
        epoch = course.epoch(done)
        if course.pseudo_epoch != epoch:
            self._label(epoch)
        number = course.first_epoch * course.steps_per_epoch + done
        unlabelled = course.unlabelled_places
        labelled = course.batch_size - unlabelled
        laps, places = self._parts[1].items(number * unlabelled, unlabelled)
        if not self._keeps_all:
            used = self._labels[places] != NO_LABEL
            laps, places = laps[used], places[used]
        own_laps, own = self._parts[0].items(number * labelled, labelled)
        order = _spread(len(own), len(places))
        part = (order >= len(own)).astype(np.int64)
        lap = np.concatenate([own_laps, laps])[order]
        position = np.concatenate([own, places])[order]

        def read(first: int, end: int) -> tuple[Array, Array]:
            return self._read(part[first:end], lap[first:end], position[first:end])

        weights = None
        if course.unlabelled_weight != 1:
            weights = np.where(part == 1, course.unlabelled_weight, 1.0)
        noted: dict[str, Any] = {
            "unlabelled": len(places),
            "pseudo_labelled": int((self._labels[places] != NO_LABEL).sum()),
        }
        if done % course.steps_per_epoch == 0:
            noted["pseudo_labels"] = self._summary()
        return Batch(len(order), read, lambda place: self._name(part[place], position[place]), weights, noted)

    def report(self) -> dict[str, Any]:
        """Return what is known of the pseudo-labels of the last epoch that began."""
        course = self._training
        if course.pseudo_epoch < 0:
            return {"unlabelled": {"images": len(self._labels)}}
        return {"unlabelled": {**self._summary(), "epoch": course.pseudo_epoch}}

    def _read(self, part: Array, lap: Array, position: Array) -> tuple[Array, Array]:
        augment = augmentation_of(self._training.augment)
        images, labels, read = [], [], []
        for number, own in enumerate(self._parts):
            for one in np.unique(lap[part == number]):
                here = np.flatnonzero((part == number) & (lap == one))
                x, y = own.data.read(position[here], seed=own.seed, epoch=int(one), augment=augment)
                images.append(x)
                labels.append(self._labels[position[here]] if number else y)
                read.append(here)
        back = np.argsort(np.concatenate(read))
        return np.concatenate(images)[back], np.concatenate(labels)[back]

    def _name(self, part: int, position: int) -> str:
        data = self._parts[part].data
        if not part:
            return f"image {position % len(data)} of the data"
        return f"the unlabelled {getattr(data, 'name_of', 'image {}'.format)(int(position))}"

    def _names(self, places: Array) -> Name:
        """Names of the unlabelled images at ``places``."""
        return lambda number: self._name(1, places[number])

    def _label(self, epoch: int) -> None:
        """Let the network say what the images are, for an epoch."""
        trainer, course, data = self._trainer, self._training, self._parts[1].data
        shape, size = trainer.artifact.input_shape, trainer.artifact.attack_micro_batch
        labels = np.full(len(data), NO_LABEL)
        what = f"labelling {len(data):,} images"
        with Progress(what, len(data), unit="images", shown=self._progress) as bar:
            for first in range(0, len(data), size):
                places = np.arange(first, min(first + size, len(data)))
                x = check_images(data.read(places)[0], shape, self._names(places))
                answered, probability = answers(trainer, x)
                sure = probability >= np.float32(course.confidence)
                labels[places[sure]] = answered[sure]
                bar.update(int(places[-1]) + 1)
                self._between(int(places[-1]) + 1, len(data))
        # In this order: cut off between the two, they are made again from the same state.
        self._labels, course.pseudo_labels = labels, packed(labels)
        course.pseudo_epoch = epoch
        self._tell(self._sentence())

    def _summary(self) -> dict[str, Any]:
        """How many images have a pseudo-label, and of which classes; of very many those with the most."""
        found, counts = np.unique(self._labels[self._labels != NO_LABEL], return_counts=True)
        most = np.sort(np.argsort(-counts, kind="stable")[:MOST_NAMED])
        name = self._trainer.name_of
        return {
            "images": len(self._labels),
            "labelled": int(counts.sum()),
            "classes": {name(int(found[place])): int(counts[place]) for place in most},
        }

    def _sentence(self) -> str:
        labels = self._labels[self._labels != NO_LABEL]
        classes = [self._trainer.name_of(label) for label in range(self._trainer.artifact.num_classes)]
        share = f"{len(labels):,} of {len(self._labels):,} ({100 * len(labels) / len(self._labels):.0f} %)"
        parts = [f"unlabelled images: {share} have a label, at {self._training.confidence:g} or above"]
        if not len(labels):
            rest = "take part without one" if self._keeps_all else "are left out of this epoch"
            return f"{parts[0]}; all {rest}"
        if uneven := imbalance(labels, classes):
            parts.append(f"unevenly: {uneven}")
        if missing := [name for label, name in enumerate(classes) if label not in set(labels.tolist())]:
            parts.append(f"none is {shown(missing)}")
        return "; ".join(parts)


def _spread(one: int, other: int) -> Array:
    """Return the numbers from 0 to ``one`` + ``other``: the first ``one``, and the others, each spread
    evenly."""
    # The middles of the k-th of n equal parts, times twice the product of both: whole numbers.
    middles = [(2 * np.arange(one) + 1) * max(other, 1), (2 * np.arange(other) + 1) * max(one, 1)]
    return np.argsort(np.concatenate(middles), kind="stable")
