"""Sides of a comparison, timed in turn on the same cores; one of them is dense PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_bcs.bench.gradients import Batch
    from edge_bcs.runtime import Artifact

PAUSE = 0.05
"""Seconds after which the threads of OpenMP and ONNX Runtime that have nothing to do have gone to sleep."""


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def in_turn(
    sides: dict[str, Callable[[], float]], repetitions: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each run of each side, as it tells them, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        progress(f"repetition {repetition} of {repetitions}" if repetition else "warming up")
        for name, side in sides.items():
            time.sleep(PAUSE)
            taken = side()
            if repetition:
                seconds[name].append(taken)
    return seconds


def median_ratio(seconds: Mapping[str, Sequence[float]], theirs: str, ours: str) -> float | None:
    """Seconds of one side over another's: the median over runs of the same round; None where one was not
    there."""
    if theirs not in seconds or ours not in seconds:
        return None
    pairs = zip(seconds[theirs], seconds[ours], strict=True)
    return statistics.median(other / own for other, own in pairs)


class TorchStep:
    """The same step as a PyTorch user writes it: PGD, then SGD with momentum and decay, all weights.

    Args:
        model: the network. attack_steps: of PGD.
        channels_last: the layout of its tensors; False is torch's ordinary one.
        bfloat16: forward and backward run under autocast to bfloat16; weights and update stay float32.
        compiled: the network is compiled with torch.compile; the first step takes minutes.
    """

    def __init__(
        self,
        model: Any,
        attack_steps: int,
        channels_last: bool,
        *,
        bfloat16: bool = False,
        compiled: bool = False,
    ) -> None:
        import torch

        self._torch = torch
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.eval().to(memory_format=self._format)
        self._forward = torch.compile(self._model) if compiled else self._model
        self._bfloat16 = bfloat16
        self._attack_steps = attack_steps
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def __call__(self, images: Any, labels: Any) -> None:
        """Do one step."""
        torch = self._torch
        images = images.contiguous(memory_format=self._format)
        epsilon, step = 8 / 255, 2 / 255
        # Gradients of the weights are not asked for during the attack, as any careful user would arrange it.
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        adversarial = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
        for _ in range(self._attack_steps):
            adversarial.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self._loss(adversarial, labels), adversarial)
            with torch.no_grad():
                moved = adversarial + step * gradient.sign()
                adversarial = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(
                    0, 1
                )
        self.gradients(adversarial.detach(), labels)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.mul_(1 - 5e-4)
        self._optimizer.step()

    def gradients(self, images: Any, labels: Any) -> None:
        """Go forward and backward: the gradients of all parameters."""
        for parameter in self._model.parameters():
            parameter.requires_grad_(True)
        self._optimizer.zero_grad(set_to_none=True)
        self._loss(images.contiguous(memory_format=self._format), labels).backward()

    def _loss(self, images: Any, labels: Any) -> Any:
        with self._torch.autocast("cpu", self._torch.bfloat16, enabled=self._bfloat16):
            logits = self._forward(images)
        return self._torch.nn.functional.cross_entropy(logits.float(), labels)


def beside_dense(
    artifact: Artifact,
    batch: Batch,
    network: Any,
    attack_steps: int,
    threads: int,
    repetitions: int,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Time steps of a batch, ours and dense PyTorch's, in turn.

    Args:
        artifact: of our side. batch: what is trained on.
        network: the torch module of the other side, which is trained. attack_steps: of its attack.
        channels_last: the layout of its tensors; False is torch's ordinary one.

    Returns:
        "ours_seconds", "dense_seconds": of each repetition; "ratio": the median of theirs over ours;
        "peak_bytes": our working set.
    """
    import torch

    from edge_bcs.runtime import Trainer

    tensors = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
    dense = TorchStep(network, attack_steps, channels_last)
    with Trainer(artifact, threads=threads) as trainer:
        sides: dict[str, Callable[[], float]] = {
            "ours": partial(seconds_of, trainer.step, batch.images, batch.labels),
            "dense": partial(seconds_of, dense, *tensors),
        }
        seconds = in_turn(sides, repetitions, lambda _: None)
        peak = trainer.peak_bytes
    pairs = zip(seconds["dense"], seconds["ours"], strict=True)
    return {
        "ours_seconds": seconds["ours"],
        "dense_seconds": seconds["dense"],
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
        "peak_bytes": peak,
    }
