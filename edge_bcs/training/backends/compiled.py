"""Training steps through the sparse artifact that the network compiles to, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.scratch import ScratchFolder
from edge_bcs.core.settings import Coefficients, Hyper
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.dataset import Data
from edge_bcs.method.growth import Coo, grown
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.backends.base import Batch, Numbers
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.settings import Growth
from edge_bcs.training.updates import keep_mask

_COO = ("coo.value", "coo.index", "coo.momentum")


class CompiledBackend:
    """Steps through the artifact that the network compiles to, on the CPU (`edge_bcs.runtime.Trainer`).

    A micro-batch is the whole batch, so that batch norm has the statistics that PyTorch would take. Which
    kernel a layer uses (sparse or dense) is chosen once, from the connectivity at the beginning. A static
    mask is trained by the same graphs, with an update that does not rewire.
    """

    lag = 0

    def __init__(self, sparse: SparseModel, plan: TrainingPlan, shape: Any, threads: int | None) -> None:
        from edge_bcs.exporters import export
        from edge_bcs.exporters.settings import Memory

        self.sparse, self.plan, self.threads = sparse, plan, threads
        self.attack = plan.attack
        self._trainer: Any = None
        self._folder = ScratchFolder("train")
        try:
            self._artifact = export(
                sparse,
                self._folder.path / "artifact",
                objective=plan.objective.name,
                input_shape=tuple(shape),
                memory=Memory(micro_batch=max(plan.batch_size, 2)),
                batch_norm=plan.batch_norm,
                train=plan.train,
                batch_size=plan.batch_size,
                attack=plan.attack,
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
        write_run(run, self._artifact, self._artifact.trained.of(self.sparse.state()), metadata)
        trainer = _static_trainer() if self.plan.rewire == "none" else _trainer()
        self._trainer = trainer(run, threads=self.threads)

    def step(
        self, batch: Batch, hyper: Coefficients, step: int, signals: HeldSignals
    ) -> Callable[[], Numbers]:
        """See `Backend`."""
        trainer = self._trainer
        trainer.learning_rate, trainer.weight_decay = hyper.learning_rate, hyper.weight_decay
        trainer.momentum, trainer.noise = hyper.momentum, hyper.noise
        trainer.attack = self.attack
        metrics = trainer.step_holding(signals, batch.images, batch.labels)
        shares = [metrics["accuracy"]]
        if self.plan.objective.two_branches:
            shares.append(metrics["robust_accuracy"])
        correct = [float(round(share * batch.whole)) for share in shares]
        numbers = Numbers(metrics["loss"], correct, sum(trainer.connections().died.values()))
        return lambda: numbers

    def grow(self, batch: Batch, count: int, growth: Growth, step: int) -> int:
        """See `Backend`."""
        trainer = self._trainer
        trainer.attack = self.attack

        def take(connections: Coo) -> None:
            def fill(arrays: dict[str, Any]) -> None:
                for name, array in zip(_COO, connections, strict=True):
                    arrays[name][...] = array

            trainer.replace_state(fill)

        def gradient_of(connections: Coo) -> Any:
            take(connections)
            return trainer.gradient(batch.images, batch.labels)

        state = trainer.state()
        before: Coo = state[_COO[0]], state[_COO[1]], state[_COO[2]]
        size, seed = self._artifact.size, self.plan.seed
        after = before
        try:
            after = grown(
                before,
                count,
                growth.candidates,
                gradient_of,
                size=size,
                seed=seed,
                step=step,
                recycle=growth.recycle,
            )
        finally:
            with HeldSignals() as signals:
                signals.hold()
                take(after)
        return len(np.setdiff1d(after[1], before[1]))

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
            self.sparse.load_state(self._artifact.trained.whole(self._trainer.state()))
            self.sparse.step = self._trainer.steps

    def close(self) -> None:
        """See `Backend`."""
        if self._trainer is not None:
            self._trainer.close()
        self._folder.remove()


def _trainer() -> Any:
    from edge_bcs.runtime import Trainer

    return Trainer


def _static_trainer() -> Any:
    class StaticTrainer(_trainer()):  # type: ignore[misc]
        """A trainer whose connections stay where they are."""

        def run_optimizer_only(self) -> None:
            """Update with the gradients that the buffers hold, and count a step."""
            arrays, trained = self.buffers, self.artifact.trained
            hyper = (self.learning_rate, self.weight_decay, self.momentum)
            masks = {
                "coo": trained.connections(arrays["coo.index"]),
                "dense": trained.numbers(len(arrays["dense.value"])),
            }
            for kind, mask in masks.items():
                if not mask.any():
                    continue  # what is not trained has neither momentum nor a gradient
                gradient = arrays[f"{kind}.value_grad.accumulation.buffer"]
                value, momentum = arrays[f"{kind}.value"][mask], arrays[f"{kind}.momentum"]
                keep_mask(value, momentum, gradient, hyper, connections=kind == "coo")
                arrays[f"{kind}.value"][mask] = value
                if not np.isfinite(value).all():
                    raise EdgeBcsError(
                        f"step {self.steps} made a weight that is not finite; lower the learning rate"
                    )
            self.steps += 1

    return StaticTrainer
