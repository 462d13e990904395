"""Time one robust training step beside dense PyTorch, on the same cores, in one interleaved run.

Both sides do the same mathematics: PGD on the input with frozen batch-norm statistics, then loss, gradients
and the momentum update on the whole batch; ours also rewires. The dense side is what a PyTorch user has
today: the same network with all its weights, channels_last.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs import random as counter_random
from edge_bcs.errors import EdgeBcsError


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """Seconds of one adversarial training step, ours and dense PyTorch's, and what was compared.

    `sparse_seconds` and `dense_seconds` hold one entry a repetition, in the order in which they ran.
    """

    model: str
    sparsity: float
    distribution: str
    batch_size: int
    micro_batch: int
    attack_steps: int
    threads: int
    isa: str
    sparse_seconds: tuple[float, ...]
    dense_seconds: tuple[float, ...]
    optimizer_seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Dense seconds over ours: the median of the ratios of neighbouring repetitions."""
        pairs = zip(self.dense_seconds, self.sparse_seconds, strict=True)
        return statistics.median(dense / sparse for dense, sparse in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return asdict(self) | {
            "ratio": self.ratio,
            "sparse_median_seconds": statistics.median(self.sparse_seconds),
            "dense_median_seconds": statistics.median(self.dense_seconds),
        }


def compare_step(
    *,
    model: str = "vgg16",
    sparsity: float = 0.99,
    distribution: str = "uniform",
    batch_size: int = 128,
    micro_batch: int = 16,
    attack_steps: int = 10,
    threads: int = 2,
    repetitions: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> StepComparison:
    """Time whole adversarial training steps (AT, PGD, update, rewiring) against dense PyTorch.

    Args:
        model: name of a network of `edge_bcs.models`, for 32×32 colour images and 10 classes.
        sparsity: fraction of weights that are dormant, in (0, 1).
        distribution: initial per-layer densities, "paper", "uniform" or "erk".
        batch_size: images a step.
        micro_batch: images our artifact holds at once.
        attack_steps: PGD steps for each image.
        threads: threads of both sides.
        repetitions: timed steps of each side, interleaved; one untimed step of each comes first.
        progress: called with a sentence before each part.

    Raises:
        EdgeBcsError: an argument outside its range or an unknown network.
    """
    if repetitions < 1 or batch_size < 1 or threads < 1:
        raise EdgeBcsError("repetitions, batch size and threads must be at least 1.")
    import torch

    from edge_bcs import connectivity, exporters, models
    from edge_bcs.runtime import Trainer, budget

    torch.set_num_threads(threads)
    images = counter_random.uniform(
        batch_size * 3 * 32 * 32, seed=0, step=0, purpose=counter_random.EVALUATION
    ).reshape(batch_size, 3, 32, 32)
    labels = (np.arange(batch_size) % 10).astype(np.int64)

    with tempfile.TemporaryDirectory() as folder:
        progress(f"exporting {model} at sparsity {sparsity} ({distribution})")
        sparse = connectivity.sparsify(
            models.create(model, num_classes=10), sparsity=sparsity, seed=0, distribution=distribution
        )
        artifact = Path(folder) / "artifact"
        exporters.export(
            sparse,
            artifact,
            objective="at",
            input_shape=(3, 32, 32),
            micro_batch=micro_batch,
            batch_norm="frozen",
            batch_size=batch_size,
            attack_steps=attack_steps,
            validate=False,
        )
        trainer = Trainer(artifact, threads=threads)
        dense = _DenseStep(models.create(model, num_classes=10), attack_steps)
        dense_images, dense_labels = torch.from_numpy(images), torch.from_numpy(labels)

        sparse_seconds, dense_seconds, optimizer_seconds = [], [], []
        for repetition in range(repetitions + 1):
            progress(f"repetition {repetition} of {repetitions}" if repetition else "warming up")
            started = time.perf_counter()
            dense(dense_images, dense_labels)
            between = time.perf_counter()
            trainer.step(images, labels)
            ended = time.perf_counter()
            trainer.run_optimizer_only()
            optimized = time.perf_counter()
            if repetition:
                dense_seconds.append(between - started)
                sparse_seconds.append(ended - between)
                optimizer_seconds.append(optimized - ended)
        peak = int(trainer.memory()["peak_bytes"])
        trainer.close()
    return StepComparison(
        model=model,
        sparsity=sparsity,
        distribution=distribution,
        batch_size=batch_size,
        micro_batch=micro_batch,
        attack_steps=attack_steps,
        threads=threads,
        isa=budget.isa(),
        sparse_seconds=tuple(sparse_seconds),
        dense_seconds=tuple(dense_seconds),
        optimizer_seconds=tuple(optimizer_seconds),
        peak_bytes=peak,
    )


class _DenseStep:
    """The same step as a PyTorch user writes it: PGD, then SGD with momentum and decay, all weights."""

    def __init__(self, model: Any, attack_steps: int) -> None:
        import torch

        self._torch = torch
        self._model = model.eval().to(memory_format=torch.channels_last)
        self._attack_steps = attack_steps
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def __call__(self, images: Any, labels: Any) -> None:
        torch = self._torch
        cross_entropy = torch.nn.functional.cross_entropy
        images = images.contiguous(memory_format=torch.channels_last)
        epsilon, step = 8 / 255, 2 / 255
        # Gradients of the weights are not asked for during the attack, as any careful user would arrange it.
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        adversarial = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
        for _ in range(self._attack_steps):
            adversarial.requires_grad_(True)
            loss = cross_entropy(self._model(adversarial), labels)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            with torch.no_grad():
                moved = adversarial + step * gradient.sign()
                adversarial = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(
                    0, 1
                )
        for parameter in self._model.parameters():
            parameter.requires_grad_(True)
        self._optimizer.zero_grad(set_to_none=True)
        cross_entropy(self._model(adversarial.detach()), labels).backward()
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.mul_(1 - 5e-4)
        self._optimizer.step()
