"""One training step: Algorithm 1 by hand, the vectorised step against the plain one, κ at every step."""

# mypy: disable-error-code="arg-type, assignment"

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.networks import pooled
from torch import nn

import edge_bcs
from edge_bcs import models
from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES, objective_named
from edge_bcs.core.settings import Attack, Coefficients
from edge_bcs.method import step as steps


def batch(size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def test_algorithm_1_by_hand() -> None:
    """θ and γ kept separately in float64, as the paper writes it, for one entry of each kind."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    sparse = edge_bcs.sparsify(model, 0.5, 0)
    # w = γθ: positions 0 and 5 are pushed through zero by their gradients, 3 and 6 live on.
    index, theta, gamma = [0, 3, 5, 6], np.array([1e-3, 0.5, 1e-3, 0.25]), np.array([1, -1, -1, 1])
    sparse.load_coo((gamma * theta).astype(np.float32), np.array(index), np.float32([0.0, 0.2, 0.0, -0.1]))
    sparse.zero_gradients()
    gradient = np.array([1.0, -2.0, -1.0, 0.5])  # with respect to w
    sparse.network[1].weight.grad.view(-1)[index] = torch.tensor(gradient).float()
    sparse.network[1].bias.grad += torch.tensor([3.0, -1.0])
    bias = sparse.network[1].bias.detach().double().numpy().copy()
    deaths = steps.update(
        sparse, Coefficients(learning_rate=0.1, weight_decay=0.01, momentum=0.9, noise=0.0), step=7
    )

    velocity = 0.9 * gamma * np.array([0.0, 0.2, 0.0, -0.1]) + gamma * gradient  # of θ: g_θ = γ·g_w
    expected = theta - 0.01 * theta - 0.1 * velocity
    assert (expected <= 0).tolist() == [True, False, True, False] and deaths == 2
    value, found = sparse.coo()
    kept = dict(zip(found.tolist(), value.tolist(), strict=True))
    assert kept[3] == pytest.approx(-expected[1]) and kept[6] == pytest.approx(expected[3])
    born = sorted(set(found.tolist()) - {3, 6})
    assert len(born) == 2
    for position in born:
        assert kept[position] == pytest.approx(random.signs([position], seed=0)[0] * 1e-12)
    momentum = dict(zip(found.tolist(), sparse.momentum.tolist(), strict=True))
    assert momentum[3] == pytest.approx(-velocity[1]) and momentum[6] == pytest.approx(velocity[3])
    assert all(momentum[position] == 0 for position in born)
    # Biases: the same decoupled decay (method: it applies to all trainable variables).
    assert sparse.network[1].bias.tolist() == pytest.approx(bias * 0.99 - 0.1 * np.array([3.0, -1.0]))


def test_noise_has_the_stated_size() -> None:
    sparse = edge_bcs.sparsify(nn.Sequential(nn.Linear(200, 200, bias=False)), 0.5, 0, "uniform")
    before = sparse.value().clone()
    sparse.zero_gradients()
    steps.update(sparse, Coefficients(learning_rate=0.1, weight_decay=0.0, noise=1e-3), step=0, rewire="none")
    added = sparse.value() - before
    assert added.std().item() == pytest.approx(1e-4, rel=0.03)  # λ·σ
    assert abs(added.mean().item()) < 3e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_vectorised_equals_the_plain_step_to_the_bit(objective: str) -> None:
    """The connections; the dense buffers, for which both have the same code, against float64."""
    fast = edge_bcs.sparsify(models.resnet18(width=0.05, num_classes=4, input_size=8), 0.9, 1)
    plain = copy.deepcopy(fast)
    for number in range(3):
        x, y = batch(seed=number)
        hyper = Coefficients(noise=1e-3)
        value, velocity = fast.dense_value.double(), fast.dense_momentum.double()
        for sparse, reference in ((fast, False), (plain, True)):
            steps.training_step(
                sparse,
                x,
                y,
                objective_named(objective),
                step=number,
                hyper=hyper,
                attack=Attack(steps=2),
                reference=reference,
            )
        velocity = 0.9 * velocity + fast.gradients()[1].double()
        value = (1 - 5e-4) * value - 0.1 * velocity
        assert torch.allclose(fast.dense_momentum.double(), velocity, rtol=1e-5, atol=1e-7)
        assert torch.allclose(fast.dense_value.double(), value, rtol=1e-5, atol=1e-7)
        assert fast.kappa == plain.kappa
        for name, buffer in plain.state().items():
            assert np.array_equal(fast.state()[name], buffer), (number, name)


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.995])
@pytest.mark.parametrize("name", models.FACTORIES)
def test_kappa_holds_at_every_step(name: str, sparsity: float) -> None:
    model = models.create(name, width=0.05, num_classes=4, input_size=16)
    sparse = edge_bcs.sparsify(model, sparsity, 2)
    kappa = edge_bcs.method.connectivity.kappa(sparse.size, sparsity)
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        x = torch.rand(4, 3, 16, 16, generator=generator)
        labels = torch.arange(4)
        before = set(sparse.index.tolist())
        steps.training_step(
            sparse,
            x,
            labels,
            objective_named("at"),
            step=number,
            hyper=Coefficients(weight_decay=0.1),
            attack=Attack(steps=1),
        )
        kernels = [sparse.network.get_submodule(layer.name).weight for layer in sparse.layers]
        assert sum(int((kernel != 0).sum()) for kernel in kernels) == kappa
        value, index = sparse.coo()
        assert len(index) == kappa and (np.diff(index) > 0).all() and (value != 0).all()
        changed = set(sparse.index.tolist()) ^ before
        if number == 3 and sparsity == 0.9:
            assert changed  # with momentum, by the fourth step something has been rewired


def test_attacked_part_of_the_batch() -> None:
    sparse = edge_bcs.sparsify(pooled(), 0.5, 0)
    x, y = batch(7)
    for name, attacked in (("natural", 0), ("mixed", 3), ("at", 7), ("trades", 7), ("mart", 7)):
        objective = objective_named(name)
        crafted = steps.craft(sparse, x, y, objective, Attack(steps=1), step=0, seed=0)
        changed = (crafted != x).flatten(1).any(1).tolist()
        assert changed == [True] * attacked + [False] * (7 - attacked)
        # Crafting in pieces is crafting at once.
        pieces = [
            steps.craft(
                sparse,
                x[i : i + 3],
                y[i : i + 3],
                objective,
                Attack(steps=1),
                step=0,
                seed=0,
                position=i,
                batch=7,
            )
            for i in (0, 3, 6)
        ]
        assert torch.allclose(torch.cat(pieces), crafted, atol=1e-6)


# The paper's table: where PGD starts, what it increases (of CE and KL(p(x) ‖ p(x̃))), images attacked of 6.
@pytest.mark.parametrize(
    ("name", "start", "loss", "attacked"),
    [
        ("at", "uniform", "ce", 6),
        ("mixed", "uniform", "ce", 3),
        ("trades", "gaussian", "kl", 6),
        ("rst", "gaussian", "kl", 6),
        ("mart", "gaussian", "ce", 6),
    ],
)
def test_the_attack_of_every_objective(name: str, start: str, loss: str, attacked: int) -> None:
    """Ten steps of 2/255 inside ±8/255 from the start's draws, in float64 on one hidden layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # so that no gradient is near zero, where float32 may have another sign
    sparse = edge_bcs.sparsify(model, 0, seed=5, start="new")
    with torch.no_grad():
        for layer in (1, 3):
            sparse.network[layer].weight.copy_(model[layer].weight)
    w1, b1, w2, b2 = (parameter.detach().double().numpy() for parameter in sparse.network.parameters())
    x, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    found = steps.craft(sparse, x, labels, objective_named(name), Attack(), step=7, seed=5)

    def probabilities(images: np.ndarray) -> np.ndarray:
        e = np.exp(np.maximum(images @ w1.T + b1, 0) @ w2.T + b2)
        return e / e.sum(1, keepdims=True)

    clean = x.double().numpy().reshape(6, 12)
    count = attacked * 12
    draws = {
        "uniform": lambda: (
            (2 * random.uniform(count, seed=5, step=7, purpose=random.PGD_START) - 1) * 8 / 255
        ),
        "gaussian": lambda: 0.001 * random.normal(count, seed=5, step=7, purpose=random.PGD_START),
    }
    moved = clean.copy()
    moved[:attacked] = np.clip(moved[:attacked] + draws[start]().reshape(attacked, 12), 0, 1)
    target = probabilities(clean) if loss == "kl" else np.eye(4)[labels]
    for _ in range(10):
        hidden = moved @ w1.T + b1
        gradient = (((probabilities(moved) - target) @ w2) * (hidden > 0)) @ w1
        stepped = np.clip(moved + 2 / 255 * np.sign(gradient), clean - 8 / 255, clean + 8 / 255).clip(0, 1)
        moved[:attacked] = stepped[:attacked]
    assert found.numpy().reshape(6, 12) == pytest.approx(moved, abs=1e-6)


def test_micro_batches_accumulate_the_same_gradient() -> None:
    sparse = edge_bcs.sparsify(pooled(), 0.5, 0)
    x, y = batch(8)
    adversarial = (x + 0.01).clamp(0, 1)
    found = []
    for size in (8, 3):
        sparse.zero_gradients()
        for first in range(0, 8, size):
            part = slice(first, first + size)
            steps.accumulate(
                sparse,
                x[part],
                adversarial[part],
                y[part],
                objective_named("trades"),
                sample_weight=torch.full((len(y[part]),), 1 / 8),
                batch_norm="frozen",
            )
        found.append([gradient.clone() for gradient in sparse.gradients()])
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-7)


def test_frozen_statistics_stay_and_batch_statistics_move() -> None:
    sparse = edge_bcs.sparsify(pooled(), 0.5, 0)
    x, y = batch()
    trades = objective_named("trades")
    sparse.zero_gradients()
    steps.accumulate(sparse, x, x, y, trades, batch_norm="frozen")
    assert sparse.network[1].running_mean.abs().max() == 0
    steps.accumulate(sparse, x, x, y, trades, batch_norm="batch")
    mean = sparse.network[0](x).mean((0, 2, 3))
    # Clean and adversarial images go through separately: two updates, here with the same batch.
    assert torch.allclose(sparse.network[1].running_mean, mean * (1 - 0.9**2), atol=1e-6)


class StochasticDepth(nn.Module):
    """Half of its steps leave out what is inside, and dropout takes from the other half."""

    def __init__(self, inner: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + self.dropout(self.inner(x))


def test_dropout_and_stochastic_depth_are_the_identity_whatever_the_statistics() -> None:
    """The seed and the step fix every random number, and an artifact trains without both."""

    def network(dropout: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(StochasticDepth(nn.BatchNorm2d(3), dropout), *pooled())

    x, y = batch()
    found = []
    for dropout, runs in ((nn.Dropout(0.5), 3), (nn.Identity(), 1)):
        for _ in range(runs):
            sparse = edge_bcs.sparsify(network(dropout), 0.5, 0)
            sparse.network[2].eval()  # it takes the statistics of the batch all the same
            sparse.zero_gradients()
            steps.accumulate(sparse, x, x, y, objective_named("trades"), batch_norm="batch")
            found.append([*sparse.gradients(), *sparse.network.buffers()])
            assert sparse.network[0].dropout.training and not sparse.network[2].training  # as before
    assert found[0][-3].abs().max() > 0
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_births_are_uniform_over_all_dormant_positions() -> None:
    sparse = edge_bcs.sparsify(nn.Sequential(nn.Linear(10, 10, bias=False)), 0.8, 0, "uniform")
    index = np.arange(20) * 5
    drawn: Counter[int] = Counter()
    for number in range(400):
        sparse.load_coo(np.ones(20, np.float32), index)
        sparse.zero_gradients()
        sparse.network[0].weight.grad.view(-1)[index[:5]] = 100.0  # five die
        steps.update(sparse, Coefficients(noise=0.0), step=number)
        drawn.update(set(sparse.index.tolist()) - set(index[5:].tolist()))
    # 85 positions are free (those of the dead among them), 2,000 draws: chi-square of 84 degrees of freedom
    # is above 135 once in 3,000 experiments, and this one always draws the same numbers.
    assert sum(drawn.values()) == 2000 and len(drawn) == 85
    expected = 2000 / 85
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 135


def test_births_by_layer() -> None:
    """Layers are drawn by size, not by what is dormant in them; a full layer takes no more."""
    model = nn.Sequential(
        nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False)
    )
    sparse = edge_bcs.sparsify(model, "0.4", 0, "uniform")
    assert (sparse.size, sparse.kappa) == (210, 126)
    index = np.concatenate([np.arange(96), np.arange(100, 120), np.arange(200, 210)])
    born: Counter[int] = Counter()
    for number in range(60):
        sparse.load_coo(np.ones(126, np.float32), index)
        sparse.zero_gradients()
        sparse.network[1].weight.grad.view(-1)[:4] = 100.0  # positions 100 to 103 die
        assert steps.update(sparse, Coefficients(noise=0.0), step=number, rewire="by-layer") == 4
        fresh = set(sparse.index.tolist()) - (set(index.tolist()) - {100, 101, 102, 103})
        assert len(fresh) == 4
        born.update(position // 100 for position in fresh)
    # Layer 0 has 4 dormant positions and layer 1 has 84: by size they are equally likely (240 births, 7.7
    # sigma from what uniform over dormant positions would give), the last layer is full.
    assert born[2] == 0
    assert born[0] > 75


def test_static_masks_keep_their_positions() -> None:
    sparse = edge_bcs.sparsify(pooled(), 0.5, 0)
    before = sparse.index.clone()
    sparse.zero_gradients()
    for parameter in sparse.parameters():
        parameter.grad += 50.0
    sign = sparse.value().sign()
    assert steps.update(sparse, Coefficients(), step=0, rewire="none") == 0
    assert torch.equal(sparse.index, before) and (sparse.value().sign() != sign).any()


def test_a_step_that_would_make_nonsense_changes_nothing() -> None:
    sparse = edge_bcs.sparsify(pooled(), 0.5, 0)
    before = sparse.state()
    for reference in (False, True):
        sparse.zero_gradients()
        sparse.network[0].weight.grad.fill_(torch.nan)
        with pytest.raises(EdgeBcsError, match="finite"):
            (steps.update_reference if reference else steps.update)(sparse, Coefficients(), step=3)
        for name, buffer in sparse.state().items():
            assert np.array_equal(before[name], buffer)
    with pytest.raises(EdgeBcsError, match="uniform, by-layer or none"):
        steps.update(sparse, Coefficients(), step=0, rewire="global")
    with pytest.raises(EdgeBcsError, match="frozen or batch"):
        x, y = batch()
        steps.accumulate(sparse, x, x, y, objective_named("at"), batch_norm="live")
