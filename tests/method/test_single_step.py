"""Single-step attacks on the host against float64 arithmetic written out, and what is refused of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs import Attack
from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import objective_named
from edge_bcs.method import step as steps

RADIUS = 8 / 255


def network() -> tuple[edge_bcs.SparseModel, list[np.ndarray[Any, Any]]]:
    """One hidden layer with four times its usual weights, so that no gradient is near zero."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    sparse = edge_bcs.sparsify(model, 0, seed=5, start="magnitude")
    return sparse, [parameter.detach().double().numpy() for parameter in sparse.network.parameters()]


@pytest.mark.parametrize("objective", ["at", "mixed", "trades", "mart"])
@pytest.mark.parametrize(
    ("kind", "noise", "length", "ball"),
    [("fgsm-rs", RADIUS, 1.25 * RADIUS, RADIUS), ("n-fgsm", 2 * RADIUS, RADIUS, np.inf)],
)
def test_by_its_definition(kind: str, noise: float, length: float, ball: float, objective: str) -> None:
    sparse, (w1, b1, w2, b2) = network()
    x, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    attack = Attack(epsilon=RADIUS, kind=kind)
    found = steps.craft(sparse, x, labels, objective_named(objective), attack, step=7, seed=5)

    def probabilities(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        e = np.exp(np.maximum(images @ w1.T + b1, 0) @ w2.T + b2)
        return np.asarray(e / e.sum(1, keepdims=True))

    clean = x.double().numpy().reshape(6, 12)
    attacked = 3 if objective == "mixed" else 6
    drawn = 2 * random.uniform(attacked * 12, seed=5, step=7, purpose=random.PGD_START).astype(float) - 1
    moved = clean.copy()
    moved[:attacked] = np.clip(moved[:attacked] + noise * drawn.reshape(attacked, 12), 0, 1)
    target = probabilities(clean) if objective == "trades" else np.eye(4)[labels]
    gradient = (((probabilities(moved) - target) @ w2) * (moved @ w1.T + b1 > 0)) @ w1
    stepped = moved + length * np.sign(gradient)
    stepped = np.clip(np.clip(stepped, clean - ball, clean + ball), 0, 1)
    moved[:attacked] = stepped[:attacked]
    assert found.numpy().reshape(6, 12) == pytest.approx(moved, abs=1e-6)
    change = np.abs(found.numpy().reshape(6, 12) - clean)
    assert (change.max() > 1.5 * RADIUS) == (kind == "n-fgsm")  # outside the ball, as its authors have it


def test_what_is_refused() -> None:
    with pytest.raises(EdgeBcsError, match="training attack is pgd, fgsm-rs or n-fgsm, not 'fgsm'"):
        Attack(kind="fgsm")
    with pytest.raises(EdgeBcsError, match="n-fgsm needs a PGD to fall back on: attack_steps of at least 1"):
        Attack(kind="n-fgsm", steps=0)
    with pytest.raises(EdgeBcsError, match="natural training attacks nothing: leave fgsm-rs out"):
        edge_bcs.train(
            network()[0],
            (np.zeros((8, 3, 2, 2), np.float32), np.arange(8) % 4),
            objective="natural",
            attack=Attack(kind="fgsm-rs"),
        )
