"""What decides the outcome of a training, and how a checkpoint says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from edge_bcs.core.errors import EdgeBcsError
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
from edge_bcs.data.augmentation import Augment, augmentation_of
from edge_bcs.method.distillation import Teacher
from edge_bcs.training.settings import Gradual, Growth


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what a training computes; a checkpoint continues only the plan that made it.

    Attributes:
        objective, beta: the robust loss, and the weight of its second term.
        method: "bcs", or the name of a baseline or of a comparator's phase.
        rewire: one of REWIRE, or "none" for a static mask.
        engine, precision: see `training.settings.Compute`.
        processes: how many train one network.
        schedule: how long, and how the rates change. hyper: the numbers that it changes.
        attack: while training.
        batch_size: images of a step.
        batch_norm: one of BATCH_NORMS.
        augment, balance, validation: see `training.settings.Feed`.
        samples: images of the data set, held out ones included.
        seed: of order, augmentation and attack.
        gradual: see `training.settings.Gradual`; None: the network has its connections from the beginning.
        train: what of the network is trained, see `core.part.Part`.
        growth: see `training.settings.Growth`.
        teacher: from whose answers it learns, too; None: from the labels alone.
        attack_precision: see `training.settings.Compute`.
        pgd_from: share of the steps after which PGD takes the place of a single-step attack; None: never.
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
    augment: Augment
    validation: float
    samples: int
    seed: int
    balance: bool = False
    gradual: Gradual | None = None
    train: str = "all"
    growth: Growth | None = None
    teacher: Teacher | None = None
    attack_precision: str = "f32"
    pgd_from: float | None = None

    def __post_init__(self) -> None:
        """Raise `EdgeBcsError` for what is out of range and in none of the objects."""
        check_count("batch_size", self.batch_size, 1)
        check_number("beta", self.beta)
        check_choice("rewiring", self.rewire, (*REWIRE, "none"))
        check_choice("batch norm", self.batch_norm, BATCH_NORMS)
        self.objective.check_attack(self.attack)
        if self.pgd_from is not None:
            check_number("the share of the steps after which PGD attacks", self.pgd_from, 1)
            if not self.attack.single_step:
                raise EdgeBcsError("PGD attacks from the beginning: pgd_from is for a single-step attack")
        if self.attack_precision == "half" and not self.objective.adversarial:
            raise EdgeBcsError(
                f"{self.objective.name} attacks nothing: leave out that attacks are in half precision"
            )
        if self.schedule.patience is not None and not self.validation:
            raise EdgeBcsError("patience needs images that are held out: give validation a share of them")

    def attack_at(self, step: int, steps: int) -> Attack:
        """Return the attack of a step, from 0, of so many, where none has collapsed."""
        return self.attack if self.pgd_from is None or step < self.pgd_from * steps else self.attack.pgd

    def described(self) -> dict[str, Any]:
        """Return it as a checkpoint has it: names and numbers, flat; of what 0.1 had not, what is used."""
        schedule = self.schedule
        follows = "falls" if schedule.kind != "steps" and schedule.decay == "falls" else None
        since: dict[str, Any] = {
            "warmup": schedule.warmup if schedule.kind == "one-cycle" else schedule.warmup or None,
            "decay": follows,
            "patience": schedule.patience,
            "balance": self.balance or None,
            "train": None if self.train == "all" else self.train,
            "training_attack": self.attack.kind if self.attack.single_step else None,
            "pgd_from": self.pgd_from,
            "attack_precision": None if self.attack_precision == "f32" else self.attack_precision,
        }
        if self.growth is not None:
            since |= {f"growth_{name}": value for name, value in asdict(self.growth).items()}
            since["growth_recycle"] = self.growth.recycle or None
        if self.teacher is not None:
            since |= {
                "teacher": self.teacher.fingerprint,
                "teacher_weight": self.teacher.weight,
                "teacher_temperature": self.teacher.temperature,
            }
        if self.gradual is not None:
            since |= {
                "gradual": self.gradual.share,
                "gradual_sparsity": self.gradual.sparsity,
                "gradual_distribution": self.gradual.distribution,
            }
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
            "augment": augmentation_of(self.augment),
            "validation": self.validation,
            "samples": self.samples,
            "seed": self.seed,
            **{name: value for name, value in since.items() if value is not None},
        }


def default_precision(device: torch.device) -> str:
    """Return the precision of a training that asks for none: bf16 autocast on a GPU, else f32."""
    return "bf16" if device.type == "cuda" else "f32"
