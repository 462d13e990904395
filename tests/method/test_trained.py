"""What counts as a trained module, and that `sparsify` does not throw its weights away without a word."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edge_bcs
from edge_bcs import comparators, models
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import open_data
from edge_bcs.method import connectivity
from edge_bcs.method.trained import evidence_of_training


def plain(initial: Callable[[torch.Tensor], object] | None = None) -> nn.Sequential:
    """Without batch norm: only weights and biases can tell."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    for part in network:
        if initial is not None and isinstance(part, nn.Conv2d | nn.Linear):
            initial(part.weight)
    return network


def with_norm() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))


def learn(network: nn.Module, epochs: int = 6) -> float:
    """Train a dense module on the digits as everybody does, and return its accuracy on them."""
    data = open_data("digits", shape=(1, 8, 8))
    x, y = (torch.from_numpy(part) for part in data.read(np.arange(len(data))))
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            for at, moved, gradient in zip(
                parameters, velocity, torch.autograd.grad(loss, parameters), strict=True
            ):
                moved.mul_(0.9).add_(gradient)
                at.data.sub_(0.05 * moved)
    return float((network(x).argmax(1) == y).float().mean())


INITIAL: dict[str, Callable[[torch.Tensor], object]] = {
    "torch's own": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "He normal": nn.init.kaiming_normal_,
    "He uniform": nn.init.kaiming_uniform_,
    "Glorot normal": nn.init.xavier_normal_,
    "Glorot uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "truncated normal": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "normal": lambda w: nn.init.normal_(w, std=0.01),
    "from 0 to 1": nn.init.uniform_,
    "in bfloat16": lambda w: w.data.copy_(nn.init.kaiming_normal_(w).bfloat16()),
    "sparse": lambda w: nn.init.sparse_(w.data.view(len(w), -1), 0.5),
    "identity": lambda w: nn.init.dirac_(w) if w.dim() == 4 else nn.init.eye_(w),
    "constant": lambda w: nn.init.constant_(w, 0.1),
    "zero": nn.init.zeros_,
}
SHAPES = [(64, 3, 3, 3), (64, 64, 3, 3), (10, 512), (256, 784), (16, 16), (8, 32), (300, 100), (16, 1, 3, 3)]


@pytest.mark.parametrize("name", INITIAL)
def test_no_initialisation_counts_as_training(name: str) -> None:
    torch.manual_seed(0)
    for shape in SHAPES * 4:
        layer = nn.Conv2d(shape[1], shape[0], 3) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
        INITIAL[name](layer.weight)
        assert evidence_of_training(nn.Sequential(layer)) is None, shape


@pytest.mark.parametrize("name", models.FACTORIES)
def test_a_new_network_needs_no_start(name: str) -> None:
    assert evidence_of_training(models.create(name, width=0.25)) is None


def test_initialisations_of_batch_norms_and_biases_do_not_count_either() -> None:
    network = with_norm()
    nn.init.zeros_(network[1].weight)  # the last norm of a residual branch, as torchvision begins it
    nn.init.constant_(network[3].bias, -4.6)
    network(torch.rand(2, 1, 8, 8))  # somebody looked at the shapes
    assert int(network[1].num_batches_tracked) == 1
    assert evidence_of_training(network) is None
    edge_bcs.sparsify(network, 0.5)


@pytest.mark.parametrize("initial", ["torch's own", "He normal"])
def test_weights_alone_tell(initial: str) -> None:
    network = plain(INITIAL[initial])
    assert evidence_of_training(network) is None
    assert learn(network) > 0.9
    assert evidence_of_training(network) is not None
    for part in network:  # and without what biases say
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.zeros_(part.bias)
    evidence = evidence_of_training(network)
    assert evidence is not None and "are not as any initialisation draws them" in evidence


def test_each_kind_of_evidence_is_named() -> None:
    def evidence(change: Callable[[nn.Sequential], object]) -> str | None:
        network = with_norm()
        with torch.no_grad():
            change(network)
        return evidence_of_training(network)

    norm = "the batch norm 1"
    assert evidence(lambda n: n) is None
    assert evidence(lambda n: n[1].num_batches_tracked.fill_(12345)) == f"{norm} has seen 12,345 batches"
    assert evidence(lambda n: n[1].running_mean.add_(0.5)) == f"{norm} has running statistics"
    assert evidence(lambda n: n[1].running_var.mul_(0.5)) == f"{norm} has running statistics"
    assert evidence(lambda n: n[1].weight[0].add_(0.1)) == f"the scale of {norm} differs between channels"
    assert evidence(lambda n: n[1].bias[2].add_(0.1)) == f"the shift of {norm} differs between channels"
    assert evidence(lambda n: n[0].bias[0].fill_(0.4)) == "the bias of 0 reaches beyond ±0.333"
    heavy = evidence(lambda n: n[3].weight.pow_(3))
    assert heavy == "the weights of 3 are not as any initialisation draws them"
    assert evidence(lambda n: n[3].weight[0].mul_(3)) == heavy  # a row that has grown


def test_what_was_learnt_is_not_thrown_away_without_a_word() -> None:
    network = with_norm()
    accuracy = learn(network, 3)
    assert accuracy > 0.8
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(
        EdgeBcsError,
        match=r'batch norm 1 has seen 70 batches.*give start="magnitude" to keep the largest, or start="new"',
    ) as caught:
        edge_bcs.sparsify(network, sparsity=0.9)
    assert "\n" not in str(caught.value)
    sparse = edge_bcs.sparsify(network, sparsity=0.9, start="new")
    assert sparse.kappa == connectivity.kappa(sparse.size, 0.9)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(EdgeBcsError, match="there is no start 'old'; choose new or magnitude"):
        edge_bcs.sparsify(network, sparsity=0.9, start="old")
    trained = edge_bcs.sparsify(with_norm(), 0.5)
    with pytest.raises(EdgeBcsError, match="looks trained"):
        connectivity.fixed(network, trained)
    connectivity.fixed(network, trained, start="new")


def test_a_sparse_network_that_was_trained_is_asked_for_too() -> None:
    sparse = edge_bcs.sparsify(plain(), 0.9)
    edge_bcs.sparsify(sparse, 0.5)  # new: nothing to lose
    sparse.step = 1500
    with pytest.raises(EdgeBcsError, match="it has 1,500 training steps behind it"):
        edge_bcs.sparsify(sparse, 0.5)
    edge_bcs.sparsify(sparse, 0.5, start="new")


def test_a_pretrained_network_is_what_comparators_begin_with() -> None:
    """Its weights are taken; whatever the module holds is not what counts then."""
    network = with_norm()
    network[1].num_batches_tracked.fill_(1000)
    dense = edge_bcs.sparsify(with_norm(), 0)
    data = open_data("digits", shape=(1, 8, 8))
    phases = comparators.Phases(
        "lwm",
        comparators.PhaseSettings(sparsity="0.5"),
        data,
        compute=edge_bcs.Compute(device="cpu"),
        progress=False,
    )
    assert np.array_equal(phases.pretrain(network, dense).coo()[0], dense.coo()[0])
    with pytest.raises(EdgeBcsError, match="looks trained"):
        phases.pretrain(network, None)
