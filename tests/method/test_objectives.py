"""Every objective's loss and gradient against float64 arithmetic written from the formulas."""

# mypy: disable-error-code="arg-type, return-value"

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES, objective_named
from edge_bcs.method import losses as objectives

Array = NDArray[np.float64]
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


def probabilities(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def formula(name: str, clean: Array, adversarial: Array, labels: NDArray[np.int64], beta: float) -> Array:
    """Return the loss per sample, written sample by sample from the papers' formulas."""
    losses = []
    for p, q, y in zip(probabilities(clean), probabilities(adversarial), labels, strict=True):
        divergence = sum(p[j] * np.log(p[j] / q[j]) for j in range(len(p)))
        if name == "mart":
            wrong = max(q[j] for j in range(len(q)) if j != y)
            boosted = -np.log(q[y]) - np.log(1.0001 - wrong + 1e-12)
            losses.append(boosted + beta * divergence * (1.0000001 - p[y]))
        else:
            losses.append(-np.log(p[y]) + beta * divergence)
    return np.array(losses)


def numerical_gradient(function: Callable[[Array], float], at: Array) -> Array:
    gradient = np.zeros_like(at)
    for position in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[position] += 1e-5
        down[position] -= 1e-5
        gradient[position] = (function(up) - function(down)) / 2e-5
    return gradient


@pytest.fixture
def batch() -> tuple[Array, Array, NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return generator.normal(0, 2, (7, 5)), generator.normal(0, 2, (7, 5)), generator.integers(0, 5, 7)


# The papers' β is what an objective takes by itself; the attacks of each are in test_step.py.
@pytest.mark.parametrize(
    ("name", "given", "beta"),
    [("trades", None, 6.0), ("rst", None, 6.0), ("mart", None, 4.0), ("trades", 1.5, 1.5)],
)
def test_two_branches(
    name: str, given: float | None, beta: float, batch: tuple[Array, Array, NDArray[np.int64]]
) -> None:
    clean, adversarial, labels = batch
    weight = np.linspace(0.1, 0.7, 7)
    first, second = (
        torch.tensor(logits, dtype=torch.float64, requires_grad=True) for logits in (clean, adversarial)
    )
    losses = objectives.per_sample(objective_named(name), torch.from_numpy(labels), first, second, given)
    assert losses.detach().numpy() == pytest.approx(
        formula(name, clean, adversarial, labels, beta), rel=1e-10
    )
    objectives.weighted(losses, torch.from_numpy(weight)).backward()
    expected = numerical_gradient(lambda c: formula(name, c, adversarial, labels, beta) @ weight, clean)
    assert first.grad is not None and first.grad.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    expected = numerical_gradient(lambda a: formula(name, clean, a, labels, beta) @ weight, adversarial)
    assert second.grad is not None and second.grad.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["natural", "at", "mixed"])
def test_cross_entropy(name: str, batch: tuple[Array, Array, NDArray[np.int64]]) -> None:
    logits, _, labels = batch
    tensor = torch.tensor(logits, requires_grad=True)
    losses = objectives.per_sample(objective_named(name), torch.from_numpy(labels), tensor)
    p = probabilities(logits)
    assert losses.detach().numpy() == pytest.approx(-np.log(p[np.arange(7), labels]), rel=1e-10)
    objectives.weighted(losses).backward()
    assert tensor.grad is not None
    assert tensor.grad.numpy() == pytest.approx((p - np.eye(5)[labels]) / 7, rel=1e-9)


def test_float32_is_close_to_float64(batch: tuple[Array, Array, NDArray[np.int64]]) -> None:
    clean, adversarial, labels = batch
    for name in ("trades", "mart"):
        losses = objectives.per_sample(
            objective_named(name),
            torch.from_numpy(labels),
            torch.tensor(clean).float(),
            torch.tensor(adversarial).float(),
        )
        expected = formula(name, clean, adversarial, labels, objective_named(name).beta)
        assert losses.numpy() == pytest.approx(expected, rel=1e-5)


def test_a_sample_of_weight_zero_has_no_part() -> None:
    losses = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    total = objectives.weighted(losses, torch.tensor([0.5, 0.0, 0.25]))
    assert total.item() == 1.25


def decisions(file: Path) -> Iterator[str]:
    """Lines of a source that compare something with the name of an objective."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare):
            constants = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(isinstance(part.value, str) and part.value in OBJECTIVES for part in constants):
                yield f"{file.relative_to(ROOT)}:{node.lineno}"


def test_only_the_table_decides_by_an_objectives_name() -> None:
    rooms = ("edge_bcs", "exporters", "runtime", "targets")
    files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    assert [place for file in files for place in decisions(file)] == []


@pytest.mark.parametrize(
    ("name", "runs"),  # ten images, four at a time, the attack in three steps
    [
        ("natural", {"attack": 0, "eval": 0, "training": 3, "optimizer": 1}),
        ("at", {"attack": 9, "eval": 0, "training": 3, "optimizer": 1}),
        ("mixed", {"attack": 6, "eval": 0, "training": 3, "optimizer": 1}),
        ("trades", {"attack": 9, "eval": 3, "training": 3, "optimizer": 1}),
        ("mart", {"attack": 9, "eval": 0, "training": 3, "optimizer": 1}),
    ],
)
def test_a_step_runs_each_graph_so_often(name: str, runs: dict[str, int]) -> None:
    assert objective_named(name).runs(10, 4, 3) == runs


def test_refusals() -> None:
    with pytest.raises(EdgeBcsError, match="no objective 'pgd'"):
        objective_named("pgd")
    with pytest.raises(EdgeBcsError, match="clean and of adversarial"):
        objectives.per_sample(objective_named("trades"), torch.tensor([0]), torch.zeros(1, 2))
