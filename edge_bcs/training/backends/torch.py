"""Training steps in PyTorch, on any device; on a GPU they are recorded and replayed (`cuda`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_bcs.core.collapse import WATCHED_STEPS
from edge_bcs.core.random import EVALUATION
from edge_bcs.core.settings import Attack, Coefficients, descent
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.dataset import Data
from edge_bcs.evaluation.measures import evaluate
from edge_bcs.method.attacks import answers_of, crafted, evaluation_mode
from edge_bcs.method.device_step import raise_if_failed
from edge_bcs.method.growth import Coo, grown
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import accumulate, craft
from edge_bcs.training.backends.base import Batch, Numbers, Segments
from edge_bcs.training.backends.cuda import Recorded
from edge_bcs.training.devices import fastest_layout
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.settings import Growth
from edge_bcs.training.updates import Update


class TorchBackend:
    """Steps in PyTorch on whatever device the network is, alone or as one of several replicas."""

    def __init__(
        self,
        sparse: SparseModel,
        plan: TrainingPlan,
        update: Update,
        *,
        shape: Sequence[int],
        replicas: Replicas,
    ) -> None:
        self.sparse, self.plan, self.update = sparse, plan, update
        self.attack = plan.attack
        self._teacher = None if plan.teacher is None else plan.teacher.ready(sparse, shape)
        self.replicas = replicas
        self.device = sparse.index.device
        self._layout = fastest_layout(sparse, shape)
        self.lag = 0 if self.device.type == "cpu" else 1
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
        """See `Backend`: the network is its state."""

    def store(self) -> None:
        """See `Backend`: the network is its state."""

    def close(self) -> None:
        """See `Backend`."""

    def step(
        self, batch: Batch, hyper: Coefficients, step: int, signals: HeldSignals
    ) -> Callable[[], Numbers]:
        """See `Backend`; running statistics change from the forward pass on."""
        x, labels = self._to_device(batch.images), self._to_device(batch.labels)
        number = torch.full((), step, device=self.device) if self.lag else step
        adversarial = self._craft(
            x, labels, number, segments=tuple(batch.segments), whole=batch.whole, attack=self.attack
        )
        signals.hold()
        outcome = self._gradients(x, adversarial, labels, whole=batch.whole)
        self.replicas.sum_gradients(self.sparse, outcome, everything=self.update.needs_all_gradients)
        result = self._update(number, self._failed, hyper=hyper)
        if self.lag:
            self._failed = result[1] == 0
        self.sparse.step = step + 1
        read_outcome, read_result = self._queue_to_host(outcome), self._queue_to_host(result)

        def numbers() -> Numbers:
            deaths = raise_if_failed(read_result(), step)
            loss, *correct = read_outcome().tolist()
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
        self,
        x: Tensor,
        labels: Tensor,
        step: int | Tensor,
        *,
        segments: Segments,
        whole: int,
        attack: Attack,
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
                        self.plan.objective,
                        attack,
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
                self.plan.objective,
                beta=self.plan.beta,
                sample_weight=weight,
                batch_norm=self.plan.batch_norm,
                trained=self.update.trained,
                teacher=self._teacher,
            )
        return torch.cat([outcome.loss.float().reshape(1), outcome.correct.float()])

    def _updated(self, step: int | Tensor, failed: Tensor | None, *, hyper: Coefficients) -> Tensor:
        return self.update(self.sparse, hyper, step=step, failed=failed)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # From pinned memory a copy is queued like any other work of the device.
        moved = tensor.pin_memory().to(self.device, non_blocking=True)
        return moved.contiguous(memory_format=self._layout) if moved.dim() == 4 else moved

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "f32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def grow(self, batch: Batch, count: int, growth: Growth, step: int) -> int:
        """See `Backend`."""
        x, labels = self._to_device(batch.images), self._to_device(batch.labels)
        number = torch.full((), step, device=self.device) if self.lag else step
        sparse, state = self.sparse, self.sparse.state()
        before: Coo = state["coo.value"], state["coo.index"], state["coo.momentum"]

        def gradient_of(connections: Coo) -> NDArray[np.float32]:
            sparse.load_coo(*connections)
            segments = tuple(batch.segments)
            adversarial = self._crafted(
                x, labels, number, segments=segments, whole=batch.whole, attack=self.attack
            )
            self._accumulated(x, adversarial, labels, whole=batch.whole)
            return np.asarray(sparse.gradients()[0].detach().cpu().numpy())

        after = before
        try:
            after = grown(
                before,
                count,
                growth.candidates,
                gradient_of,
                size=sparse.size,
                seed=sparse.seed,
                step=step,
                recycle=growth.recycle,
            )
        finally:
            value, index, momentum = after
            sparse.load_state({**state, "coo.value": value, "coo.index": index, "coo.momentum": momentum})
        return len(np.setdiff1d(after[1], before[1]))

    def watch(self, data: Data) -> tuple[float, float]:
        """See `Backend`; replicas take the mean of what they found, so that they decide alike."""
        rule, images, labels = self.plan.objective, *data.read(np.arange(len(data)))
        x, y = self._to_device(images), self._to_device(labels)
        attacks = (
            (rule.crafting(self.attack), rule.attack_loss),
            (descent(self.attack.epsilon, WATCHED_STEPS), "cross_entropy"),
        )
        shares = []
        with evaluation_mode(self.sparse), self._autocast():
            with torch.no_grad():
                right = answers_of(self.sparse(x)) == y
            for how, loss in attacks:
                attacked = crafted(
                    self.sparse, x, y, how, loss=loss, seed=self.plan.seed, step=0, purpose=EVALUATION
                )
                with torch.no_grad():
                    left = right & (answers_of(self.sparse(attacked)) == y)
                shares.append(left.double().mean())
        found = torch.stack(shares)
        self.replicas.sum(found)
        own, pgd = (found / self.replicas.count).tolist()
        return own, pgd

    def evaluate(self, data: Data) -> tuple[float, float | None]:
        """See `Backend`; replicas share the images."""
        count, attacked = self.replicas.count, self.plan.objective.adversarial
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
            epsilon=self.plan.attack.epsilon,
            steps=max(1, self.plan.attack.steps),
            step_size=self.plan.attack.step_size,
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
