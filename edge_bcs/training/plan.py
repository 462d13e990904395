"""What decides the outcome of a training: numbers, checked, and their schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edge_bcs.core.errors import EdgeBcsError

SCHEDULES = ("steps", "cosine")
ENGINES = ("torch", "sparse")
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what a training computes; a checkpoint continues only the plan that made it."""

    objective: str
    beta: float | None
    method: str
    rewire: str
    engine: str
    processes: int
    epochs: int
    steps: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    momentum: float
    noise: float
    epsilon: float
    step_size: float
    attack_steps: int
    batch_norm: str
    precision: str
    augment: bool
    validation: float
    samples: int
    seed: int

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for a number out of range."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise EdgeBcsError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise EdgeBcsError(f"steps must be at least 1, not {self.steps}")
        for name in ("learning_rate", "weight_decay", "momentum", "noise", "epsilon", "step_size"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise EdgeBcsError(f"{name} must be a number of at least 0, not {getattr(self, name)}")
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise EdgeBcsError(f"beta must be a number of at least 0, not {self.beta}")
        if not 0 <= self.validation < 1:
            raise EdgeBcsError(f"the held-out fraction must be at least 0 and below 1, not {self.validation}")
        choices = (("schedule", SCHEDULES), ("engine", ENGINES), ("precision", PRECISIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise EdgeBcsError(f"the {name} is {' or '.join(known)}, not {getattr(self, name)!r}")

    def rates(self, step: int, total: int) -> tuple[float, float]:
        """Return λ and λ_w at `step` of `total`.

        "steps": both divided by 10 from 50 % on and by 100 from 75 % on (the paper). "cosine": λ falls along
        half a cosine to 0, λ_w stays (HYDRA and the other comparators).
        """
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total)), self.weight_decay
        divided = divisor(step, total)
        return self.learning_rate / divided, self.weight_decay / divided


def divisor(step: int, total: int) -> int:
    """Return what divides λ and λ_w at `step` of `total`: 1, then 10 from 50 % on, 100 from 75 % on."""
    return 100 if 4 * step >= 3 * total else 10 if 2 * step >= total else 1


def default_precision(device: torch.device) -> str:
    """Return the precision of a training that asks for none: bf16 autocast on a GPU, else f32."""
    return "bf16" if device.type == "cuda" else "f32"
