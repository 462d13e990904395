"""FGSM and PGD against hand-worked examples and float64 arithmetic on linear models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_bcs import models
from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import attacks


class Linear(nn.Module):
    """Two classes, logits ±(x·w): the cross-entropy of class 0 grows along −w."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([score, -score], 1)


def images(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def test_fgsm_by_hand() -> None:
    model = Linear([1.0, -2.0, 0.0])
    x = images([0.5, 0.5, 0.5], [0.05, 0.95, 0.5])
    adversarial = attacks.fgsm(model, x, torch.tensor([0, 0]), epsilon=0.1).flatten(1)
    # Against class 0 pixels move by −ε·sign(w); a zero gradient moves nothing; [0, 1] bounds the second
    # image.
    assert torch.allclose(adversarial, torch.tensor([[0.4, 0.6, 0.5], [0.0, 1.0, 0.5]]))
    opposite = attacks.fgsm(model, x, torch.tensor([1, 1]), epsilon=0.1).flatten(1)
    assert torch.allclose(opposite, torch.tensor([[0.6, 0.4, 0.5], [0.15, 0.85, 0.5]]))


def test_pgd_projects_by_hand() -> None:
    model = Linear([1.0, -2.0, 0.0])
    x, label = images([0.5, 0.5, 0.5]), torch.tensor([0])
    first = attacks.pgd(model, x, label, epsilon=0.1, step_size=0.04, steps=2)
    assert torch.allclose(first.flatten(), torch.tensor([0.42, 0.58, 0.5]))
    third = attacks.pgd(model, x, label, epsilon=0.1, step_size=0.04, steps=3)  # 0.12 is cut to ε
    assert torch.allclose(third.flatten(), torch.tensor([0.4, 0.6, 0.5]))
    start = images([0.3, 0.0, 0.05])  # outside the ball: the first step's projection brings it back
    started = attacks.pgd(model, x, label, epsilon=0.1, step_size=0.04, steps=1, perturbation=start)
    assert torch.allclose(started.flatten(), torch.tensor([0.6, 0.54, 0.55]))


def test_pgd_follows_the_algorithm_on_a_network() -> None:
    """One hidden layer, forward and backward written out in float64 numpy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    w1, b1, w2, b2 = (parameter.detach().double().numpy() for parameter in model.parameters())
    x = torch.rand(6, 3, 2, 2)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    noise = attacks.start("uniform", (6, 3, 2, 2), 0.1, seed=1, step=2)

    def softmax(logits: np.ndarray) -> np.ndarray:
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    for loss in ("cross_entropy", "kl"):
        clean = x.double().numpy().reshape(6, 12)
        target = softmax(np.maximum(clean @ w1.T + b1, 0) @ w2.T + b2) if loss == "kl" else np.eye(4)[labels]
        moved = np.clip(clean + noise.double().numpy().reshape(6, 12), 0, 1)
        for _ in range(4):
            hidden = moved @ w1.T + b1
            seed = softmax(np.maximum(hidden, 0) @ w2.T + b2) - target
            gradient = ((seed @ w2) * (hidden > 0)) @ w1
            moved = np.clip(moved + 0.03 * np.sign(gradient), clean - 0.1, clean + 0.1).clip(0, 1)
        found = attacks.pgd(
            model, x, labels, epsilon=0.1, step_size=0.03, steps=4, loss=loss, perturbation=noise
        )
        assert found.numpy().reshape(6, 12) == pytest.approx(moved, abs=1e-6)


def test_starts_come_from_the_counter_based_numbers() -> None:
    uniform = attacks.start("uniform", (2, 3), 0.25, seed=9, step=4).flatten().numpy()
    draws = random.uniform(6, seed=9, step=4, purpose=random.PGD_START)
    assert uniform == pytest.approx((2 * draws - 1) * 0.25)
    tail = attacks.start("uniform", (1, 3), 0.25, seed=9, step=4, first=3).flatten().numpy()
    assert np.array_equal(tail, uniform[3:])  # half a batch at a time gives the same starts
    many = attacks.start("gaussian", (100, 100), 0.25, seed=9, step=4)
    assert many.std().item() == pytest.approx(0.001, rel=0.03)
    assert attacks.start("uniform", (100, 100), 0.25, seed=9, step=4).abs().max() <= 0.25
    with pytest.raises(EdgeBcsError, match="no attack start 'zero'"):
        attacks.start("zero", (1,), 0.25, seed=0, step=0)


def test_batch_norm_is_in_evaluation_mode_and_left_as_it_was() -> None:
    model = models.resnet18(width=0.05, input_size=8).train()
    model.bn1.eval()  # a mixed state must come back as it was
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    alone = attacks.pgd(model, x[:1], labels[:1], steps=2)
    together = attacks.pgd(model, x, labels, steps=2)
    assert torch.allclose(alone, together[:1], atol=1e-6)  # batch statistics would couple the images
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.training and not model.bn1.training and model.stage1[0].bn1.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_restarts_count_an_image_as_fooled_if_any_start_fools_it() -> None:
    class Trap(nn.Module):
        """Fooled only where the first pixel has been pushed beyond 0.55; the gradient leads nowhere."""

        def forward(self, x: Tensor) -> Tensor:
            score = (0.55 - x.flatten(1)[:, 0]).sign() + 0 * x.flatten(1).sum(1)
            return torch.stack([score, -score], 1)

    model, labels = Trap(), torch.zeros(40, dtype=torch.int64)
    x = torch.full((40, 1, 1, 2), 0.5)

    def robust(restarts: int) -> int:
        found = attacks.pgd_restarts(
            model, x, labels, restarts=restarts, epsilon=0.1, step_size=0.01, steps=1, seed=3
        )
        assert (found - x).abs().max() <= 0.1 + 1e-6
        return int((model(found).argmax(1) == 0).sum())

    # A start is uniform in ±0.1, so it lies beyond 0.55 with probability ¼: 40·(¾)^r images stay.
    assert 20 <= robust(1) <= 38
    assert robust(12) <= 6
    # The same draws, by hand, tell exactly which images one restart fools.
    draws = random.uniform(80, seed=3, step=0, purpose=random.EVALUATION).reshape(40, 2)[:, 0]
    assert robust(1) == int((0.5 + (2 * draws - 1) * 0.1 <= 0.55).sum())


def test_refusals() -> None:
    model, x = Linear([1.0]), images([0.5])
    with pytest.raises(EdgeBcsError, match="at least 1 step"):
        attacks.pgd(model, x, torch.tensor([0]), steps=0)
    with pytest.raises(EdgeBcsError, match="needs labels"):
        attacks.pgd(model, x)
    with pytest.raises(EdgeBcsError, match="no attack loss"):
        attacks.pgd(model, x, torch.tensor([0]), loss="margin")
    with pytest.raises(EdgeBcsError, match="epsilon"):
        attacks.pgd(model, x, torch.tensor([0]), epsilon=-1.0)
    with pytest.raises(EdgeBcsError, match="at least 1 start"):
        attacks.pgd_restarts(model, x, torch.tensor([0]), restarts=0)
