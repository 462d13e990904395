"""What a user sets of a training, on the host or on a board: the attack, the hyper-parameters, the schedule.

Each checks its own ranges, and nothing else does. `filled` is where numbers that depend on others get theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from edge_bcs.core.errors import EdgeBcsError

BATCH_NORMS = ("frozen", "batch")
"""Running statistics, or those of each (micro-)batch."""
REWIRE = ("uniform", "by-layer")
"""Where connections are born: anywhere (Algorithm 1), or layer by layer (the released code)."""
KINDS = ("steps", "cosine")
"""Of schedules."""
MOST_ATTACK_STEPS = 100_000
_PAPER_RATE, _FROZEN_RATE = 0.1, 0.001
_DECAY = 5e-4
_DECAY_OF_RATE = 5e-3  # the paper's ratio: 5e-4 at 0.1


@dataclass(frozen=True, kw_only=True)
class Attack:
    """PGD while training, in units of pixels in [0, 1]: how far, in which steps.

    Attributes:
        epsilon: l∞ radius, 0 to 1.
        step_size: length of a step, 0 to 1.
        steps: how many, 0 to 100,000.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        check_number("epsilon", self.epsilon, 1)
        check_number("step_size", self.step_size, 1)
        check_count("attack_steps", self.steps, 0, MOST_ATTACK_STEPS)


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
    """How long a training is, and how its rates fall.

    Attributes:
        epochs: passes over the data, at least 1.
        steps: end after so many steps instead, at least 1.
        kind: "steps": λ and λ_w are divided by 10 from half of the steps on, by 100 from three quarters on
            (the paper). "cosine": λ falls along half a cosine to 0, λ_w stays (HYDRA and other comparators).
    """

    epochs: int = 200
    steps: int | None = None
    kind: str = "steps"

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range or an unknown kind."""
        check_count("epochs", self.epochs, 1)
        if self.steps is not None:
            check_count("steps", self.steps, 1)
        check_choice("schedule", self.kind, KINDS)

    def at(self, first: Coefficients, step: int, total: int) -> Coefficients:
        """Return the numbers at ``step`` (from 0) of ``total``, in a training that began with ``first``."""
        if self.kind == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * step / total))
            return replace(first, learning_rate=first.learning_rate * share)
        divided = divisor(step, total)
        rate, decay = first.learning_rate / divided, first.weight_decay / divided
        return replace(first, learning_rate=rate, weight_decay=decay)


def divisor(step: int, total: int) -> int:
    """Return what divides λ and λ_w at ``step`` of ``total``: 1, from 50 % on 10, from 75 % on 100."""
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
