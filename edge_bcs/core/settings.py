"""What a user sets of a training, on the host or on a board: the attack, the hyper-parameters, the schedule.

Each checks its own ranges, and nothing else does. `filled` is where numbers that depend on others get theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral, Real
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

BATCH_NORMS = ("frozen", "batch")
"""Running statistics, or those of each (micro-)batch."""
REWIRE = ("uniform", "by-layer")
"""Where connections are born: anywhere (Algorithm 1), or layer by layer (the released code)."""
AUGMENTATIONS = ("none", "shift", "photo", "zoom", "mix", "mirror")
"""What may be done to an image before it is trained on (see `edge_bcs.data.augmentation`)."""
PRECISIONS = ("f32", "half", "auto")
"""Of an attack in training: float32; two bytes a number, where the processor has arithmetic in it; or
what the processor has."""
KINDS = ("steps", "cosine", "one-cycle")
"""Of schedules."""
DECAYS = ("falls", "stays")
_RISE = 0.3  # of the steps of one cycle
_FIRST, _LAST = 25.0, 1e4  # how often what λ begins with goes into its highest, and its last into that
MOST_ATTACK_STEPS = 100_000
ATTACKS = ("pgd", "fgsm-rs", "n-fgsm")
"""With which a training may craft its images (see `Attack`)."""
NO_BALL = 1.0
"""A radius that no pixel can leave."""
_FAST_STEP = 1.25  # of ε: Wong et al. (2020)
_NOISE = 2.0  # of ε: de Jorge et al. (2022)
_PAPER_RATE, _FROZEN_RATE = 0.1, 0.001
_DECAY = 5e-4
_DECAY_OF_RATE = 5e-3  # the paper's ratio: 5e-4 at 0.1


@dataclass(frozen=True)
class Crafting:
    """How an image is attacked, whatever for; in units of pixels in [0, 1], in which it is clipped always.

    Attributes:
        start: "uniform" in ±noise, "gaussian" (0.001·N(0, 1)), or "none": the image itself.
        noise: of a uniform start.
        radius: of the l∞ ball to which each step is clipped; `NO_BALL`: it is not.
        step_size: length of a step. steps: how many.
    """

    start: str
    noise: float
    radius: float
    step_size: float
    steps: int


def descent(epsilon: float, steps: int) -> Crafting:
    """Return PGD as a network is measured with it: a uniform start, and steps of 2.5·ε/steps (Madry et al.,
    2018)."""
    return Crafting("uniform", epsilon, epsilon, 2.5 / max(steps, 1) * epsilon, steps)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The attack of a training, in units of pixels in [0, 1]: how far, in which steps.

    The two of a single step take a tenth of PGD-10's passes for the attack. Either may collapse: the network
    learns to fool the step, and PGD finds every image. That is watched (`edge_bcs.core.collapse`), and what
    has collapsed goes on with PGD.

    Attributes:
        epsilon: l∞ radius, 0 to 1.
        step_size: length of a step of PGD, 0 to 1.
        steps: how many, 0 to 100,000.
        kind: "pgd"; "fgsm-rs", one step of 1.25 ε from a uniform start in the ball, clipped to the ball (Wong
            et al., 2020); or "n-fgsm", one step of ε from uniform noise of ±2 ε, not clipped to the ball (de
            Jorge et al., 2022). PGD of ``steps`` steps is then what measures the images that are held out,
            and what the training falls back on.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    kind: str = ATTACKS[0]

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range, or a kind that there is not."""
        check_number("epsilon", self.epsilon, 1)
        check_number("step_size", self.step_size, 1)
        check_count("attack_steps", self.steps, 0, MOST_ATTACK_STEPS)
        check_choice("training attack", self.kind, ATTACKS)
        if self.single_step and self.steps == 0:
            raise EdgeBcsError(f"{self.kind} needs a PGD to fall back on: attack_steps of at least 1, not 0")

    @property
    def single_step(self) -> bool:
        """Whether it takes one step, whose images may turn out to be no attack."""
        return self.kind != "pgd"

    @property
    def pgd(self) -> Attack:
        """What it falls back on."""
        return replace(self, kind="pgd")

    @property
    def steps_taken(self) -> int:
        """Gradients of an image that it takes."""
        return 1 if self.single_step else self.steps

    def crafting(self, start: str) -> Crafting:
        """Return what is done to an image; PGD begins where ``start`` says, as the objective has it."""
        if self.kind == "fgsm-rs":
            return Crafting("uniform", self.epsilon, self.epsilon, _FAST_STEP * self.epsilon, 1)
        if self.kind == "n-fgsm":
            return Crafting("uniform", _NOISE * self.epsilon, NO_BALL, self.epsilon, 1)
        return Crafting(start, self.epsilon, self.epsilon, self.step_size, self.steps)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The numbers of one update; the defaults are the paper's.

    Attributes:
        learning_rate: λ, of both the gradient and the noise.
        weight_decay: λ_w, decoupled, not scaled by the learning rate.
        momentum: μ.
        noise: σ; the noise has standard deviation λ·σ.
    """

    learning_rate: float = _PAPER_RATE
    weight_decay: float = _DECAY
    momentum: float = 0.9
    noise: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Hyper-parameters of a training, each at least 0; its first step has them as they are.

    Attributes:
        learning_rate: λ. Default: 0.1, the paper's; in fine-tuning with frozen statistics 0.001, for nothing
            rescales activations that grow.
        weight_decay: λ_w, decoupled, not scaled by λ. Default: 5e-4, the paper's; in fine-tuning 0.005·λ, the
            paper's ratio.
        momentum: μ.
        noise: σ; the noise has standard deviation λ·σ. Methods that do not rewire have none.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float = Coefficients.momentum
    noise: float = Coefficients.noise

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        check_number("momentum", self.momentum)
        check_number("noise", self.noise)


def filled(hyper: Hyper, *, fine_tuning: bool, batch_norm: str) -> Coefficients:
    """Return the numbers with which a training begins: those of ``hyper``, and the defaults of the others.

    Args:
        hyper: what the user set.
        fine_tuning: whether a trained network is adapted, as on a board; else it is trained from scratch.
        batch_norm: one of BATCH_NORMS.
    """
    rate, decay = hyper.learning_rate, hyper.weight_decay
    if rate is None:
        rate = _FROZEN_RATE if fine_tuning and batch_norm == "frozen" else _PAPER_RATE
    if decay is None:
        decay = _DECAY_OF_RATE * rate if fine_tuning else _DECAY
    return Coefficients(learning_rate=rate, weight_decay=decay, momentum=hyper.momentum, noise=hyper.noise)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training is, and how its rates change.

    Attributes:
        epochs: passes over the data, at least 1.
        steps: end after so many steps instead, at least 1.
        kind: "steps": λ is divided by 10 from half of the steps on, by 100 from three quarters on (the
            paper). "cosine": λ falls along half a cosine to 0. "one-cycle": λ rises along half a cosine from
            a 25th of its highest, which the hyper-parameters say, and falls along another to a 10,000th of
            where it began (Smith & Topin, 2018; momentum stays).
        warmup: share of the steps, at least 0 and below 1, in which λ rises: step by step from near 0, or as
            one cycle does. Default: 0, in one cycle 0.3.
        decay: λ_w "falls" and rises as λ does, as in the paper: it is decoupled, and would else outlive the
            gradient. "stays": for the comparators, which have it inside the gradient.
        patience: end after so many epochs without a higher accuracy on the images that are held out; None:
            do all of them.
    """

    epochs: int = 200
    steps: int | None = None
    kind: str = "steps"
    warmup: float | None = None
    decay: str = "falls"
    patience: int | None = None

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range or an unknown kind."""
        check_count("epochs", self.epochs, 1)
        if self.steps is not None:
            check_count("steps", self.steps, 1)
        check_choice("schedule", self.kind, KINDS)
        check_choice("decay", self.decay, DECAYS)
        if self.warmup is not None:
            check_number("warmup", self.warmup, 1)
            if self.warmup == 1:
                raise EdgeBcsError("warmup must be a share below 1: no step would be left after it")
        if self.patience is not None:
            check_count("patience", self.patience, 1)

    def at(self, first: Coefficients, step: int, total: int) -> Coefficients:
        """Return the numbers at ``step`` (from 0) of ``total``, in a training whose numbers are ``first``."""
        rate, decay = self.rates(first.learning_rate, first.weight_decay, step, total)
        return replace(first, learning_rate=rate, weight_decay=decay)

    def rates(self, rate: float, decay: float, step: int, total: int) -> tuple[float, float]:
        """Return λ and λ_w at ``step`` (from 0) of ``total`` where they are ``rate`` and ``decay`` unless the
        schedule changes them."""
        share, divided = self._share(step, total), divisor(step, total) if self.kind == "steps" else 1
        falling = decay * share / divided if self.decay == "falls" else decay
        return rate * share / divided, falling

    def _share(self, step: int, total: int) -> float:
        """What multiplies λ, beside the divisor of "steps"."""
        if self.kind == "one-cycle":
            return _one_cycle(step, total, _RISE if self.warmup is None else self.warmup)
        rise = (self.warmup or 0.0) * total
        share = min(1.0, (step + 1) / rise) if rise else 1.0
        if self.kind == "cosine" and step > rise:
            share *= 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))
        return share


CONFIDENCE, UNLABELLED_SHARE, UNLABELLED_WEIGHT = 0.9, 0.5, 1.0
"""What `Unlabelled` leaves open."""


@dataclass(frozen=True)
class Unlabelled:
    """Images without labels that a training on a board uses beside its labelled ones: robust self-training
    (Carmon et al., 2019).

    Before each epoch the network, as it then is, answers to each of them. An answer that it is sure of is the
    image's label in this epoch. An image without one is left out of it; with trades and rst it takes part
    in the second term, which needs no label.

    A batch has a fixed share of them. An epoch is one pass over the labelled or the unlabelled images,
    whichever takes more steps; the others come up in several passes.

    Attributes:
        data: a folder of photographs, in folders of any depth; images [N, C, H, W] as of labelled data; or a
            data set, whose labels are not looked at.
        confidence: probability, from 0 to 1, from which on an answer is a label. Default, of this and the
            next two: what a training that is resumed had, else 0.9.
        share: of a batch, above 0 and below 1, that has no labels; it is smaller where there are not so many.
            Default: a half.
        weight: of such an image in the loss, above 0, where a labelled one has 1. Default: 1.
    """

    data: Any
    _: KW_ONLY
    confidence: float | None = None
    share: float | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        if self.confidence is not None:
            check_number("confidence", self.confidence, 1)
        if self.share is not None:
            check_number("the share of unlabelled images", self.share, 1)
            if self.share in (0, 1):
                raise EdgeBcsError(
                    f"the share of unlabelled images must lie between 0 and 1, not be {self.share}"
                )
        if self.weight is not None:
            check_number("the weight of unlabelled images", self.weight)
            if self.weight == 0:
                raise EdgeBcsError("the weight of unlabelled images must be above 0")


def _one_cycle(step: int, total: int, rise: float) -> float:
    """Share of the highest rate: where torch.optim.lr_scheduler.OneCycleLR has it."""
    top, last = max(rise * total - 1, 0.0), total - 1
    first = 1 / _FIRST
    if step < top:
        return _between(first, 1.0, step / top)
    return _between(1.0, first / _LAST, (step - top) / (last - top) if last > top else 0.0)


def _between(one: float, other: float, way: float) -> float:
    """From ``one`` to ``other`` along half a cosine, of which ``way`` is done."""
    return other + (one - other) * 0.5 * (1 + math.cos(math.pi * way))


def divisor(step: int, total: int) -> int:
    """Return what "steps" divides λ and λ_w by at ``step`` of ``total``: 1, from 50 % on 10, from 75 % on
    100."""
    return 100 if 4 * step >= 3 * total else 10 if 2 * step >= total else 1


def check_number(name: str, value: object, high: float = math.inf) -> None:
    """Raise `EdgeBcsError` unless the value is a finite number from 0 to ``high``."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not 0 <= value <= high or value == math.inf:  # type: ignore[operator]
        allowed = "of at least 0" if high == math.inf else f"from 0 to {high:g}"
        raise EdgeBcsError(f"{name} must be a number {allowed}, not {value}")


def check_count(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `EdgeBcsError` unless the value is a whole number from ``low`` to ``high``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise EdgeBcsError(f"{name} must be a whole number {allowed}, not {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `EdgeBcsError` unless the value is one of the choices."""
    if value not in choices:
        named = " or ".join([", ".join(choices[:-1]), choices[-1]])
        raise EdgeBcsError(f"the {name} is {named}, not {value!r}")
