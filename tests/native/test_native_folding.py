"""Scales and shifts of all norms and biases in one tensor, and its gradient, against torch in float64."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.native_layers import F, close
from helpers.operators import run, tensor

# kind, channels, bias, gamma, beta, statistics: a biased layer, one without anything, frozen batch norms with
# and without a bias before them and without parameters, a batch norm with batch statistics, and scales of
# their own, with and without a bias before them.
ENTRIES = [
    (0, 4, 10, -1, -1, -1),
    (0, 2, -1, -1, -1, -1),
    (1, 3, 0, 3, 6, 2),
    (1, 5, -1, 14, 19, 5),
    (1, 2, -1, -1, -1, 0),
    (2, 3, -1, 24, 27, 7),
    (3, 3, 20, 1, -1, -1),
    (3, 2, -1, 28, -1, -1),
]


def folded(dense: torch.Tensor, mean: np.ndarray, variance: np.ndarray, epsilon: float) -> torch.Tensor:
    scales, shifts = [], []
    for kind, channels, bias, gamma, beta, statistics in ENTRIES:

        def part(offset: int, otherwise: float, count: int = channels) -> torch.Tensor:
            constant = torch.full((count,), otherwise, dtype=torch.float64)
            return constant if offset < 0 else dense[offset : offset + count]

        if kind == 0:
            scales.append(torch.ones(channels, dtype=torch.float64))
            shifts.append(part(bias, 0))
            continue
        scale = part(gamma, 1)
        shift = part(beta, 0) + (part(bias, 0) * scale if kind == 3 else 0)
        if kind == 1:
            scale = scale / torch.from_numpy(np.sqrt(variance[statistics : statistics + channels] + epsilon))
            shift = (
                shift + (part(bias, 0) - torch.from_numpy(mean[statistics : statistics + channels])) * scale
            )
        scales.append(scale)
        shifts.append(shift)
    return torch.cat(scales + shifts)


def test_fold_affine_without_any_parameter_or_statistic() -> None:
    inputs = {name: np.zeros(0, F) for name in ("dense", "mean", "variance")}
    made = run("FoldAffine", inputs, {"affine": F}, entries=[0, 64, -1, -1, -1, -1])["affine"]
    assert made.tolist() == [1.0] * 64 + [0.0] * 64


def test_fold_affine_and_its_gradient() -> None:
    generator = np.random.default_rng(5)
    dense = generator.normal(size=30).astype(F)
    mean, variance = generator.uniform(0.5, 2, size=(2, 10)).astype(F)
    entries = [number for entry in ENTRIES for number in entry]
    inputs = {"dense": dense, "mean": mean, "variance": variance}
    made = run("FoldAffine", inputs, {"affine": F}, entries=entries, epsilon=1e-3)["affine"]
    parameters = tensor(dense)
    expected = folded(parameters, mean.astype(np.float64), variance.astype(np.float64), 1e-3)
    close(made, expected)

    affine_grad = generator.normal(size=len(made)).astype(F)
    expected.backward(torch.from_numpy(affine_grad.astype(np.float64)))
    dense_grad = generator.normal(size=30).astype(F)
    inputs = {"affine_grad": affine_grad} | inputs | {"dense_grad": dense_grad}
    grown = run("FoldAffineGrad", inputs, {"dense_grad": F}, entries=entries, epsilon=1e-3)["dense_grad"]
    close(grown, dense_grad + parameters.grad.numpy())

    zeros = run("ZeroAffine", {"affine": made}, {"affine_grad": F})["affine_grad"]
    assert zeros.shape == made.shape and not zeros.any()


def test_the_gradient_of_a_part_lies_where_it_is_wanted() -> None:
    """A frozen batch norm behind a bias, and a bias: of the former the shift, of the latter all."""
    entries = [1, 3, 0, 3, 6, 0, 0, 2, 9, -1, -1, -1]
    generator = np.random.default_rng(6)
    affine_grad, dense = generator.normal(size=10).astype(F), generator.normal(size=11).astype(F)
    inputs = {"affine_grad": affine_grad, "dense": dense, "mean": np.ones(3, F), "variance": np.full(3, 2, F)}
    inputs["dense_grad"] = np.zeros(11, F)
    every = run("FoldAffineGrad", inputs, {"grad": F}, entries=entries)["grad"]
    inputs["dense_grad"], places = np.ones(6, F), [-1, -1, 0, 4, -1, -1]
    part = run("FoldAffineGrad", inputs, {"grad": F}, entries=entries, gradients=places)["grad"]
    assert part.tolist() == [*(1 + every[6:9]), 1, *(1 + every[9:11])]
    for gradients, message in (
        ([0], "the attribute gradients has 1 numbers, not three for each entry"),
        ([-1, -1, 0, 5, -1, -1], "an entry has its gradient from 5 to 7 of 6"),
        ([-2, -1, 0, 4, -1, -1], "the attribute gradients has an offset of -2"),
    ):
        with pytest.raises(Exception, match="FoldAffineGrad: " + message):
            run("FoldAffineGrad", inputs, {"grad": F}, entries=entries, gradients=gradients)


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([0, 4, 10, -1, -1], {}, "5 numbers, not six"),
        ([4, 4, -1, -1, -1, -1], {}, "entry 0 is out of range"),
        ([1, 4, -1, -1, -1, -1], {}, "entry 0 has no statistics"),
        ([0, 4, 3, -1, -1, -1], {}, "an entry reads parameters 3 to 7 of 6"),
        ([0, 4, -2, -1, -1, -1], {}, "entry 0 has an offset of -2"),
        ([0, 4, (1 << 63) - 1, -1, -1, -1], {}, "entry 0 has an offset of 9223372036854775807"),
        ([1, 4, -1, -1, -1, 1], {}, "an entry reads statistics 1 to 5 of 4"),
        ([1, 4, -1, -1, -1, 0], {"variance": np.array([1, 1, -1, 1], F)}, "a running variance is -1"),
        ([1, 4, -1, -1, -1, 0], {"variance": np.ones(3, F)}, "not vectors of one length"),
    ],
)
def test_fold_affine_refuses(entries: list[int], changes: dict[str, np.ndarray], message: str) -> None:
    inputs = {"dense": np.ones(6, F), "mean": np.ones(4, F), "variance": np.ones(4, F)}
    with pytest.raises(Exception, match="FoldAffine: .*" + message):
        run("FoldAffine", inputs | changes, {"affine": F}, entries=entries)
