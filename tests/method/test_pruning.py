"""Sparse starts from trained weights: what is kept, and that the rest is as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.segments import Segment
from edge_bcs.method.pruning import largest_of_all, largest_of_layers

LAYERS = (Segment("a", (2, 3), 0), Segment("b", (10, 10), 6), Segment("c", (5, 4), 106))


def trained() -> nn.Sequential:
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    network[1].num_batches_tracked.fill_(1000)
    return network


def test_the_largest_of_each_layer_by_hand() -> None:
    weights = np.zeros(126, np.float32)
    weights[:6] = [0.1, -3, 2, 2, -2, 0]
    weights[6:106] = np.arange(100) / 100
    weights[106:] = -1
    found = largest_of_layers(weights, LAYERS, [3, 2, 4])
    assert found.tolist() == [1, 2, 3, 104, 105, 106, 107, 108, 109]  # ties: the first


def test_the_largest_of_all_with_a_floor() -> None:
    random = np.random.default_rng(3)
    weights = random.normal(size=126).astype(np.float32)
    weights[6:106] *= 1e-3  # a layer that a ranking alone would cut
    found = largest_of_all(weights, LAYERS, 24)
    in_b = found[(found >= 6) & (found < 106)]
    # Its even part is 24 · 100 / 126 = 19.05 connections, of which a tenth is kept.
    assert len(found) == 24 and (np.diff(found) > 0).all() and len(in_b) == 1
    assert in_b[0] == 6 + np.abs(weights[6:106]).argmax()
    others = np.setdiff1d(np.arange(126), np.arange(6, 106))
    ranked = others[np.argsort(-np.abs(weights[others]), kind="stable")][:23]
    assert sorted({*found} - {*in_b}) == sorted(ranked)


def test_layers_that_keep_all_of_their_even_part_or_have_drawn_places() -> None:
    weights = np.ones(126, np.float32)
    weights[6:106] = np.linspace(1e-3, 2e-3, 100)
    found = largest_of_all(weights, LAYERS, 24, even=[1])
    in_b = found[(found >= 6) & (found < 106)]
    assert in_b.tolist() == list(range(106 - 19, 106))  # 24 · 100 / 126 = 19.05
    drawn = np.array([7, 60, 61])
    found = largest_of_all(weights, LAYERS, 24, {1: drawn})
    assert len(found) == 24 and found[(found >= 6) & (found < 106)].tolist() == drawn.tolist()


def test_fewer_connections_than_layers_and_all_of_them() -> None:
    weights = np.linspace(1, 2, 126).astype(np.float32)
    assert len(largest_of_all(weights, LAYERS, 2)) == 2
    assert largest_of_all(weights, LAYERS, 126).tolist() == list(range(126))


@pytest.mark.parametrize("distribution", [None, "uniform", "erk", "paper"])
def test_weights_and_signs_are_kept(distribution: str | None) -> None:
    network = trained()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sparse = edge_bcs.sparsify(network, "0.75", 3, distribution, start="magnitude")
    assert sparse.kappa == (8 * 27 + 4 * 288) // 4
    after = sparse.network.state_dict()
    kept = 0
    for name, tensor in before.items():
        if name in ("0.weight", "4.weight"):
            alive = after[name] != 0
            assert torch.equal(after[name][alive], tensor[alive])
            kept += int(alive.sum())
            if distribution is not None:  # the largest of each layer
                assert tensor[alive].abs().min() >= tensor[~alive].abs().max()
        else:
            assert torch.equal(after[name], tensor), name
    assert kept == sparse.kappa
    assert sparse.distribution == (distribution or "global")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_sparsity_of_0_keeps_everything_and_a_zero_has_a_sign() -> None:
    network = trained().eval()
    with torch.no_grad():
        network[4].weight[0, :7] = 0
    sparse = edge_bcs.sparsify(network, 0, start="magnitude").eval()
    assert sparse.kappa == sparse.size
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(sparse(x), network(x))
    assert sparse.state()["coo.value"].all()


def test_dense_kernels_are_copied() -> None:
    network = trained()
    sparse = edge_bcs.sparsify(network, 0.9, dense=["0"], start="magnitude")
    assert torch.equal(sparse.network.get_parameter("0.weight"), network.get_parameter("0.weight"))
    assert sparse.size == 4 * 288


def test_what_does_not_go_together() -> None:
    with pytest.raises(EdgeBcsError, match='"global" ranks trained weights: give start="magnitude"'):
        edge_bcs.sparsify(trained(), 0.9, 0, "global", start="new")
    network = trained()
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(EdgeBcsError, match="a weight of the network is not finite"):
        edge_bcs.sparsify(network, 0.9, start="magnitude")
