"""Where a training begins and ends: saved with the state, so that a resumed training is the same one."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact

from edge_bcs.core.collapse import Watch
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.objectives import NO_LABEL
from edge_bcs.core.settings import (
    AUGMENTATIONS,
    CONFIDENCE,
    KINDS,
    UNLABELLED_SHARE,
    UNLABELLED_WEIGHT,
    Schedule,
    Unlabelled,
)
from edge_bcs.data.augmentation import Augment, named

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a call of `Trainer.fit` says of its training; None: what the saved one had, or the default."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    augment: Augment | None = None
    balance: bool | None = None
    validation: float | None = None
    patience: int | None = None
    unlabelled: Unlabelled | None = None

    def __post_init__(self) -> None:
        """Raise EdgeBcsError for what no training can have."""
        if self.epochs is not None and self.steps is not None:
            raise EdgeBcsError("give the length in epochs or in steps, not both.")
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EdgeBcsError(f"{name} must be at least 1, not {value}.")
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise EdgeBcsError(f"the learning rate must be a positive number, not {rate}.")
        Schedule(kind=self.schedule or KINDS[0], warmup=self.warmup, patience=self.patience)
        if self.validation is not None and not 0 <= self.validation < 1:
            raise EdgeBcsError(
                f"the held-out fraction must be at least 0 and below 1, not {self.validation}."
            )
        if self.augment is not None:
            named(self.augment)

    def changes(self) -> dict[str, Any]:
        """Return the fields of a course that it says, but for the length."""
        names = ("learning_rate", "schedule", "warmup", "balance", "patience")
        said = {name: getattr(self, name) for name in names}
        said["augment"] = None if self.augment is None else named(self.augment)
        if self.unlabelled is not None:
            said["confidence"] = self.unlabelled.confidence
            said["unlabelled_weight"] = self.unlabelled.weight
        return {name: value for name, value in said.items() if value is not None}


@dataclass
class Course:
    """One training of `Trainer.fit`.

    Attributes:
        first_step, first_epoch: steps and epochs of trainings that went before.
        batch_size, samples: images of a step, and of the data set.
        total_steps: how long it is. learning_rate: λ, which the schedule changes.
        skipped: steps left out so far because something was not finite.
        schedule, warmup: how λ and λ_w change, see `edge_bcs.core.settings.Schedule`.
        augment, balance: what it sees of the data, see `edge_bcs.data.augmentation` and
            `edge_bcs.data.balance`.
        validation: share of the images that is held out to choose the best epoch; ``samples`` are without it.
        patience: see `Schedule`.
        measured: steps done when the held-out images were measured last. risen: when they were better than
            ever before.
        best_step: of the best state; best_score: its accuracy, under attack where the training has one.
        returned: whether the training is over and has gone back to the best state.
        watch: of a single-step attack, whether it has collapsed; None where there is none, or nothing is
            known yet.
        unlabelled: how many images without labels it has beside ``samples``; these and the next three as in
            `edge_bcs.Unlabelled`.
        pseudo_labels: what the network took them for in the epoch ``pseudo_epoch``, by `packed`; so that a
            training that is resumed within an epoch goes on with them.
    """

    first_step: int
    first_epoch: int
    batch_size: int
    samples: int
    total_steps: int
    learning_rate: float
    skipped: int = 0
    schedule: str = "steps"
    warmup: float | None = None
    augment: str = "shift"
    balance: bool = False
    validation: float = 0.0
    patience: int | None = None
    measured: int = 0
    risen: int = 0
    best_step: int = 0
    best_score: float = -1.0
    returned: bool = False
    unlabelled: int = 0
    unlabelled_share: float = UNLABELLED_SHARE
    unlabelled_weight: float = UNLABELLED_WEIGHT
    confidence: float = CONFIDENCE
    pseudo_labels: str = ""
    pseudo_epoch: int = -1
    watch: Watch | None = None

    @property
    def unlabelled_places(self) -> int:
        """How many places of a batch are for images without labels."""
        wanted = min(round(self.unlabelled_share * self.batch_size), self.batch_size - 1)
        return min(max(1, wanted), self.unlabelled)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data, where the last one may have fewer images; of labelled and
        unlabelled images, of the pass that takes longer."""
        places = self.unlabelled_places
        steps = -(-self.samples // (self.batch_size - places))
        return max(steps, -(-self.unlabelled // places)) if places else steps

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

    def is_over(self, done: int) -> bool:
        """Whether no step comes after ``done`` steps: all are done, or patience is over."""
        return done >= self.total_steps or self.gives_up

    @property
    def gives_up(self) -> bool:
        """Whether patience is over."""
        waited = self.measured - self.risen
        return self.patience is not None and waited >= self.patience * self.steps_per_epoch

    def is_to_be_measured(self, done: int) -> bool:
        """Whether an epoch has ended after ``done`` steps, and its held-out images are not measured yet."""
        ends = done % self.steps_per_epoch == 0 or done >= self.total_steps
        return self.validation > 0 and ends and done > self.measured

    def note(self, done: int, score: float) -> bool:
        """Note the accuracy on the held-out images after ``done`` steps; return whether it is the best.

        A level epoch is the new best one, but patience does not begin anew with it.
        """
        self.measured, best = done, score >= self.best_score
        if score > self.best_score:
            self.risen = done
        if best:
            self.best_step, self.best_score = self.first_step + done, score
        return best

    def rates(self, done: int, hyper: Mapping[str, float]) -> tuple[float, float]:
        """λ and λ_w of the step after ``done`` steps; ``hyper`` are the artifact's, whose ratio they keep."""
        # The decay is not multiplied by the learning rate (Algorithm 1), so it must follow it here.
        ratio = self.learning_rate / hyper["learning_rate"] if hyper["learning_rate"] else 1.0
        schedule = Schedule(kind=self.schedule, warmup=self.warmup)
        return schedule.rates(self.learning_rate, hyper["weight_decay"] * ratio, done, self.total_steps)

    def dump(self) -> str:
        """The course as JSON; of what older versions do not read, what is not the default."""
        content = asdict(self)
        for name, default in _SINCE.items():
            if content[name] == default:
                del content[name]
        return json.dumps(content, sort_keys=True)

    @classmethod
    def parse(cls, text: str, step: int) -> Course:
        """Read what `dump` wrote, for a state that stands at ``step``; EdgeBcsError if it makes no sense."""
        try:
            content = {"skipped": 0, **_SINCE, **parse_object(text)}  # the oldest runs counted none
            if content["watch"] is not None:
                content["watch"] = Watch.parse(content["watch"])
            course = cls(**content)
            valid = course.is_possible() and course.first_step <= step
        except (ValueError, TypeError, OverflowError, EdgeBcsError):
            valid = False
        if not valid:
            raise EdgeBcsError("the saved position of the training is damaged.")
        return course

    def is_possible(self) -> bool:
        """Whether every field is of its kind and in its range. Raises EdgeBcsError or TypeError as well."""
        counts = (
            self.first_step,
            self.first_epoch,
            self.batch_size,
            self.samples,
            self.total_steps,
            self.skipped,
        )
        if not all(type(count) is int and count >= 0 for count in counts) or not (
            self.batch_size and self.samples
        ):
            return False
        more = (self.measured, self.risen, self.best_step, self.unlabelled, self.pseudo_epoch + 1)
        if not all(type(count) is int and count >= 0 for count in more):
            return False
        numbers = {"confidence": self.confidence, "weight": self.unlabelled_weight}
        Unlabelled(None, share=self.unlabelled_share, **numbers)
        if self.pseudo_epoch >= 0 and len(unpacked(self.pseudo_labels)) != self.unlabelled:
            return False
        if self.unlabelled and self.batch_size < 2:
            return False
        Wishes(warmup=self.warmup, validation=self.validation, patience=self.patience)
        Schedule(kind=self.schedule)
        rate = self.learning_rate
        return (
            isinstance(rate, int | float)
            and math.isfinite(rate)
            and rate >= 0
            and self.augment in AUGMENTATIONS
            and type(self.balance) is type(self.returned) is bool
            and isinstance(self.best_score, int | float)
            and math.isfinite(self.best_score)
        )


_SINCE = {
    field.name: field.default
    for field in fields(Course)
    if field.default is not MISSING and field.name != "skipped"
}
"""What a course has that does not say these: fields that 0.1 did not have."""


def packed(labels: Array) -> str:
    """Return labels i64[N], at least −1, as text: as many bytes each as they need."""
    smallest = np.min_scalar_type(-int(labels.max(initial=0)) - 1)
    kind = f"<i{smallest.itemsize}"
    return f"{kind[1:]}:{base64.b64encode(labels.astype(kind).tobytes()).decode()}"


def unpacked(text: str) -> Array:
    """Return the labels i64[N] that `packed` wrote; ValueError or EdgeBcsError if it did not."""
    if not isinstance(text, str):
        raise ValueError("labels that are no text")
    kind, _, content = text.partition(":")
    if kind not in ("i1", "i2", "i4", "i8"):
        raise ValueError("labels of an unknown kind")
    labels = np.frombuffer(base64.b64decode(content, validate=True), f"<{kind}").astype(np.int64)
    if labels.min(initial=0) < NO_LABEL:
        raise ValueError("a label below −1")
    return labels


def begin_or_continue(
    earlier: Course | None,
    continues: bool,
    artifact: Artifact,
    wishes: Wishes,
    *,
    step: int,
    images: int,
    unlabelled: int = 0,
) -> Course:
    """Where a training on so many ``images``, held-out ones included, and so many ``unlabelled`` ones begins
    and ends; see `Trainer.fit`.

    Args:
        earlier: the training that went before. continues: whether this one is to finish it.
        artifact: says what is not given. wishes: what is. step: where the state stands.

    Raises EdgeBcsError for options that are not those of the training that is to be finished, or if no image
    is left to train on.
    """
    finishes = earlier is not None and continues
    validation = wishes.validation
    if finishes and earlier is not None:
        if validation not in (None, earlier.validation):
            raise EdgeBcsError(
                f"the saved training holds {earlier.validation:g} of its images out, not {validation:g}; "
                "resume it with the same share, or start a new one."
            )
        validation = earlier.validation
    validation = validation or 0.0
    samples = images - round(validation * images)
    if samples < 1 or (validation and samples == images):
        raise EdgeBcsError(f"{images} images are too few to hold {validation:g} of them out.")
    if finishes and earlier is not None:
        course = earlier
        if course.samples != samples or wishes.batch_size not in (None, course.batch_size):
            raise EdgeBcsError(
                f"the saved training used {course.samples} images in batches of {course.batch_size}; "
                "resume it with the same data and batch size, or start a new one."
            )
        _check_same_unlabelled(course, wishes.unlabelled, unlabelled)
    else:
        course = Course(
            first_step=step,
            first_epoch=0 if earlier is None else earlier.next_epoch(step),
            batch_size=wishes.batch_size or artifact.batch_size,
            samples=samples,
            learning_rate=artifact.hyper["learning_rate"],
            total_steps=0,
            validation=validation,
            unlabelled=unlabelled,
        )
        if wishes.unlabelled is not None and wishes.unlabelled.share is not None:
            course.unlabelled_share = wishes.unlabelled.share
        if unlabelled and course.batch_size < 2:
            raise EdgeBcsError("a batch of 1 image has no place for an unlabelled one: take larger batches.")
        course.total_steps = course.steps_per_epoch
    course = replace(course, **wishes.changes())
    if course.patience is not None and not course.validation:
        raise EdgeBcsError("patience needs images that are held out: give validation a share of them.")
    if wishes.epochs is not None:
        course.total_steps = wishes.epochs * course.steps_per_epoch
    elif wishes.steps is not None:
        course.total_steps = wishes.steps
    return course


def _check_same_unlabelled(course: Course, given: Unlabelled | None, count: int) -> None:
    """Raise EdgeBcsError unless a training goes on with the unlabelled images that it began with."""
    if course.unlabelled and given is None:
        raise EdgeBcsError(
            f"the saved training used {course.unlabelled} unlabelled images, too: resume it with them "
            "(--unlabelled), or start a new one."
        )
    if course.unlabelled != count:
        raise EdgeBcsError(
            f"the saved training used {course.unlabelled or 'no'} unlabelled images, not {count}; resume it "
            "with the same ones, or start a new one."
        )
    if given is not None and given.share not in (None, course.unlabelled_share):
        raise EdgeBcsError(
            f"the saved training filled {course.unlabelled_share:g} of a batch with unlabelled images, not "
            f"{given.share:g}; resume it with the same share, or start a new one."
        )
