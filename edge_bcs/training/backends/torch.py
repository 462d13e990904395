"""Two ways of doing the same training step: PyTorch, and the compiled sparse artifact on the CPU.

Both read and write one `SparseModel`, so that everything around the step (schedules, selection, checkpoints,
resumption) is the same code.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import Objective
from edge_bcs.core.signals import HeldSignals
from edge_bcs.evaluation.measures import Data, evaluate
from edge_bcs.method.device_step import raise_if_failed
from edge_bcs.method.rewiring import NEWBORN
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import Attack, Hyper, accumulate, craft
from edge_bcs.training.backends.cuda import Recorded
from edge_bcs.training.plan import Plan
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.updates import Rewiring, Update, keep_mask

_Segments = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """What one process reads of a batch.

    Attributes:
        images, labels: f32 [n, C, H, W] in [0, 1], i64[n].
        segments: (place in the whole batch, length) of the runs that they consist of, in order.
        whole: images of the whole batch.
    """

    images: NDArray[Any]
    labels: NDArray[Any]
    segments: _Segments
    whole: int


@dataclass(frozen=True)
class Numbers:
    """What a step gave: mean loss, correct answers of each branch in the whole batch, deaths."""

    loss: float
    correct: list[float]
    deaths: int


class Engine(Protocol):
    """Does training steps.

    Attributes:
        lag: steps that may be under way while the numbers of an earlier one are read.
    """

    lag: int

    def load(self, step: int) -> None:
        """Start from the state of the network, before training step `step`."""
        ...

    def step(self, batch: Batch, hyper: Hyper, step: int, signals: HeldSignals) -> Callable[[], Numbers]:
        """Do one step of Algorithm 1, and return what tells its numbers (and raises if it failed).

        From where the state changes on, ``signals`` are held: so that the step is done, and counted by the
        caller, or not begun.
        """
        ...

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """Return clean and robust accuracy (PGD with the training attack; None for natural training)."""
        ...

    def store(self) -> None:
        """Put the state into the network, and how many steps that is."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class TorchEngine:
    """Steps in PyTorch on whatever device the network is, alone or as one of several replicas."""

    def __init__(
        self,
        sparse: SparseModel,
        plan: Plan,
        objective: Objective,
        update: Update,
        *,
        replicas: Replicas,
    ) -> None:
        self.sparse, self.plan, self.objective, self.update = sparse, plan, objective, update
        self.replicas = replicas
        self.device = sparse.index.device
        self.lag = 0 if self.device.type == "cpu" else 1
        self.attack = Attack(epsilon=plan.epsilon, step_size=plan.step_size, steps=plan.attack_steps)
        self._failed: Tensor | None = None
        self._craft: Callable[..., Tensor] = self._crafted
        self._gradients: Callable[..., Tensor] = self._accumulated
        self._update: Callable[..., Tensor] = self._updated
        if self.device.type == "cuda":
            self._craft, self._gradients = Recorded(self._crafted), Recorded(self._accumulated)
            self._failed = torch.zeros((), dtype=torch.bool, device=self.device)
            if update.queues(sparse):
                self._update = Recorded(self._updated)

    def load(self, step: int) -> None:
        """See `Engine`: the network is its state."""

    def store(self) -> None:
        """See `Engine`: the network is its state."""

    def close(self) -> None:
        """See `Engine`."""

    def step(self, batch: Batch, hyper: Hyper, step: int, signals: HeldSignals) -> Callable[[], Numbers]:
        """See `Engine`; running statistics change from the forward pass on."""
        x, labels = self._to_device(batch.images), self._to_device(batch.labels)
        number = torch.full((), step, device=self.device) if self.lag else step
        adversarial = self._craft(x, labels, number, segments=tuple(batch.segments), whole=batch.whole)
        signals.hold()
        told = self._gradients(x, adversarial, labels, whole=batch.whole)
        self.replicas.sum_gradients(self.sparse, told, everything=self.update.needs_all_gradients)
        result = self._update(number, self._failed, hyper=hyper)
        if self.lag:
            self._failed = result[1] == 0
        self.sparse.step = step + 1
        read_told, read_result = self._queue_to_host(told), self._queue_to_host(result)

        def numbers() -> Numbers:
            deaths = raise_if_failed(read_result(), step)
            loss, *correct = read_told().tolist()
            return Numbers(loss, correct, deaths)

        return numbers

    def _queue_to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return what waits for the tensor, and for nothing that is queued behind it."""
        if self.device.type != "cuda":
            return lambda: tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def read() -> Tensor:
            arrived.synchronize()
            return copy

        return read

    # The three parts of a step; on a GPU they are recorded. Each has an autocast of its own: it keeps its
    # bf16 weights until it is left, and those made where no gradient was wanted would give none.

    def _crafted(
        self, x: Tensor, labels: Tensor, step: int | Tensor, *, segments: _Segments, whole: int
    ) -> Tensor:
        parts, begin = [], 0
        with self._autocast():
            for place, length in segments:
                part = slice(begin, begin + length)
                begin += length
                parts.append(
                    craft(
                        self.sparse,
                        x[part],
                        labels[part],
                        self.objective,
                        self.attack,
                        step=step,
                        seed=self.plan.seed,
                        position=place,
                        batch=whole,
                    )
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _accumulated(self, x: Tensor, adversarial: Tensor, labels: Tensor, *, whole: int) -> Tensor:
        """Return f32[2] or f32[3]: loss and correct answers; the gradients are the network's."""
        self.sparse.zero_gradients()
        weight = None
        if self.replicas.count > 1:
            weight = torch.full((len(x),), 1 / whole, device=self.device)
        with self._autocast():
            outcome = accumulate(
                self.sparse,
                x,
                adversarial,
                labels,
                self.objective,
                beta=self.plan.beta,
                sample_weight=weight,
                batch_norm=self.plan.batch_norm,
            )
        return torch.cat([outcome.loss.float().reshape(1), outcome.correct.float()])

    def _updated(self, step: int | Tensor, failed: Tensor | None, *, hyper: Hyper) -> Tensor:
        return self.update(self.sparse, hyper, step=step, failed=failed)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # From pinned memory a copy is queued like any other work of the device.
        moved = tensor.pin_memory().to(self.device, non_blocking=True)
        return moved.contiguous(memory_format=torch.channels_last) if moved.dim() == 4 else moved

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "f32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """See `Engine`; replicas share the images."""
        count, attacked = self.replicas.count, self.objective.adversarial
        batches: Any = data
        mine = np.arange(len(data))
        if len(data) >= count > 1:
            mine = mine[self.replicas.rank :: count]
            size = self.plan.batch_size
            batches = (data.read(mine[first : first + size]) for first in range(0, len(mine), size))
        report = evaluate(
            self.sparse,
            batches,
            attack="pgd" if attacked else "none",
            epsilon=self.plan.epsilon,
            steps=max(1, self.plan.attack_steps),
            step_size=self.plan.step_size,
            restarts=1,
            seed=self.plan.seed,
            batch_size=self.plan.batch_size,
        )
        if count == 1:
            return report["clean_acc"], report["adv_acc"]
        right = [report["clean_acc"] * len(mine), (report["adv_acc"] or 0.0) * len(mine), len(mine)]
        totals = torch.tensor(right, device=self.device)
        self.replicas.sum(totals)
        clean, robust = (totals[:2].round() / totals[2]).tolist()
        return clean, robust if attacked else None


class SparseEngine:
    """Steps through the artifact that the network compiles to, on the CPU (`edge_bcs.runtime.Trainer`).

    A micro-batch is the whole batch, so that batch norm has the statistics that PyTorch would take. Which
    kernel a layer uses (sparse or dense) is chosen once, from the connectivity at the beginning. A static
    mask is trained by the same graphs, with an update that does not rewire.
    """

    lag = 0

    def __init__(
        self, sparse: SparseModel, plan: Plan, objective: Objective, shape: Any, threads: int | None
    ):
        from edge_bcs.exporters import export

        self.sparse, self.plan, self.objective, self.threads = sparse, plan, objective, threads
        self._trainer: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="edge-bcs-train-")
        try:
            self._artifact = export(
                sparse,
                Path(self._folder.name) / "artifact",
                objective=plan.objective,
                input_shape=tuple(shape),
                micro_batch=max(plan.batch_size, 2),
                batch_norm=plan.batch_norm,
                batch_size=plan.batch_size,
                epsilon=plan.epsilon,
                step_size=plan.step_size,
                attack_steps=plan.attack_steps,
                beta=plan.beta,
                learning_rate=plan.learning_rate,
                weight_decay=plan.weight_decay,
                momentum=plan.momentum,
                noise=plan.noise,
                epochs=plan.epochs,
                validate=False,
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def load(self, step: int) -> None:
        """See `Engine`."""
        from edge_bcs.runtime.state import write_run

        run = Path(self._folder.name) / "run"
        metadata = {"step": str(step), "seed": str(self.plan.seed)}
        write_run(run, self._artifact, self.sparse.state(), metadata)
        trainer = _static_trainer() if self.plan.rewire == "none" else _trainer()
        self._trainer = trainer(run, threads=self.threads)

    def step(self, batch: Batch, hyper: Hyper, step: int, signals: HeldSignals) -> Callable[[], Numbers]:
        """See `Engine`."""
        trainer = self._trainer
        trainer.learning_rate, trainer.weight_decay = hyper.learning_rate, hyper.weight_decay
        trainer.momentum, trainer.noise = hyper.momentum, hyper.noise
        metrics = trainer.step_holding(signals, batch.images, batch.labels)
        shares = [metrics["accuracy"]]
        if self.objective.two_branches:
            shares.append(metrics["robust_accuracy"])
        correct = [float(round(share * batch.whole)) for share in shares]
        numbers = Numbers(metrics["loss"], correct, self._deaths())
        return lambda: numbers

    def _deaths(self) -> int:
        """Return how many connections were born in the last step: each has the newborn weight, at rest."""
        if self.plan.rewire == "none":
            return 0
        state = self._trainer.state()
        return int(((np.abs(state["coo.value"]) == NEWBORN) & (state["coo.momentum"] == 0)).sum())

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """See `Engine`; PGD takes steps of 2.5·ε/steps (2/255 with the paper's numbers)."""
        steps = max(1, self.plan.attack_steps) if self.objective.adversarial else 0
        report = self._trainer.evaluate(data, steps, epsilon=self.plan.epsilon)
        return report["accuracy"], report.get("robust_accuracy")

    def store(self) -> None:
        """See `Engine`."""
        with HeldSignals() as signals:
            signals.hold()
            self.sparse.load_state(self._trainer.state())
            self.sparse.step = self._trainer.steps

    def close(self) -> None:
        """See `Engine`."""
        if self._trainer is not None:
            self._trainer.close()
        self._folder.cleanup()


def _trainer() -> Any:
    from edge_bcs.runtime import Trainer

    return Trainer


def _static_trainer() -> Any:
    class StaticTrainer(_trainer()):  # type: ignore[misc]
        """A trainer whose connections stay where they are."""

        def run_optimizer_only(self) -> None:
            """Update with the gradients that the buffers hold, and count a step."""
            arrays = self._engine.arrays
            hyper = (self.learning_rate, self.weight_decay, self.momentum)
            for kind in ("coo", "dense"):
                gradient = arrays[f"{kind}.value_grad.accumulation.buffer"]
                value, momentum = arrays[f"{kind}.value"], arrays[f"{kind}.momentum"]
                keep_mask(value, momentum, gradient, hyper, connections=kind == "coo")
                if not np.isfinite(value).all():
                    raise EdgeBcsError(
                        f"step {self.steps} made a weight that is not finite; lower the learning rate"
                    )
            self.steps += 1

    return StaticTrainer


def open_engine(
    sparse: SparseModel,
    plan: Plan,
    objective: Objective,
    update: Update,
    *,
    shape: Sequence[int],
    replicas: Replicas,
    threads: int | None,
) -> Engine:
    """Return the engine that the plan names.

    Raises:
        EdgeBcsError: the sparse engine is asked for what only PyTorch does.
    """
    if plan.engine == "torch":
        return TorchEngine(sparse, plan, objective, update, replicas=replicas)
    if not isinstance(update, Rewiring) or plan.rewire == "by-layer":
        what = "rewiring by layer" if isinstance(update, Rewiring) else f"the method {plan.method}"
        raise EdgeBcsError(f"the sparse engine does not do {what}; choose the engine torch")
    if replicas.count > 1 or sparse.index.device.type != "cpu" or plan.precision != "f32":
        raise EdgeBcsError("the sparse engine runs in one process, on a CPU, in f32")
    if plan.seed != sparse.seed:
        raise EdgeBcsError("the sparse engine draws everything from the network's own seed")
    return SparseEngine(sparse, plan, objective, shape, threads)
