"""κ, its spread over layers, the first draw, and the buffers of the sparse model."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs import models
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.segments import Segment
from edge_bcs.core.state import STATE_NAMES
from edge_bcs.method import connectivity
from edge_bcs.method.sparse_model import prunable_layers


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [
        (15_302_848, 0.99, 153_028),
        (15_302_848, 0.9, 1_530_284),
        (15_302_848, "0.995", 76_514),
        (1000, 0.9, 100),  # (1 - 0.9) * 1000 is 99.99999999999997 in binary
        (10, 0.7, 3),
        (7, 0, 7),
    ],
)
def test_kappa_is_exact(size: int, sparsity: float | str, expected: int) -> None:
    assert int((1 - Fraction(str(sparsity))) * size) == expected
    assert connectivity.kappa(size, sparsity) == expected


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "much", 0.99])
def test_impossible_sparsity(sparsity: float | str) -> None:
    with pytest.raises(EdgeBcsError, match="sparsity"):
        connectivity.kappa(50, sparsity)


def test_layer_counts_by_hand() -> None:
    # 20 connections in proportion 10:20:10 -> 5, 10, 5.
    assert connectivity.layer_counts([100, 100, 10], [0.1, 0.2, 1.0], 20).tolist() == [5, 10, 5]
    # The last layer would get 24 of its 10: it is full, and the other 50 fall in the proportion 1:2.
    assert connectivity.layer_counts([100, 100, 10], [0.1, 0.2, 2.0], 60).tolist() == [17, 33, 10]
    # Thirds of 10 are 3.33: the left-over goes to the first of equal remainders.
    assert connectivity.layer_counts([50, 50, 50], [1, 1, 1], 10).tolist() == [4, 3, 3]
    # Nothing is left for the smallest layers, which would cut the network.
    assert connectivity.layer_counts([1000, 1, 2], [1, 1, 1], 10).tolist() == [8, 1, 1]
    assert connectivity.layer_counts([6, 4], [0.6, 0.1], 10).tolist() == [6, 4]


def test_paper_densities_of_vgg16() -> None:
    with torch.device("meta"):
        model = models.vgg16()
    layers = connectivity.prunable_layers(model)
    expected = [0.6, 0.6, 0.2, 0.2] + [0.005] * 11 + [0.6]
    assert connectivity.paper_densities(model, layers, 0.01) == expected


# Initial active / κ of the released code at 10 %, 1 % and 0.5 % connectivity: a published consequence of
# the table.
@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("vgg16", (0.54, 0.94, 1.39)),
        ("resnet18", (0.52, 0.79, 1.10)),
        ("resnet34", (0.52, 0.72, 0.95)),
        ("resnet50", (0.52, 0.73, 0.97)),
        ("wrn28_2", (0.53, 1.02, 1.57)),
        ("wrn28_4", (0.53, 0.97, 1.46)),
    ],
)
def test_paper_densities_give_the_released_totals(name: str, ratios: tuple[float, ...]) -> None:
    with torch.device("meta"):
        model = models.create(name)
    layers = connectivity.prunable_layers(model)
    size = sum(layer.size for layer in layers)
    for ratio, p in zip(ratios, (0.1, 0.01, 0.005), strict=True):
        densities = connectivity.paper_densities(model, layers, p)
        active = sum(layer.size * density for layer, density in zip(layers, densities, strict=True))
        assert active / (p * size) == pytest.approx(ratio, abs=0.006)


def test_paper_rule_for_an_unknown_network() -> None:
    kernels = {"a": nn.Conv2d(3, 10, 3), "b": nn.Linear(10, 10), "c": nn.Linear(100, 900)}
    network = nn.ModuleDict({**kernels, "d": nn.Linear(9, 5)})
    layers = prunable_layers(network)
    assert connectivity.paper_densities(network, layers, 0.1) == [0.6, 0.2, 0.05, 0.6]
    # Where the first and the last layer stay dense, those in between are no first or last ones.
    layers = prunable_layers(network, {"a", "d"})
    assert connectivity.paper_densities(network, layers, 0.1) == [0.2, 0.05]


def test_erk_densities() -> None:
    # (64 + 32 + 3 + 3) / (64·32·9) for a convolution, (10 + 20) / 200 for a dense layer.
    layers = [Segment("a", (64, 32, 3, 3), 0), Segment("b", (10, 20), 0)]
    assert connectivity.erk_densities(layers) == pytest.approx([102 / 18432, 0.15])


@pytest.mark.parametrize("distribution", connectivity.DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.995])
@pytest.mark.parametrize("name", models.FACTORIES)
def test_sparsify_has_exactly_kappa(name: str, sparsity: float, distribution: str) -> None:
    sparse = connectivity.sparsify(models.create(name, width=0.05), sparsity, 3, distribution)
    expected = int((1 - Fraction(str(sparsity))) * sparse.size)
    active = sum(int((sparse.network.get_submodule(layer.name).weight != 0).sum()) for layer in sparse.layers)
    assert sparse.kappa == active == expected
    assert sum(sparse.layer_counts().values()) == expected
    value, index = sparse.coo()
    assert value.dtype == np.float32 and index.dtype == np.int32
    assert (np.diff(index) > 0).all() and index[0] >= 0 and index[-1] < sparse.size
    assert np.isfinite(value).all() and (value != 0).all()


def test_numbering_is_row_major_in_module_order() -> None:
    sparse = connectivity.sparsify(tiny(), 0.9, 1)
    assert [(layer.name, layer.shape, layer.offset) for layer in sparse.layers] == [
        ("0", (8, 3, 3, 3), 0),
        ("4", (5, 128), 216),
    ]
    value, index = sparse.coo()
    everything = np.concatenate(
        [sparse.network[0].weight.detach().ravel(), sparse.network[4].weight.detach().ravel()]
    )
    assert np.array_equal(np.flatnonzero(everything), index)
    assert np.array_equal(everything[index], value)
    assert [item.name for item in sparse.dense] == ["1.weight", "1.bias", "4.bias"]
    assert [(item.name, item.size, item.offset) for item in sparse.statistics] == [("1", 8, 0)]


def test_initial_weights_are_he_normal_on_a_uniform_mask() -> None:
    model = nn.Sequential(nn.Linear(400, 300, bias=False), nn.Linear(300, 200, bias=False))
    value, index = connectivity.sparsify(model, 0.5, 7, "uniform").coo()
    first = value[index < 120_000]
    # Half-normal of scale s: mean s·√(2/π), mean square s². About 60,000 draws: one per cent is several
    # sigmas.
    assert np.abs(first).mean() == pytest.approx(np.sqrt(2 / 400) * np.sqrt(2 / np.pi), rel=0.015)
    assert (first**2).mean() == pytest.approx(2 / 400, rel=0.03)
    assert (value > 0).mean() == pytest.approx(0.5, abs=0.01)
    per_row = np.bincount(index[index < 120_000] // 400, minlength=300)
    # 300 rows of 400 positions at density ½: variance 100 each; chi-square of 300 is below 400 but for 1 in
    # 10,000.
    assert ((per_row - 200) ** 2 / 100).sum() < 400


def test_same_seed_same_network_other_seed_another() -> None:
    first, again, other = (connectivity.sparsify(tiny(), 0.9, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.coo()[1], again.coo()[1]) and np.array_equal(first.coo()[0], again.coo()[0])
    assert not np.array_equal(first.coo()[1], other.coo()[1])


def test_sparsify_leaves_the_model_alone_and_refuses_what_it_cannot_do() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    edge_bcs.sparsify(model, 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(EdgeBcsError, match=r"0 \(LSTM\) has the parameter 'weight_ih_l0'"):
        connectivity.sparsify(nn.Sequential(nn.LSTM(3, 3)), 0.5)
    with pytest.raises(EdgeBcsError, match="neither a convolution nor a linear layer"):
        connectivity.sparsify(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(EdgeBcsError, match="no distribution 'even'"):
        connectivity.sparsify(tiny(), 0.5, 0, "even")
    with pytest.raises(EdgeBcsError, match="shared"):
        linear = nn.Linear(4, 4)
        twin = nn.Linear(4, 4)
        twin.weight = linear.weight
        connectivity.sparsify(nn.Sequential(linear, twin), 0.5)


def test_load_coo_replaces_and_validates() -> None:
    sparse = connectivity.sparsify(tiny(), 0.99, 0)
    assert sparse.kappa == 8
    index = np.array([0, 3, 5, 215, 216, 300, 500, 855], np.int32)
    value = np.arange(1, 9, dtype=np.float32)
    sparse.load_coo(value, index)
    flat = torch.cat([sparse.network[0].weight.flatten(), sparse.network[4].weight.flatten()])
    assert flat[index].tolist() == value.tolist() and int((flat != 0).sum()) == 8
    assert sparse.layer_counts() == {"0": 4, "4": 4}
    unsorted, repeated, outside = index.copy(), index.copy(), index.copy()
    unsorted[0], repeated[1], outside[-1] = 4, 0, 856
    for bad in (unsorted, repeated, outside):
        with pytest.raises(EdgeBcsError, match="strictly ascending"):
            sparse.load_coo(value, bad)
    for entry in (0, np.nan):
        with pytest.raises(EdgeBcsError, match="finite and not zero"):
            sparse.load_coo(np.where(value == 3, np.float32(entry), value), index)
    with pytest.raises(EdgeBcsError, match="8 connections, the buffers 7"):
        sparse.load_coo(value[:7], index[:7])
    assert np.array_equal(sparse.coo()[0], value)


def test_state_survives_copying_and_moving() -> None:
    sparse = connectivity.sparsify(tiny(), 0.9, 0)
    twin = copy.deepcopy(sparse).to(torch.float64).to(torch.float32)
    state = {name: buffer + (name == "dense.value") for name, buffer in sparse.state().items()}
    assert tuple(state) == STATE_NAMES
    twin.load_state(state)
    assert torch.equal(twin.network[1].weight, sparse.network[1].weight + 1)
    assert torch.equal(twin.network[4].weight, sparse.network[4].weight)
    twin.write(twin.value() * 2, twin.index.clone())
    assert torch.equal(twin.network[4].weight, 2 * sparse.network[4].weight)
    state["batchnorm.mean"] = state["batchnorm.mean"][:3]
    with pytest.raises(EdgeBcsError, match=r"batchnorm\.mean must hold 8"):
        twin.load_state(state)
    with pytest.raises(EdgeBcsError, match=r"no coo\.momentum"):
        twin.load_state({"coo.value": state["coo.value"], "coo.index": state["coo.index"]})


def test_gradients_are_those_of_the_connections() -> None:
    sparse = connectivity.sparsify(tiny(), 0.9, 0)
    reference = copy.deepcopy(sparse.network)
    x = torch.randn(6, 3, 4, 4)
    sparse.zero_gradients()
    sparse(x[:3]).square().sum().backward()
    reference(x[:3]).square().sum().backward()
    value, dense = sparse.gradients()
    flat = torch.cat([reference[0].weight.grad.flatten(), reference[4].weight.grad.flatten()])
    assert torch.equal(value, flat[sparse.index])
    assert torch.equal(
        dense, torch.cat([reference[1].weight.grad, reference[1].bias.grad, reference[4].bias.grad])
    )


def test_running_variance_is_biased() -> None:
    sparse = connectivity.sparsify(tiny(), 0.9, 0).train()
    x = torch.randn(4, 3, 4, 4)
    z = sparse.network[0](x).detach().double().numpy()
    sparse(x)
    expected = 0.9 * 1.0 + 0.1 * z.var(axis=(0, 2, 3))  # numpy's variance is the biased one
    assert sparse.state()["batchnorm.variance"] == pytest.approx(expected, rel=1e-5)
    # Wrapping the same network again must not correct twice.
    again = connectivity.sparsify(sparse, 0.9, 0).train()
    again.network[1].reset_running_stats()
    z = again.network[0](x).detach().double().numpy()
    again(x)
    expected = 0.9 + 0.1 * z.var(axis=(0, 2, 3))
    assert again.state()["batchnorm.variance"] == pytest.approx(expected, rel=1e-5)
