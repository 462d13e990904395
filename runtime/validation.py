"""Images that a training does not see: measured after each epoch, so that the best state is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import Course
from edge_bcs.runtime.state import keep_best, read_best, read_state

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.classes import say
from edge_bcs.data.dataset import Data

if TYPE_CHECKING:
    from edge_bcs.runtime.trainer import Trainer

Array = np.ndarray[Any, Any]


class Validation:
    """What a training does with the images that are held out of it.

    Args:
        trainer: measures them.
        data: these images, with the network's labels.
        course: of the training; it says which state is the best, and is saved with every state.
        folder: the run. save: saves the state there, as the newest.

    Attributes:
        copied: bytes that keeping the best states took, where they could not be linked.
    """

    def __init__(
        self, trainer: Trainer, data: Data, course: Course, folder: str | Path, save: Callable[[], None]
    ) -> None:
        self._trainer, self._data, self._kept_by = trainer, data, course
        self._folder, self._save = folder, save
        self.copied = 0

    @property
    def _done(self) -> int:
        return self._trainer.steps - self._kept_by.first_step

    def is_due(self) -> bool:
        """Whether an epoch has ended and is not measured yet: it may have been cut off before it was."""
        return self._kept_by.is_to_be_measured(self._done)

    def measure(self, between: Callable[[int, int], None]) -> str:
        """Measure the images, and keep the state if it is the best; return a sentence.

        The state is saved as the newest one, which then says of itself that it is the best, and that is kept.

        Args:
            between: called after every micro-batch; what it raises ends the measurement, which is then due.
        """
        trainer, course = self._trainer, self._kept_by
        objective = trainer.artifact.objective
        steps = max(1, objective.attack.steps) if objective.kind.adversarial else 0
        measured = trainer.evaluate(self._data, steps, on_batch=between)
        score: float = measured["robust_accuracy"] if steps else measured["accuracy"]
        epoch = course.epoch(self._done - 1) + 1
        best = course.note(self._done, score)
        if best:
            self._keep()
        kind = "robust accuracy" if steps else "accuracy"
        what = f"{kind} {100 * score:.1f} % on {measured['samples']} held-out images"
        return f"epoch {epoch}: {what}{', the best so far' if best else ''}"

    def keep_again(self) -> None:
        """Keep the state as the best one if it says that it is: it was cut off before that was done."""
        course = self._kept_by
        if course.measured and not course.returned and course.best_step == self._trainer.steps:
            self._keep()

    def _keep(self) -> None:
        self._save()
        self.copied += keep_best(self._folder)

    def return_to_best(self) -> None:
        """Let the training end with its best state; where that cannot be read, the newest one stays, with a
        word. Cut off here, it is done again where the run goes on."""
        trainer, course = self._trainer, self._kept_by
        if course.returned:
            return
        if course.best_step != trainer.steps:
            self._save()
            trainer.replace_state(self._read_best)
        course.returned = True

    def _read_best(self, into: dict[str, Array]) -> None:
        try:
            read_best(self._folder, self._trainer.artifact, self._kept_by.best_step, into)
        except EdgeBcsError as error:
            read_state(Artifact.read(self._folder), into)
            say((f"the best state of {self._folder} cannot be used ({error}); the newest one stays",))
