"""A single-step attack that is watched: once it has collapsed, the training goes on with PGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_bcs.runtime.course import Course

from edge_bcs.core.collapse import WATCHED_IMAGES, Watch
from edge_bcs.data.dataset import Data, Subset, some_of

if TYPE_CHECKING:
    from edge_bcs.runtime.trainer import Trainer


class Watching:
    """What a training does with the images that it is watched on (see `edge_bcs.core.collapse`).

    Args:
        trainer: attacks them, and whose attack changes; its artifact's is a single step.
        data: images with the network's labels; some of them are watched.
        course: of the training; what is known is saved with it.
    """

    def __init__(self, trainer: Trainer, data: Data, course: Course) -> None:
        self._trainer, self._course = trainer, course
        self._data = Subset(data, some_of(data, WATCHED_IMAGES, trainer.seed))
        course.watch = course.watch or Watch()
        attack = trainer.artifact.objective.attack
        trainer.attack = attack if course.watch.fell_back is None else attack.pgd

    @property
    def fell_back(self) -> int | None:
        """Steps that were done when the training went over to PGD; None while it has not."""
        return None if self._course.watch is None else self._course.watch.fell_back

    def look(self, between: Callable[[int, int], None]) -> str | None:
        """Look at the training if that is due; return a sentence if it has collapsed.

        Args:
            between: called after every micro-batch; what it raises ends the look, which is then due.
        """
        trainer, course = self._trainer, self._course
        watch, done = course.watch, trainer.steps - course.first_step
        over = course.is_over(done)
        if watch is None or (done % course.steps_per_epoch and not over):
            return None
        if not watch.is_due(done, course.batch_size, len(self._data), over=over):
            return None
        own, pgd = trainer.watch(self._data, between)
        if not watch.note(done, own, pgd, len(self._data)):
            return None
        sentence = watch.sentence(trainer.attack.kind, own, pgd)
        trainer.attack = trainer.attack.pgd
        return sentence
