"""A teacher's term of the loss: against numpy and torch in float64, and what a teacher must know."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.networks import pooled
from torch import Tensor, nn
from torch.nn import functional

import edge_bcs
from edge_bcs import Teacher
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import objective_named
from edge_bcs.core.settings import Attack
from edge_bcs.method import step as steps
from edge_bcs.method.losses import per_sample

SHAPE = (3, 8, 8)


def network(outputs: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return pooled(outputs)


def images(count: int = 6) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


class Fixed(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class Picky(nn.Module):
    """Takes no images of another size, as many do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 32:
            raise ValueError("32 pixels\nare what it takes")
        return x


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_precision_is_asked_in_f32(kind: torch.dtype) -> None:
    sparse, wise = edge_bcs.sparsify(network(), 0.5, 3, dense=[]), network(seed=7).to(kind)
    answers = Teacher(wise).ready(sparse, SHAPE).network(images())
    assert torch.equal(answers, copy.deepcopy(wise).float().eval()(images()))
    assert next(wise.parameters()).dtype == kind


def test_the_term_by_hand() -> None:
    """weight·T²·Σ q·(ln q − ln p), with q and p softened by T, in plain numpy."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [3.0, -1.0, 0.5]])
    found = Teacher(Fixed(4.0, 2.0, 0.0), weight=0.5, temperature=2.0).loss(torch.zeros(2, *SHAPE), logits)
    q = np.exp([2.0, 1.0, 0.0]) / (np.e**2 + np.e + 1)
    expected = []
    for row in logits.double().numpy():
        p = np.exp(row / 2) / np.exp(row / 2).sum()
        expected.append(0.5 * 4 * (q * (np.log(q) - np.log(p))).sum())
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # ln 3 − H(q) against an even answer: H(q) = ln(e² + e + 1) − (2·e² + e)/(e² + e + 1).
    entropy = np.log(np.e**2 + np.e + 1) - (2 * np.e**2 + np.e) / (np.e**2 + np.e + 1)
    assert expected[0] == pytest.approx(2 * (np.log(3) - entropy))


@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_whole_loss_in_float64(objective: str, weighted: bool) -> None:
    sparse = edge_bcs.sparsify(network(), 0.5, 3, dense=[])
    x, labels = images(), torch.arange(6) % 4
    adversarial = (x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    rule = objective_named(objective)
    if objective == "mixed":
        adversarial[3:] = x[3:]
    elif objective == "natural":
        adversarial = x
    teacher = Teacher(network(seed=7), weight=0.7, temperature=3.0)
    weights = torch.arange(1, 7) / 10 if weighted else None
    sparse.zero_gradients()
    outcome = steps.accumulate(
        sparse, x, adversarial, labels, rule, beta=2.0, sample_weight=weights, batch_norm="frozen",
        teacher=teacher.ready(sparse, SHAPE),
    )  # fmt: skip

    other, wise = (
        copy.deepcopy(sparse.network).double().eval(),
        copy.deepcopy(teacher.network).double().eval(),
    )
    attacked = other(adversarial.double())
    clean = other(x.double()) if rule.two_branches else attacked
    losses = per_sample(rule, labels, clean, attacked, 2.0)
    apart = functional.kl_div(
        (attacked / 3).log_softmax(1), (wise(x.double()) / 3).softmax(1).detach(), reduction="none"
    ).sum(1)
    losses = losses + 0.7 * 9 * apart
    loss = losses.mean() if weights is None else (weights.double() * losses).sum()
    other.zero_grad()
    loss.backward()
    assert float(outcome.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, mine), theirs in zip(sparse.network.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6), name


def test_a_teacher_answers_in_the_order_of_the_classes_and_stays_as_it_is() -> None:
    sparse = edge_bcs.sparsify(network(3), 0.5, 3, dense=[])
    sparse.classes = ("bee", "ant", "cat")
    wise = edge_bcs.sparsify(network(4, seed=7), 0, dense=[], start="magnitude")
    wise.classes = ("ant", "bee", "cat", "dog")
    wise.train()
    before = {name: value.clone() for name, value in wise.state_dict().items()}
    answers = Teacher(wise).ready(sparse, SHAPE).network(images())
    assert all(torch.equal(value, before[name]) for name, value in wise.state_dict().items())
    assert wise.training
    wise.eval()
    assert torch.equal(answers, wise(images())[:, [1, 0, 2]])
    # Without names on one side the places count.
    wise.classes = None
    with pytest.raises(EdgeBcsError, match="the teacher has 4 outputs, and the network 3"):
        Teacher(wise).ready(sparse, SHAPE)
    # So they do where the names are only numbers.
    wise.classes = ("0", "1", "2", "3")
    with pytest.raises(EdgeBcsError, match="the teacher has 4 outputs, and the network 3"):
        Teacher(wise).ready(sparse, SHAPE)
    assert Teacher(network(3)).ready(sparse, SHAPE).network(images()).shape == (6, 3)


def test_probabilities_are_taken_for_what_they_are() -> None:
    """Many files end in a softmax; softened a second time it would say next to nothing."""
    sparse, wise, x = edge_bcs.sparsify(network(), 0.5, 3, dense=[]), network(seed=7), images()
    logits = sparse(x).detach()
    expected = Teacher(wise).ready(sparse, SHAPE).loss(x, logits)
    for ending in (nn.Softmax(1), nn.LogSoftmax(1)):
        found = Teacher(nn.Sequential(copy.deepcopy(wise), ending)).ready(sparse, SHAPE).loss(x, logits)
        assert torch.allclose(found, expected, rtol=1e-4) and (expected > 1e-4).all()


def test_a_network_can_be_its_own_teacher() -> None:
    """A training asks a copy: its answers do not change with the network."""
    sparse = edge_bcs.sparsify(network(), 0.5, 3, dense=[])
    teacher, known = Teacher(sparse), Teacher(sparse).fingerprint
    ready = teacher.ready(sparse, SHAPE)
    before = ready.network(images())
    for step in range(2):
        steps.training_step(sparse, images(), torch.arange(6) % 4, objective_named("at"), step=step,
                            attack=Attack(steps=1))  # fmt: skip
    assert torch.equal(ready.network(images()), before) and teacher.fingerprint == known
    assert Teacher(sparse).fingerprint != known
    assert not any(parameter.requires_grad for parameter in ready.network.parameters())


def test_a_fingerprint_is_of_weights_statistics_and_normalisation() -> None:
    first, second = network(), network()
    known = Teacher(first).fingerprint
    assert known == Teacher(second, weight=2.0).fingerprint
    whole = edge_bcs.sparsify(first, 0, dense=[], start="magnitude")
    assert Teacher(whole).fingerprint == known
    whole.momentum += 1  # on which no answer depends
    assert Teacher(whole).fingerprint == known
    whole.normalize = edge_bcs.Normalization((0.5,), (0.2,))
    assert Teacher(whole).fingerprint != known
    second[1].get_buffer("running_mean").add_(1.0)
    assert Teacher(first).fingerprint != Teacher(second).fingerprint


def test_what_is_refused() -> None:
    sparse = edge_bcs.sparsify(network(), 0.5, 3, dense=[])
    for given, message in (
        ({"weight": 0}, "the weight of a teacher must be above 0"),
        ({"weight": float("nan")}, "the weight of a teacher must be a number of at least 0"),
        ({"temperature": -1.0}, "the temperature of a teacher must be a number of at least 0"),
        ({"temperature": 0.0}, "the temperature of a teacher must be above 0"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            Teacher(network(), **given)
    with pytest.raises(EdgeBcsError, match=r"does not take images of the shape \[1, 8, 8\]"):
        Teacher(nn.Conv2d(3, 4, 1)).ready(
            edge_bcs.sparsify(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 0), (1, 8, 8)
        )
    with pytest.raises(EdgeBcsError, match=r"answer is \[4, 8, 8\], not a number for each class"):
        Teacher(nn.Conv2d(3, 4, 1)).ready(sparse, SHAPE)
    with pytest.raises(EdgeBcsError, match=r"images of the shape \[3, 8, 8\] \(ValueError: 32 pixels\)"):
        Teacher(Picky()).ready(sparse, SHAPE)
    with pytest.raises(EdgeBcsError, match="the teacher's answers are not finite"):
        Teacher(Fixed(float("nan"), 0.0, 0.0, 0.0)).ready(sparse, SHAPE)
    with pytest.raises(EdgeBcsError, match="a teacher is a torch module, not a str"):
        Teacher("runs/dense")  # type: ignore[arg-type]
    sparse.classes = ("ant", "bee", "cat", "dog")
    wise = edge_bcs.sparsify(network(), 0, dense=[], start="magnitude")
    wise.classes = ("ant", "bee", "cat", "eel")
    with pytest.raises(EdgeBcsError, match="the teacher does not know the class 'dog'"):
        Teacher(wise).ready(sparse, SHAPE)
