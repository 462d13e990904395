"""Where a training begins and ends: saved with the state, so that a resumed training is the same one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object


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

    def divisor(self, done: int) -> float:
        """What divides λ and λ_w after ``done`` steps: 1, then 10 from 50 % on, 100 from 75 % on."""
        return 100.0 if 4 * done >= 3 * self.total_steps else 10.0 if 2 * done >= self.total_steps else 1.0

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
