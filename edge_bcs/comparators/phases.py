"""What the comparators share: phases of training one after the other, each with its own length and rate."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.objectives import PSEUDO_LABELLED, objective_named
from edge_bcs.core.progress import say
from edge_bcs.core.settings import Attack, Hyper, Schedule, filled
from edge_bcs.data.adapt import dataset_of
from edge_bcs.data.augmentation import Augment, augmentation_of
from edge_bcs.data.classes import check_names, named
from edge_bcs.data.dataset import Data
from edge_bcs.method.connectivity import sparsify
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.checkpoints import LAST
from edge_bcs.training.devices import choose_device
from edge_bcs.training.loop import run_plan
from edge_bcs.training.plan import TrainingPlan, default_precision
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.settings import Compute, Output
from edge_bcs.training.updates import Sgd, Update


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """A comparator's numbers; the defaults are HYDRA's (SGD, cosine schedule, batches of 128).

    Attributes:
        sparsity: of the network at the end, in [0, 1), as a decimal.
        seed: of initial weights, order, augmentation and attack.
        objective, beta: the robust loss, in every phase.
        pretrain_epochs: of the dense network.
        search_epochs: in which HYDRA learns scores, ADMM its weights.
        epochs: of fine-tuning.
        steps: end every phase after so many steps instead.
        learning_rate, fine_tuning_rate: the highest of the phases before fine-tuning, and of that.
        schedule, warmup, patience: of every phase, as in `Schedule`; ADMM's search always goes to its end.
        dense: patterns of the layers that are not pruned, as in `sparsify`, whose default it has.
        weight_decay: λ_w, inside the gradient. momentum: μ.
        batch_size, attack, batch_norm: as in `training.train`; augment, validation,
            balance: as in its `Feed`.
    """

    sparsity: str
    seed: int = 0
    objective: str = "at"
    beta: float | None = None
    pretrain_epochs: int = 100
    search_epochs: int = 20
    epochs: int = 100
    steps: int | None = None
    learning_rate: float = 0.1
    fine_tuning_rate: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    batch_size: int | None = None
    attack: Attack = field(default_factory=Attack)
    batch_norm: str = "batch"
    augment: Augment = True
    validation: float = 0.02
    balance: bool = False
    schedule: str = "cosine"
    warmup: float | None = None
    patience: int | None = None
    dense: Sequence[str] | None = None


class Phases:
    """Runs phases; each keeps its checkpoints in a folder of its own, the last one in the output folder.

    Args:
        method: name of the comparator.
        settings: its numbers.
        data, pseudo_labelled: as in `training.train`, but for paths.
        classes: names of the outputs in label order; default: those of `pretrained`, or of the data.
        start: "new" if the weights of a trained module may be replaced, as in `sparsify`.
        compute, output, progress: as in `training.train`; a folder that is resumed continues
            where a phase was interrupted, and finished phases are read back.
    """

    def __init__(
        self,
        method: str,
        settings: PhaseSettings,
        data: Any,
        *,
        pseudo_labelled: Any = None,
        classes: Sequence[str] | None = None,
        start: str | None = None,
        compute: Compute | None = None,
        output: str | PathLike[str] | Output | None = None,
        progress: bool = True,
    ) -> None:
        self.method, self.settings, self.progress = method, settings, progress
        self.compute = compute or Compute()
        self.output = output if isinstance(output, Output) else Output(output)
        self.data: Data = dataset_of(data)
        if objective_named(settings.objective).pseudo_labelled != (pseudo_labelled is not None):
            names = " or ".join(PSEUDO_LABELLED)
            raise EdgeBcsError(
                f"the objective {names}, and no other, needs a second, pseudo-labelled data set"
            )
        self.pseudo_labelled = None if pseudo_labelled is None else dataset_of(pseudo_labelled)
        self.start = start
        self.classes = None if classes is None else check_names(classes, "the class names")
        self.folder = None if self.output.folder is None else Path(self.output.folder)
        self.device = choose_device(self.compute.place)
        self.precision = self.compute.precision or default_precision(self.device)
        self.replicas = Replicas.join(self.device)
        if self.folder is None:
            return
        if self.replicas.first:  # from the first phase to the end of the last, as long as this object lives
            weakref.finalize(self, FolderLock(self.folder).release)
        if not self.output.resume and any(self.folder.rglob(LAST)):
            raise EdgeBcsError(f"{self.folder} holds a training already; resume it, or choose another folder")

    def pretrain(self, network: nn.Module, pretrained: SparseModel | None) -> SparseModel:
        """Return a dense robust network: `pretrained`, or one trained for `pretrain_epochs`."""
        start = self.start if pretrained is None else "new"  # what the network holds is replaced all the same
        dense = sparsify(network, 0, self.settings.seed, dense=self.settings.dense, start=start)
        dense.classes = self.classes
        if pretrained is not None:
            if pretrained.layers != dense.layers or pretrained.kappa != dense.size:
                raise EdgeBcsError("the pretrained network is not a dense one with the kernels of the model")
            dense.load_state(pretrained.state())
            dense.classes = pretrained.classes
            if self.classes is not None:
                dense.classes = named(dense.classes, self.classes)
            return dense
        self.run("pretraining", dense, self.settings.pretrain_epochs, self.settings.learning_rate, Sgd())
        return dense

    def fine_tune(self, pruned: SparseModel) -> dict[str, Any]:
        """Train the connections that are left, and return the report of this last phase."""
        return self.run("", pruned, self.settings.epochs, self.settings.fine_tuning_rate, Sgd())

    def run(
        self,
        name: str,
        sparse: SparseModel,
        epochs: int,
        rate: float,
        update: Update,
    ) -> dict[str, Any]:
        """Run one phase ("" is the last one); the network is left with its best epoch."""
        settings = self.settings
        if self.progress and self.replicas.first:
            length = f"{settings.steps} steps" if settings.steps else f"{epochs} epochs"
            say(f"{self.method}: {name or 'fine-tuning'} for {length}")
        objective = objective_named(settings.objective)
        schedule = Schedule(
            epochs=epochs,
            steps=settings.steps,
            kind=settings.schedule,
            decay="stays",
            warmup=settings.warmup,
            patience=settings.patience,
        )
        plan = TrainingPlan(
            objective=objective,
            beta=objective.beta if settings.beta is None else settings.beta,
            method=f"{self.method} {name}".strip(),
            rewire="none",
            engine=self.compute.engine,
            processes=self.replicas.count,
            schedule=schedule,
            batch_size=settings.batch_size or objective.batch_size,
            hyper=filled(
                Hyper(
                    learning_rate=rate,
                    weight_decay=settings.weight_decay,
                    momentum=settings.momentum,
                    noise=0.0,
                ),
                fine_tuning=False,
                batch_norm=settings.batch_norm,
            ),
            attack=settings.attack,
            batch_norm=settings.batch_norm,
            precision=self.precision,
            attack_precision=self.compute.attack_precision,
            augment=augmentation_of(settings.augment),
            balance=settings.balance,
            validation=settings.validation,
            samples=len(self.data),
            seed=settings.seed,
        )
        folder = None if self.folder is None else self.folder / name
        begun = self.output.resume and folder is not None and (folder / LAST).is_file()
        return run_plan(
            sparse,
            self.data,
            plan,
            update,
            pseudo_labelled=self.pseudo_labelled,
            device=self.device,
            compute=self.compute,
            output=replace(self.output, folder=folder, resume=begun),
            progress=self.progress,
        )
