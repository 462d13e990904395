"""A new last layer: which it is, its first step, that nothing else changes, and what is pruned of it."""

# mypy: disable-error-code="index, union-attr, arg-type, assignment"

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.exportable import last_layer, with_outputs
from edge_bcs.method import heads
from edge_bcs.method.connectivity import kappa
from edge_bcs.method.new_classes import with_classes
from edge_bcs.method.rewiring import NEWBORN

HIDDEN = 64


def trained(classes: int = 100, hidden: int = HIDDEN) -> nn.Sequential:
    """A small network whose weights are as large as those of trained ones."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, hidden, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(hidden, classes),
    )  # fmt: skip


class Squeezed(nn.Module):
    """Classes are the channels of a convolution, which is pooled in the end, as SqueezeNet has it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes = classes
        self.body = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(8, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).relu()).view(x.size(0), self.num_classes).softmax(1)


class Two(nn.Module):
    """Logits that are the sum of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(48, 5), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.flatten(1)) + self.other(x.flatten(1))


class Fixed(nn.Module):
    """What follows the last layer needs 6 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)).view(-1, 3, 2).view(-1, 6)


GROUPED = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
PIXELS = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())

LAST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (trained, "7"),
    "a convolution, pooled": (lambda: Squeezed(100), "classifier.1"),
    "alone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 100)), "1"),
}


@pytest.mark.parametrize("kind", LAST)
def test_the_last_layer_is_found_and_made_anew(kind: str) -> None:
    make, name = LAST[kind]
    network = make()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert last_layer(network, (3, 4, 4)) == name
    new = with_outputs(network, 10, input_shape=(3, 4, 4))
    assert str(new) == f"the last layer, {name} (100 → 10 outputs), is new"
    with torch.no_grad():
        assert network(torch.rand(2, 3, 4, 4)).shape == (2, 10)
    for key, tensor in network.state_dict().items():
        if key.rpartition(".")[0] == name:
            assert tensor.shape == (10, *before[key].shape[1:])
        else:
            assert torch.equal(tensor, before[key]), key
    assert with_outputs(network, 10, input_shape=(3, 4, 4)) is None
    assert heads.head_of(copy.deepcopy(network)) == heads.Head(name, 10)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Two(), "its logits do not come from one convolution or linear layer"),
        (PIXELS, "its logits do not come from one convolution or linear layer"),
        (GROUPED, "do not come from one"),
        (Fixed(), "cannot have 10 outputs: something behind its last layer, head, needs the 6 that it has"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Softplus()), "cannot be told: .*Softplus"),
    ],
)  # fmt: skip
def test_what_has_no_last_layer_is_told_and_stays(network: nn.Module, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(EdgeBcsError, match=message):
        with_outputs(network, 10, input_shape=(3, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert heads.head_of(network) is None


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("hidden", [16, 1024])
def test_the_first_step_is_sane(hidden: int, scale: float) -> None:
    """Whatever the width: the loss is log(classes), and less flows back than a trained head would send."""
    network = trained(10, hidden)
    with torch.no_grad():
        network[2].weight *= 8  # features of about 1, as batch norm makes them
        x = torch.rand(64, 3, 12, 12)
        features = network[:6](x) * scale
        labels = torch.arange(64) % 10
    heads.renew(network, "7", 10)
    features.requires_grad_()
    logits = network[7](features)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    size = features.detach().square().mean().sqrt().item()
    assert 0 < logits.std().item() < 0.15 * size
    assert abs(loss.item() - math.log(10)) < 0.01 + (0.1 * size) ** 2  # of the logits' variance
    assert not network[7].bias.any()
    # Per image a gradient of at most |p − y| · |w|: w is of the size 0.1/√hidden.
    assert features.grad.norm(dim=1).max().item() * 64 < 0.1 * math.sqrt(10)


def test_weights_are_those_of_the_seed_and_known_to_be_new() -> None:
    one, other, third = trained(), trained(), trained()
    for network, seed in ((one, 3), (other, 3), (third, 4)):
        with_outputs(network, 7, seed=seed)
    assert torch.equal(one[7].weight, other[7].weight) and not torch.equal(one[7].weight, third[7].weight)
    assert heads.is_new(one[7]) and heads.is_new(copy.deepcopy(one)[7]) and not heads.is_new(one[2])
    with torch.no_grad():
        one[7].weight[0, 0] += 1  # somebody has trained it
    assert not heads.is_new(one[7])


@pytest.mark.parametrize("distribution", [None, "uniform", "erk"])
def test_connections_of_a_new_layer_are_drawn(distribution: str | None) -> None:
    """Magnitudes say nothing there: it gets its even part, and its places are not its largest weights."""
    network = trained(100)
    names = [f"class {n}" for n in range(40)]
    sparse = edge_bcs.sparsify(
        network, "0.8", 3, distribution, dense=[], start="magnitude", classes=names, input_shape=(3, 12, 12)
    )
    sizes = [3 * 16 * 9, 16 * HIDDEN * 9, HIDDEN * 40]
    assert sparse.size == sum(sizes) and sparse.kappa == sum(sizes) // 5 and sparse.classes == tuple(names)
    head = sparse.network.get_parameter("7.weight")
    kept = head != 0
    if distribution is None:
        assert sparse.layer_counts()["7"] == round(sparse.kappa * sizes[2] / sparse.size)
    renewed = copy.deepcopy(network)
    with_outputs(renewed, 40, seed=3)
    assert torch.equal(head[kept], renewed[7].weight[kept])
    # Of places drawn at random half of the weights are below the median, give or take; of the largest none.
    assert 0.35 < (head[kept].abs() < renewed[7].weight.abs().median()).float().mean() < 0.65
    for name in ("0", "2"):  # and of the others the largest are kept
        after, before = (
            sparse.network.get_parameter(f"{name}.weight"),
            network.get_parameter(f"{name}.weight"),
        )
        there = after != 0
        if not there.all():
            assert before[there].abs().min() >= before[~there].abs().max()
    assert network[7].weight.shape == (100, HIDDEN)  # the user's module is as it was


def test_all_connections_or_a_dense_layer_keep_the_new_weights() -> None:
    network = trained(100)
    renewed = copy.deepcopy(network)
    with_outputs(renewed, 10)
    for sparsity, dense in ((0, []), (0.9, ["7"])):
        sparse = edge_bcs.sparsify(network, sparsity, dense=dense, start="magnitude", classes=10)
        assert torch.equal(sparse.network.get_parameter("7.weight"), renewed[7].weight)
    assert np.count_nonzero(sparse.coo()[0]) == sparse.kappa


def sparse_network(classes: int, sparsity: str, dense: list[str] | None = None) -> edge_bcs.SparseModel:
    """Trained for a while: momentum, moved weights, steps."""
    names = [f"class {n}" for n in range(classes)]
    sparse = edge_bcs.sparsify(trained(classes), sparsity, 3, "uniform", dense=dense or [], start="magnitude")
    sparse.momentum.fill_(0.5)
    sparse.step, sparse.classes = 70, tuple(names)
    return sparse


@pytest.mark.parametrize(
    ("before", "after", "sparsity"),
    [(100, 10, "0.9"), (10, 100, "0.9"), (10, 100, "0.3"), (100, 2, "0.02"), (4, 4000, "0.999")],
)
def test_a_sparse_network_keeps_its_connections_and_kappa(before: int, after: int, sparsity: str) -> None:
    sparse = sparse_network(before, sparsity)
    state = sparse.state()
    made = with_classes(sparse, [f"new {n}" for n in range(after)], input_shape=(3, 12, 12))
    body = 3 * 16 * 9 + 16 * HIDDEN * 9
    assert made.size == body + HIDDEN * after and made.kappa == kappa(made.size, sparsity)
    assert made.classes is not None and len(made.classes) == after
    assert made.step == 0 and not made.momentum.any() and made.record["head"]["classes"] == after
    counts = made.layer_counts()
    assert counts["7"] >= min(HIDDEN * after, max(1, round(made.kappa * HIDDEN * after / made.size)))
    old = {name: sparse.network.get_parameter(f"{name}.weight") for name in ("0", "2")}
    new = {name: made.network.get_parameter(f"{name}.weight") for name in ("0", "2")}
    gone = [old[name][(old[name] != 0) & (new[name] == 0)].abs() for name in old]
    born = [new[name][(old[name] == 0) & (new[name] != 0)].abs() for name in old]
    for name in old:
        both = (old[name] != 0) & (new[name] != 0)
        assert torch.equal(old[name][both], new[name][both])
    assert not (torch.cat(gone).numel() and torch.cat(born).numel())
    assert (torch.cat(born) == float(NEWBORN)).all()
    if torch.cat(gone).numel():  # the smallest made way
        assert torch.cat(gone).max() <= min(new[name][new[name] != 0].abs().min() for name in new)
    # Biases before the last layer stay.
    assert torch.equal(made.network.get_parameter("2.bias"), sparse.network.get_parameter("2.bias"))
    assert all(np.array_equal(tensor, sparse.state()[name]) for name, tensor in state.items())


def test_a_dense_last_layer_leaves_all_connections_where_they_are() -> None:
    sparse = sparse_network(100, "0.9", ["7"])
    made = with_classes(sparse, 10, input_shape=(3, 12, 12))
    assert all(np.array_equal(one, other) for one, other in zip(made.coo(), sparse.coo(), strict=True))
    renewed = trained(100)
    with_outputs(renewed, 10, seed=3)
    assert torch.equal(made.network.get_parameter("7.weight"), renewed[7].weight)
    same = with_classes(sparse, 100, input_shape=(3, 12, 12))
    assert same.classes == sparse.classes and same.step == 70
    assert all(np.array_equal(tensor, same.state()[name]) for name, tensor in sparse.state().items())


def test_networks_of_edge_bcs_know_their_classes() -> None:
    network = edge_bcs.models.resnet18(num_classes=100, width=0.0625, input_size=16)
    sparse = edge_bcs.sparsify(network, 0.5, start="magnitude", classes=7)
    assert sparse.record["arguments"]["num_classes"] == 7 and "head" not in sparse.record
    assert network.network["arguments"]["num_classes"] == 100
