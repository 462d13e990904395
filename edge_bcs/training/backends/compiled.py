"""Training steps through the sparse artifact that the network compiles to, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.scratch import ScratchFolder
from edge_bcs.core.settings import Coefficients, Hyper
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.state import NEWBORN
from edge_bcs.data.dataset import Data
from edge_bcs.method.device_step import raise_if_failed
from edge_bcs.method.growth import Coo, grown
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.backends.base import Batch, Numbers
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.settings import Growth
from edge_bcs.training.updates import Rewiring, Update, keep_mask

Array = np.ndarray[Any, Any]
_COO = ("coo.value", "coo.index", "coo.momentum")
_STATISTICS = ("batchnorm.mean", "batchnorm.variance")
_GRADIENT = ".value_grad.accumulation.buffer"


class CompiledBackend:
    """Steps through the artifact that the network compiles to, on the CPU (`edge_bcs.runtime.Trainer`).

    A micro-batch is the whole batch, so that batch norm has the statistics that PyTorch would take. Which
    kernel a layer uses (sparse or dense) is chosen once, from the connectivity at the beginning. A static
    mask is trained by the same graphs, with an update that does not rewire. Any other update than Algorithm
    1's is done in PyTorch, on the network, with the gradients of the graphs; where it needs those of dormant
    weights, the graphs are those of a network that has all of them, the dormant ones next to nothing. So a
    unit that has neither a connection nor a bias or norm is on the verge of opening there, and shut in
    PyTorch.
    """

    lag = 0

    def __init__(
        self, sparse: SparseModel, plan: TrainingPlan, update: Update, shape: Any, threads: int | None
    ) -> None:
        from edge_bcs.exporters import export
        from edge_bcs.exporters.half import LANES
        from edge_bcs.exporters.settings import Memory
        from edge_bcs.targets.cost_model import lanes_of

        self.sparse, self.plan, self.update, self.threads = sparse, plan, update, threads
        self._in_pytorch = not isinstance(update, Rewiring)
        self._hyper, self._deaths = plan.hyper, 0  # of the last step's update in PyTorch
        self.attack = plan.attack
        self._trainer: Any = None
        if plan.attack_precision == "half" and lanes_of(max(plan.batch_size, 2)) not in LANES:
            raise EdgeBcsError(
                "attacks in half precision take 8 images or a multiple of 16 at a time, not "
                f"{plan.batch_size}: choose another batch size, or the attack precision f32"
            )
        self._folder = ScratchFolder("train")
        try:
            self._artifact = export(
                _with_all(sparse) if update.needs_all_gradients else sparse,
                self._folder.path / "artifact",
                objective=plan.objective.name,
                input_shape=tuple(shape),
                memory=Memory(micro_batch=max(plan.batch_size, 2)),
                batch_norm=plan.batch_norm,
                train=plan.train,
                batch_size=plan.batch_size,
                attack=plan.attack,
                attack_precision=plan.attack_precision,
                beta=plan.beta,
                hyper=Hyper(**asdict(plan.hyper)),
                epochs=plan.schedule.epochs,
                validate=False,
            )
        except BaseException:
            self._folder.remove()
            raise

    def load(self, step: int) -> None:
        """See `Backend`."""
        from edge_bcs.runtime.state import write_run

        run = self._folder.path / "run"
        metadata = {"step": str(step), "seed": str(self.plan.seed)}
        network = _with_all(self.sparse) if self.update.needs_all_gradients else self.sparse
        write_run(run, self._artifact, self._artifact.trained.of(network.state()), metadata)
        trainer = _trainer()
        if self._in_pytorch:
            trainer = _updated_by(self._update_in_pytorch)
        elif self.plan.rewire == "none":
            trainer = _updated_by(_keep_mask)
        self._trainer = trainer(run, threads=self.threads, attack_precision=self.plan.attack_precision)

    def step(
        self, batch: Batch, hyper: Coefficients, step: int, signals: HeldSignals
    ) -> Callable[[], Numbers]:
        """See `Backend`."""
        trainer = self._trainer
        trainer.learning_rate, trainer.weight_decay = hyper.learning_rate, hyper.weight_decay
        trainer.momentum, trainer.noise = hyper.momentum, hyper.noise
        trainer.attack, self._hyper = self.attack, hyper
        metrics = trainer.step_holding(signals, batch.images, batch.labels)
        shares = [metrics["accuracy"]]
        if self.plan.objective.two_branches:
            shares.append(metrics["robust_accuracy"])
        correct = [float(round(share * batch.whole)) for share in shares]
        deaths = self._deaths if self._in_pytorch else sum(trainer.connections().died.values())
        numbers = Numbers(metrics["loss"], correct, deaths)
        return lambda: numbers

    def _update_in_pytorch(self, trainer: Any) -> None:
        """Let the update have the gradients in the buffers, and the buffers what it makes of the weights."""
        sparse, arrays = self.sparse, trainer.buffers
        sparse.take_gradients(*(torch.from_numpy(arrays[f"{kind}{_GRADIENT}"]) for kind in ("coo", "dense")))
        result = self.update(sparse, self._hyper, step=trainer.steps, failed=None)
        self._deaths = raise_if_failed(result, trainer.steps)
        everything = self.update.needs_all_gradients
        arrays["coo.value"][...] = _next_to_nothing(sparse) if everything else sparse.coo()[0]
        arrays["dense.value"][...] = sparse.dense_value.numpy()

    def grow(self, batch: Batch, count: int, growth: Growth, step: int) -> int:
        """See `Backend`."""
        self._trainer.attack = self.attack
        return grow(self._trainer, batch.images, batch.labels, count, growth, step)

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """See `Backend`; PGD takes steps of 2.5·ε/steps (2/255 with the paper's numbers)."""
        steps = max(1, self.plan.attack.steps) if self.plan.objective.adversarial else 0
        report = self._trainer.evaluate(data, steps, epsilon=self.plan.attack.epsilon)
        return report["accuracy"], report.get("robust_accuracy")

    def watch(self, data: Data) -> tuple[float, float]:
        """See `Backend`."""
        self._trainer.attack = self.attack
        own, pgd = self._trainer.watch(data)
        return own, pgd

    def store(self) -> None:
        """See `Backend`."""
        with HeldSignals() as signals:
            signals.hold()
            state = self._trainer.state()
            if self._in_pytorch:
                self.sparse.load_state({**self.sparse.state(), **{name: state[name] for name in _STATISTICS}})
            else:
                self.sparse.load_state(self._artifact.trained.whole(state))
            self.sparse.step = self._trainer.steps

    def close(self) -> None:
        """See `Backend`."""
        if self._trainer is not None:
            self._trainer.close()
        self._folder.remove()


def _trainer() -> Any:
    from edge_bcs.runtime import Trainer

    return Trainer


def grow(trainer: Any, images: Array, labels: Array, count: int, growth: Growth, step: int) -> int:
    """Move connections of a `Trainer` as `Backend.grow` does, and return how many; none if interrupted."""

    def take(connections: Coo) -> None:
        def fill(arrays: dict[str, Any]) -> None:
            for name, array in zip(_COO, connections, strict=True):
                arrays[name][...] = array

        trainer.replace_state(fill)

    def gradient_of(connections: Coo) -> Any:
        take(connections)
        return trainer.gradient(images, labels)

    state = trainer.state()
    before: Coo = state[_COO[0]], state[_COO[1]], state[_COO[2]]
    after = before
    try:
        after = grown(
            before,
            count,
            growth.candidates,
            gradient_of,
            size=trainer.artifact.size,
            seed=trainer.seed,
            step=step,
            recycle=growth.recycle,
        )
    finally:
        with HeldSignals() as signals:
            signals.hold()
            take(after)
    return len(np.setdiff1d(after[1], before[1]))


def _updated_by(update: Callable[[Any], None]) -> Any:
    class UpdatedTrainer(_trainer()):  # type: ignore[misc]
        """A trainer whose weights are updated by a function of it, and whose connections it does not move."""

        def run_optimizer_only(self) -> None:
            """Update with the gradients that the buffers hold, and count a step."""
            update(self)
            self.steps += 1

    return UpdatedTrainer


def _keep_mask(trainer: Any) -> None:
    """Update a trainer's weights as Algorithm 1 does, and leave its connections where they are."""
    arrays, trained = trainer.buffers, trainer.artifact.trained
    hyper = (trainer.learning_rate, trainer.weight_decay, trainer.momentum)
    masks = {
        "coo": trained.connections(arrays["coo.index"]),
        "dense": trained.numbers(len(arrays["dense.value"])),
    }
    for kind, mask in masks.items():
        if not mask.any():
            continue  # what is not trained has neither momentum nor a gradient
        value, momentum = arrays[f"{kind}.value"][mask], arrays[f"{kind}.momentum"]
        keep_mask(value, momentum, arrays[f"{kind}{_GRADIENT}"], hyper, connections=kind == "coo")
        arrays[f"{kind}.value"][mask] = value
        if not np.isfinite(value).all():
            raise EdgeBcsError(
                f"step {trainer.steps} made a weight that is not finite; lower the learning rate"
            )


def _with_all(sparse: SparseModel) -> SparseModel:
    """A copy of the network that has all prunable weights as connections, with their momentum at rest."""
    whole = SparseModel(
        copy.deepcopy(sparse.network),
        _next_to_nothing(sparse),
        np.arange(sparse.size),
        seed=sparse.seed,
        sparsity="0",
        dense=sparse.dense_kernels,
    )
    whole.classes = sparse.classes
    return whole


def _next_to_nothing(sparse: SparseModel) -> Array:
    """All prunable weights, f32[N]: what is dormant as a newborn connection, for none may be 0."""
    weights = sparse.weights.detach().numpy()
    return np.where(weights == 0, np.float32(NEWBORN), weights)
