"""The losses, their gradients and their counts against torch autograd in float64."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from helpers.operators import pack, run, unpack

F = np.float32
SHAPES = [(1, 1, 2), (2, 3, 10), (1, 16, 7), (3, 4, 100)]  # blocks, lanes, classes


def logits(shape: tuple[int, int, int], seed: int, scale: float = 3.0) -> np.ndarray:
    blocks, lanes, classes = shape
    return (np.random.default_rng([seed, *shape]).normal(size=(blocks * lanes, classes)) * scale).astype(F)


def stack(values: np.ndarray, lanes: int) -> np.ndarray:
    return pack(values[:, :, None, None], lanes, 0)


def unstack(values: np.ndarray, classes: int) -> np.ndarray:
    return unpack(values, classes, 1, 1, 0)[:, :, 0, 0]


def targets(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(9)
    labels = generator.integers(0, classes, count)
    weight = generator.uniform(0.1, 2, count).astype(F)
    weight[2::5] = 0
    return labels, weight


def leaf(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float64)).requires_grad_()


def divergence(clean: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    p, q = functional.log_softmax(clean, 1), functional.log_softmax(adversarial, 1)
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)


def trades(clean: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    return functional.cross_entropy(clean, labels, reduction="none") + beta * divergence(clean, adversarial)


def mart(clean: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    p, q = functional.softmax(clean, 1), functional.softmax(adversarial, 1)
    rival = q.scatter(1, labels[:, None], -1.0).max(1).values
    boosted = functional.cross_entropy(adversarial, labels, reduction="none")
    boosted = boosted - torch.log(1.0001 - rival + 1e-12)
    true = p.gather(1, labels[:, None])[:, 0]
    return boosted + beta * divergence(clean, adversarial) * (1.0000001 - true)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape: tuple[int, int, int]) -> None:
    blocks, lanes, classes = shape
    values = logits(shape, 0)
    labels, weight = targets(blocks * lanes, classes)
    inputs = {"logits": stack(values, lanes), "labels": labels, "sample_weight": weight}
    made = run("CrossEntropy", inputs, {"loss": F, "dlogits": F, "correct": F})
    x = leaf(values)
    loss = (
        torch.from_numpy(weight) * functional.cross_entropy(x, torch.from_numpy(labels), reduction="none")
    ).sum()
    loss.backward()
    assert made["loss"].shape == ()
    np.testing.assert_allclose(made["loss"], loss.item(), rtol=1e-6)
    np.testing.assert_allclose(unstack(made["dlogits"], classes), x.grad, rtol=1e-5, atol=1e-7)
    assert made["correct"].tolist() == [((values.argmax(1) == labels) & (weight > 0)).sum()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operator", "reference"), [("Trades", trades), ("Mart", mart)])
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_two_branches(
    shape: tuple[int, int, int], operator: str, reference: Callable[..., torch.Tensor], beta: float
) -> None:
    blocks, lanes, classes = shape
    clean, adversarial = logits(shape, 0), logits(shape, 1)
    labels, weight = targets(blocks * lanes, classes)
    inputs = {
        "clean": stack(clean, lanes),
        "adversarial": stack(adversarial, lanes),
        "labels": labels,
        "sample_weight": weight,
    }
    outputs = {"loss": F, "dclean": F, "dadversarial": F, "correct": F}
    made = run(operator, inputs, outputs, beta=beta)
    x, y = leaf(clean), leaf(adversarial)
    loss = (torch.from_numpy(weight) * reference(x, y, torch.from_numpy(labels), beta)).sum()
    loss.backward()
    np.testing.assert_allclose(made["loss"], loss.item(), rtol=1e-5)
    expected = x.grad if x.grad is not None else torch.zeros_like(x)
    np.testing.assert_allclose(unstack(made["dclean"], classes), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unstack(made["dadversarial"], classes), y.grad, rtol=1e-5, atol=1e-6)
    counted = [((branch.argmax(1) == labels) & (weight > 0)).sum() for branch in (clean, adversarial)]
    assert made["correct"].tolist() == counted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_without_a_label_trades_has_its_second_term(shape: tuple[int, int, int], beta: float) -> None:
    blocks, lanes, classes = shape
    clean, adversarial = logits(shape, 0), logits(shape, 1)
    labels, weight = targets(blocks * lanes, classes)
    bare = np.arange(blocks * lanes) % 2 == 0
    x, y = leaf(clean), leaf(adversarial)
    first = functional.cross_entropy(x, torch.from_numpy(labels), reduction="none")
    each = first * torch.from_numpy(~bare) + beta * divergence(x, y)
    loss = (torch.from_numpy(weight) * each).sum()
    loss.backward()
    labels[bare] = -1
    inputs = {"clean": stack(clean, lanes), "adversarial": stack(adversarial, lanes)}
    outputs = {"loss": F, "dclean": F, "dadversarial": F, "correct": F}
    made = run("Trades", inputs | {"labels": labels, "sample_weight": weight}, outputs, beta=beta)
    np.testing.assert_allclose(made["loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(unstack(made["dclean"], classes), x.grad, rtol=1e-5, atol=1e-6)
    expected = torch.zeros_like(y) if y.grad is None else y.grad
    np.testing.assert_allclose(unstack(made["dadversarial"], classes), expected, rtol=1e-5, atol=1e-6)
    right = [((branch.argmax(1) == labels) & (weight > 0)).sum() for branch in (clean, adversarial)]
    assert made["correct"].tolist() == right


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_difference_seeds_cross_entropy_and_divergence(shape: tuple[int, int, int]) -> None:
    _, lanes, classes = shape
    clean, adversarial = logits(shape, 0), logits(shape, 1)
    target = torch.from_numpy(clean.astype(np.float64)).softmax(1)
    y = leaf(adversarial)
    divergence(torch.from_numpy(clean.astype(np.float64)), y).sum().backward()
    inputs = {"logits": stack(adversarial, lanes), "target": target.numpy().astype(F)}
    made = run("SoftmaxDifference", inputs, {"dlogits": F})["dlogits"]
    np.testing.assert_allclose(unstack(made, classes), y.grad, atol=2e-7)


def test_extreme_logits_stay_finite() -> None:
    values = np.array([[1e4, -1e4], [-3e38, 3e38]], F)
    inputs = {"logits": stack(values, 2), "labels": np.array([0, 1]), "sample_weight": np.ones(2, F)}
    made = run("CrossEntropy", inputs, {"loss": F, "dlogits": F, "correct": F})
    assert made["loss"] == 0 and not made["dlogits"].any() and made["correct"].tolist() == [2]


def test_padding_samples_may_hold_anything() -> None:
    values = np.array([[1, 2], [np.nan, 0]], F)
    inputs = {"logits": stack(values, 2), "labels": np.array([0, 0]), "sample_weight": np.array([1, 0], F)}
    made = run("CrossEntropy", inputs, {"loss": F, "dlogits": F, "correct": F})
    np.testing.assert_allclose(made["loss"], np.log1p(np.e), rtol=1e-6)
    assert unstack(made["dlogits"], 2)[1].tolist() == [0, 0]


GOOD: dict[str, np.ndarray] = {
    "logits": np.zeros((1, 3, 2), F),
    "labels": np.array([0, 2]),
    "sample_weight": np.ones(2, F),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 3])}, "a label is 3, not in \\[(0|-1), 3\\)"),
        ({"labels": np.array([-2, 0])}, "a label is -2"),
        ({"labels": np.array([0])}, "labels \\[1\\]"),
        ({"sample_weight": np.ones((2, 1), F)}, "sample_weight \\[2, 1\\]"),
        ({"sample_weight": np.array([1, -1], F)}, "a sample has the weight -1"),
        ({"sample_weight": np.array([1, np.nan], F)}, "a sample has the weight nan"),
        ({"logits": np.zeros((3, 2), F)}, "is \\[3, 2\\]"),
        ({"logits": np.full((1, 3, 2), np.nan, F)}, "the logits are not finite"),
        ({"logits": np.full((1, 3, 2), np.inf, F)}, "the logits are not finite"),
    ],
)
@pytest.mark.parametrize("operator", ["CrossEntropy", "Trades", "Mart"])
def test_losses_refuse(operator: str, changes: dict[str, np.ndarray], message: str) -> None:
    inputs: dict[str, Any] = GOOD | changes
    outputs = {"loss": F, "dlogits": F, "correct": F}
    attributes: dict[str, Any] = {}
    if operator != "CrossEntropy":
        values = inputs.pop("logits")
        inputs = {"clean": values, "adversarial": values} | inputs
        outputs = {"loss": F, "dclean": F, "dadversarial": F, "correct": F}
        attributes = {"beta": 1.0}
    with pytest.raises(Exception, match=f"{operator}: .*{message}"):
        run(operator, inputs, outputs, **attributes)


@pytest.mark.parametrize("operator", ["CrossEntropy", "Mart"])
def test_losses_of_labels_alone_refuse_an_image_without(operator: str) -> None:
    inputs: dict[str, Any] = GOOD | {"labels": np.array([-1, 0])}
    outputs = {"loss": F, "dlogits": F, "correct": F}
    if operator == "Mart":
        values = inputs.pop("logits")
        inputs = {"clean": values, "adversarial": values} | inputs
        outputs = {"loss": F, "dclean": F, "dadversarial": F, "correct": F}
    with pytest.raises(Exception, match=f"{operator}: .*a label is -1, not in \\[0, 3\\)"):
        run(operator, inputs, outputs, **({"beta": 1.0} if operator == "Mart" else {}))


def test_two_branch_losses_and_seed_refuse() -> None:
    outputs = {"loss": F, "dclean": F, "dadversarial": F, "correct": F}
    inputs = {"clean": GOOD["logits"], "adversarial": np.zeros((1, 4, 2), F)}
    inputs |= {name: GOOD[name] for name in ("labels", "sample_weight")}
    with pytest.raises(Exception, match="Trades: adversarial is \\[1, 4, 2\\]"):
        run("Trades", inputs, outputs, beta=1.0)
    with pytest.raises(Exception, match="Mart: beta is -1"):
        run("Mart", inputs, outputs, beta=-1.0)
    with pytest.raises(Exception, match="Mart: the float attribute beta is missing"):
        run("Mart", inputs, outputs)
    with pytest.raises(Exception, match="SoftmaxDifference: target is \\[2, 4\\]"):
        run("SoftmaxDifference", {"logits": GOOD["logits"], "target": np.zeros((2, 4), F)}, {"dlogits": F})
