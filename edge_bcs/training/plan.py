"""What decides the outcome of a training, and how a checkpoint says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edge_bcs.core.objectives import Objective
from edge_bcs.core.settings import (
    BATCH_NORMS,
    REWIRE,
    Attack,
    Coefficients,
    Schedule,
    check_choice,
    check_count,
    check_number,
)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what a training computes; a checkpoint continues only the plan that made it.

    Attributes:
        objective, beta: the robust loss, and the weight of its second term.
        method: "bcs", or the name of a baseline or of a comparator's phase.
        rewire: one of REWIRE, or "none" for a static mask.
        engine, precision: see `training.settings.Compute`.
        processes: how many train one network.
        schedule: how long, and how the rates fall. hyper: the numbers of the first step.
        attack: PGD while training.
        batch_size: images of a step.
        batch_norm: one of BATCH_NORMS.
        augment, validation: see `training.settings.Feed`.
        samples: images of the data set, held out ones included.
        seed: of order, augmentation and attack.
    """

    objective: Objective
    beta: float
    method: str
    rewire: str
    engine: str
    processes: int
    schedule: Schedule
    batch_size: int
    hyper: Coefficients
    attack: Attack
    batch_norm: str
    precision: str
    augment: bool
    validation: float
    samples: int
    seed: int

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for what is out of range and in none of the objects."""
        check_count("batch_size", self.batch_size, 1)
        check_number("beta", self.beta)
        check_choice("rewiring", self.rewire, (*REWIRE, "none"))
        check_choice("batch norm", self.batch_norm, BATCH_NORMS)

    def described(self) -> dict[str, Any]:
        """Return it as a checkpoint has it: names and numbers, flat."""
        return {
            "objective": self.objective.name,
            "beta": self.beta,
            "method": self.method,
            "rewire": self.rewire,
            "engine": self.engine,
            "processes": self.processes,
            "epochs": self.schedule.epochs,
            "steps": self.schedule.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.hyper.learning_rate,
            "weight_decay": self.hyper.weight_decay,
            "schedule": self.schedule.kind,
            "momentum": self.hyper.momentum,
            "noise": self.hyper.noise,
            "epsilon": self.attack.epsilon,
            "step_size": self.attack.step_size,
            "attack_steps": self.attack.steps,
            "batch_norm": self.batch_norm,
            "precision": self.precision,
            "augment": self.augment,
            "validation": self.validation,
            "samples": self.samples,
            "seed": self.seed,
        }


def default_precision(device: torch.device) -> str:
    """Return the precision of a training that asks for none: bf16 autocast on a GPU, else f32."""
    return "bf16" if device.type == "cuda" else "f32"
