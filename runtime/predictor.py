"""A network that is open on the board: what it answers, how good it is, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.board.process import resident_peak
from edge_bcs.runtime.checks import check_data, check_images, finite
from edge_bcs.runtime.engine import Engine, GraphRun
from edge_bcs.runtime.evaluation import logits, measure
from edge_bcs.runtime.guard import BetweenSteps, Guard

from edge_bcs.core.answers import OnAnswers, softmax
from edge_bcs.data.adapt import dataset_of
from edge_bcs.data.classes import Match, Names, match, say
from edge_bcs.data.dataset import Data

Array = np.ndarray[Any, Any]
Metrics = dict[str, Any]


class Predictor:
    """One artifact, open inside a byte budget; a `Trainer` is one that learns.

    Attributes are those of `Trainer`, which opens and closes it, and says who may use it when.
    """

    def __init__(
        self, artifact: Artifact, engine: Engine, guard: Guard, classes: Names | None, seed: int | None
    ) -> None:
        self.artifact, self.classes = artifact, classes
        self._engine, self._guard = engine, guard
        self.steps = int(engine.metadata["step"])
        self.seed = int(engine.metadata["seed"]) if seed is None else seed
        self.resumed = False

    @property
    def on_run(self) -> Callable[[GraphRun], None] | None:
        """See the class."""
        return self._engine.on_run

    @on_run.setter
    def on_run(self, hook: Callable[[GraphRun], None] | None) -> None:
        self._engine.on_run = hook

    def match_classes(self, data: Any, *, training: bool = False) -> Match:
        """Match the classes of ``data`` with the network's by name, as `fit` and `evaluate` do, and say once
        what is worth knowing.

        Args:
            data: what `fit` takes; of a path its test images unless ``training``.
            training: the network will be trained on it, so a network without names takes those of ``data``.

        Raises EdgeBcsError for data of another shape, without images, or with a class that the network does
        not know.
        """
        found = matched(self, data, "train" if training else "test", naming=training)
        self.classes = found.classes
        return found

    # What it answers

    def logits(self, x: Array) -> Array:
        """Return the logits f32 [n, classes] of images f32 [n, C, H, W] in [0, 1]."""
        x = check_images(x, self.artifact.input_shape)
        with self.between_steps(or_while_reading=True):
            return logits(self._engine, x)

    def predict(self, x: Array) -> Array:
        """Return the most likely classes i64[n] of images f32 [n, C, H, W] in [0, 1]."""
        return np.asarray(self.logits(x).argmax(axis=1), np.int64)

    def predict_names(self, x: Array) -> list[str]:
        """Return the names of the most likely classes of images f32 [n, C, H, W] in [0, 1]."""
        return [self.name_of(label) for label in self.predict(x)]

    def name_of(self, label: int) -> str:
        """Return the name of an output: the label itself, as text, while the names are unknown."""
        return str(label) if self.classes is None else self.classes[label]

    def probabilities(self, x: Array) -> Array:
        """Return the probabilities f32 [n, classes] of the classes of images f32 [n, C, H, W] in [0, 1], as
        the network's softmax has them; each row sums to 1. NotFiniteError if an answer is no number."""
        return softmax(finite(self.logits(x)))

    def evaluate(
        self,
        data: Any,
        attack_steps: int = 20,
        *,
        attack: str = "pgd",
        limit: int | None = None,
        restarts: int = 1,
        epsilon: float | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        on_answers: OnAnswers | None = None,
    ) -> Metrics:
        """Return clean and robust accuracy ("accuracy", "robust_accuracy", "samples"), measured on the board.

        An answer that is not finite is wrong; "warnings", sentences, then say that the network has diverged.

        Args:
            data: what `fit` takes; of a path its test images. Its classes are matched with the network's by
                name.
            attack_steps: of PGD on the cross-entropy, with steps of 2.5·ε/steps and a uniform start; 0
                measures clean accuracy alone.
            attack: "pgd", or "fgsm" for one step of size ε from the image itself.
            limit: only so many images, the first of a fixed shuffle.
            epsilon: radius of the attack; default: the artifact's.
            restarts: an image counts as robust if none of so many attacks fools the network.
            on_batch: called with (images done, all images).
            on_answers: called with each micro-batch and its answers (`edge_bcs.core.answers`).
        """
        found = matched(self, data, "test", naming=False)
        with self.between_steps(or_while_reading=True):
            return measure(
                self._engine,
                found.data,
                attack=attack,
                attack_steps=attack_steps,
                limit=limit,
                restarts=restarts,
                epsilon=epsilon,
                seed=self.seed,
                on_batch=on_batch,
                on_answers=on_answers,
            )

    def between_steps(self, *, or_while_reading: bool = False) -> BetweenSteps:
        """A block, for `with`, in which no other thread may use this Trainer; EdgeBcsError if one does, or if
        a step is under way (unless it is only reading its images)."""
        return BetweenSteps(self._guard, but_while_reading=or_while_reading)

    # What it takes

    @property
    def buffers(self) -> Mapping[str, Array]:
        """The bound buffers by name, as the graphs read and write them: state, gradients, images, what a run
        leaves (runtime/buffers.py). The arrays are the memory itself: writing changes what is trained."""
        return MappingProxyType(self._engine.arrays)

    def memory(self) -> dict[str, int | bool | None]:
        """Return what memory is in use, in bytes.

        "bound_bytes": the bound buffers; "current_bytes" and "peak_bytes": the working set now and at most
        since the Trainer was opened; "placed_bytes" and "placed_peak_bytes": the memory that was taken for
        it, more where tensors have no places (artifacts of before 0.2, and onnxruntime before 1.23);
        "cap_bytes" or None; "exact": whether every tensor is counted; "rss_bytes": the whole process with
        interpreter and libraries, which no cap covers.
        """
        return {**self._engine.memory(), "rss_bytes": resident_peak()}

    @property
    def peak_bytes(self) -> int:
        """The working set at most since the Trainer was opened, or since `reset_peak`."""
        return self._engine.budget.peak

    @property
    def placed_peak_bytes(self) -> int:
        """The memory that was taken for it at most; more than the peak where tensors have no places."""
        return self._engine.budget.placed_peak

    def reset_peak(self) -> None:
        """Measure the peaks anew from here."""
        self._engine.budget.reset_peak()

    @property
    def threads(self) -> int:
        """Threads of each graph."""
        return int(self._engine.threads)


def opened(network: Predictor, given: Any, split: str) -> Data:
    """Return what ``given`` holds as a data set, with its own labels; see `matched`.

    Pixels are checked when they are read, for one may be skipped.
    """
    artifact = network.artifact
    data = dataset_of(given, split=split, shape=artifact.input_shape, finite=False, resize=artifact.resize)
    check_data(artifact, data)
    return data


def matched(network: Predictor, given: Any, split: str, *, naming: bool) -> Match:
    """Return what ``given`` holds as a data set with the network's labels, and say what is worth knowing.

    Args:
        network: keeps its names. given: what `Trainer.fit` takes. split: of a path.
        naming: whether a network without names takes those of the data.

    Raises EdgeBcsError as `Predictor.match_classes` does.
    """
    data = opened(network, given, split)
    found = match(
        data,
        network.classes,
        network.artifact.num_classes,
        naming=naming,
        trained=network.steps > 0,
        resumed=network.resumed,
    )
    say(found.notes)
    return found
