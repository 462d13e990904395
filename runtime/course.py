"""Where a training begins and ends: saved with the state, so that a resumed training is the same one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from edge_bcs.runtime.artifact import Artifact

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.settings import divisor


@dataclass
class Course:
    """One training of `Trainer.fit`.

    Attributes:
        first_step, first_epoch: steps and epochs of trainings that went before.
        batch_size, samples: images of a step, and of the data set.
        total_steps: how long it is. learning_rate: the first λ.
        skipped: steps left out so far because something was not finite.
    """

    first_step: int
    first_epoch: int
    batch_size: int
    samples: int
    total_steps: int
    learning_rate: float
    skipped: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data; the last one may have fewer images."""
        return -(-self.samples // self.batch_size)

    def epoch(self, done: int) -> int:
        """Number of the epoch to which the step after ``done`` steps belongs."""
        return self.first_epoch + done // self.steps_per_epoch

    def images(self, done: int) -> slice:
        """Places of the next step's images in the order of its epoch."""
        first = done % self.steps_per_epoch * self.batch_size
        return slice(first, first + self.batch_size)

    def next_epoch(self, step: int) -> int:
        """The first epoch that this training, which stands at ``step``, has not begun."""
        return self.first_epoch + -(-(step - self.first_step) // self.steps_per_epoch)

    def divisor(self, done: int) -> int:
        """What divides λ and λ_w after ``done`` steps: 1, then 10 from 50 % on, 100 from 75 % on."""
        return divisor(done, self.total_steps)

    def rates(self, done: int, hyper: Mapping[str, float]) -> tuple[float, float]:
        """λ and λ_w of the step after ``done`` steps; ``hyper`` are the artifact's, whose ratio they keep."""
        divisor = self.divisor(done)
        # The decay is not multiplied by the learning rate (Algorithm 1), so it must follow it here.
        ratio = self.learning_rate / hyper["learning_rate"] if hyper["learning_rate"] else 1.0
        return self.learning_rate / divisor, hyper["weight_decay"] * ratio / divisor

    def dump(self) -> str:
        """The course as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str, step: int) -> Course:
        """Read what `dump` wrote, for a state that stands at ``step``; EdgeBcsError if it makes no sense."""
        whole = {field.name for field in fields(cls)} - {"learning_rate"}
        try:
            content = {"skipped": 0, **parse_object(text)}  # older runs counted none
            valid = set(content) == whole | {"learning_rate"} and math.isfinite(content["learning_rate"])
            valid = valid and all(type(content[name]) is int and content[name] >= 0 for name in whole)
            valid = valid and content["batch_size"] > 0 and content["samples"] > 0
            valid = valid and content["first_step"] <= step
            valid = valid and content["learning_rate"] >= 0
        except (ValueError, TypeError, OverflowError):
            valid = False
        if not valid:
            raise EdgeBcsError("the saved position of the training is damaged.")
        return cls(**content)


def begin_or_continue(
    earlier: Course | None,
    continues: bool,
    artifact: Artifact,
    *,
    step: int,
    samples: int,
    epochs: int | None,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
) -> Course:
    """Where a training on ``samples`` images begins and ends; see `Trainer.fit`.

    Args:
        earlier: the training that went before. continues: whether this one is to finish it.
        artifact: says what is not given. step: where the state stands.

    Raises EdgeBcsError for options that no training can have, or not the one that is to be finished.
    """
    if epochs is not None and steps is not None:
        raise EdgeBcsError("give the length in epochs or in steps, not both.")
    for name, value in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise EdgeBcsError(f"{name} must be at least 1, not {value}.")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise EdgeBcsError(f"the learning rate must be a positive number, not {learning_rate}.")
    if earlier is not None and continues:
        course = earlier
        if course.samples != samples or batch_size not in (None, course.batch_size):
            raise EdgeBcsError(
                f"the saved training used {course.samples} images in batches of {course.batch_size}; "
                "resume it with the same data and batch size, or start a new one."
            )
    else:
        course = Course(
            first_step=step,
            first_epoch=0 if earlier is None else earlier.next_epoch(step),
            batch_size=batch_size or artifact.batch_size,
            samples=samples,
            learning_rate=artifact.hyper["learning_rate"],
            total_steps=0,
        )
        course.total_steps = course.steps_per_epoch
    if learning_rate is not None:
        course.learning_rate = learning_rate
    if epochs is not None:
        course.total_steps = epochs * course.steps_per_epoch
    elif steps is not None:
        course.total_steps = steps
    return course
