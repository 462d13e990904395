"""Kernels that stay dense: which they are, what N and κ count then, and that they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs import models
from edge_bcs.checkpoint import save_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import connectivity
from edge_bcs.method.sparse_model import SparseModel

# A stem of 216 weights, two blocks whose 1×1 layers have 5,120 weights each and whose depthwise ones have 288
# and 1,440, and a head of 512: 12,696 in all, of which the stem has 1.7 % and the head 4.0 %.
DEPTHWISE = ("1.0", "2.0")


class Mobile(nn.Sequential):
    def __init__(self, stem: int = 3) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(stem, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 32, 3, padding=1, groups=8), nn.Conv2d(32, 160, 1)),
            nn.Sequential(nn.Conv2d(160, 160, 3, padding=1, groups=160), nn.Conv2d(160, 32, 1)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)),
        )


def size_of(network: nn.Module, names: tuple[str, ...]) -> int:
    return sum(network.get_submodule(name).weight.numel() for name in names)


def test_depthwise_kernels_stay_dense_and_so_do_ends_below_a_hundredth() -> None:
    assert connectivity.dense_by_default(Mobile()) == {*DEPTHWISE}
    # With one channel the stem has 72 of 12,552 weights, 0.57 %.
    assert connectivity.dense_by_default(Mobile(stem=1)) == {"0.0", *DEPTHWISE}
    # The paper's networks are as in the paper: every kernel counts, though the first one is small.
    assert connectivity.dense_by_default(models.resnet18(width=0.25)) == frozenset()
    # A network of depthwise convolutions alone would have no connection.
    assert connectivity.dense_by_default(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))) == frozenset()


@pytest.mark.parametrize(
    ("dense", "kept"),
    [
        (None, DEPTHWISE),
        ([], ()),
        (["?.0", "0.0"], ("0.0", *DEPTHWISE)),
        (["0.*"], ("0.0",)),
        (["*.0", "3.2"], ("0.0", "1.0", "2.0", "3.2")),
        (["[12].1"], ("1.1", "2.1")),
    ],
)
def test_n_and_kappa_count_the_kernels_that_do_not_stay_dense(
    dense: list[str] | None, kept: tuple[str, ...]
) -> None:
    network = Mobile()
    sparse = edge_bcs.sparsify(network, "0.9", 3, dense=dense)
    everything = sum(size_of(network, (name,)) for name in ("0.0", "1.0", "1.1", "2.0", "2.1", "3.2"))
    size = everything - size_of(network, kept)
    assert sparse.size == size and sparse.kappa == size // 10
    assert sparse.dense_kernels == kept
    assert {parameter.name for parameter in sparse.dense if parameter.name.endswith("weight")} == {
        "0.1.weight",  # the batch norm's
        *(f"{name}.weight" for name in kept),
    }
    for name in kept:
        assert (sparse.network.get_submodule(name).weight != 0).all()
    weights = [sparse.network.get_submodule(layer.name).weight for layer in sparse.layers]
    assert sum(int((weight != 0).sum()) for weight in weights) == sparse.kappa


def test_dense_kernels_are_he_normal_of_the_seed_alone() -> None:
    first, other = (edge_bcs.sparsify(Mobile(), 0.9, seed, dense=DEPTHWISE) for seed in (7, 8))
    torch.manual_seed(1)  # another draw of torch's own weights
    again = edge_bcs.sparsify(Mobile(), 0.9, 7, dense=DEPTHWISE)
    one, same, another = (s.network.get_parameter("2.0.weight") for s in (first, again, other))
    assert torch.equal(one, same) and not torch.equal(one, another)
    # 1,440 numbers of deviation √(2 / 9): their mean square is 2 / 9 within four deviations of √(2 / 1440).
    assert float(one.detach().square().mean()) == pytest.approx(2 / 9, rel=4 * (2 / 1440) ** 0.5)
    assert float((one > 0).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 1440**0.5)
    kernels = [first.network.get_submodule(name).weight.flatten() for name in DEPTHWISE]
    assert len(torch.unique(torch.cat(kernels))) == sum(map(len, kernels))


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    with pytest.raises(EdgeBcsError, match=r"layer is called 'features\.\*'; there are 0\.0, 1\.0, 1\.1, …"):
        edge_bcs.sparsify(Mobile(), 0.9, dense=["features.*"])
    with pytest.raises(EdgeBcsError, match="every kernel of Mobile stays dense"):
        edge_bcs.sparsify(Mobile(), 0.9, dense=["*"])


def test_numbers_of_a_channel_may_belong_to_anything(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Conv2d(3, 8, 1)
            self.norm = nn.GroupNorm(2, 8)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.scale * self.norm(self.kernel(x))).mean((2, 3))

    sparse = edge_bcs.sparsify(Scaled(), 0.5)
    assert [parameter.name for parameter in sparse.dense] == [
        "scale",
        "kernel.bias",
        "norm.weight",
        "norm.bias",
    ]
    with pytest.raises(EdgeBcsError, match=r"'weight' of the shape \[10, 4\]; only Conv2d and Linear"):
        edge_bcs.sparsify(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), 0.5)


def test_a_checkpoint_knows_which_kernels_stay_dense(tmp_path: Path) -> None:
    sparse = edge_bcs.sparsify(Mobile(), "0.9", 3, dense=["0.0", "2.*"])
    trained = sparse.state()
    trained["dense.value"] += np.float32(0.5)
    sparse.load_state(trained)
    file = tmp_path / "mine.safetensors"
    save_checkpoint(file, sparse)
    found = edge_bcs.load(file, Mobile())
    assert isinstance(found, SparseModel)
    assert found.dense_kernels == ("0.0", "2.0", "2.1") and found.kappa == sparse.kappa
    assert all(np.array_equal(trained[name], array) for name, array in found.state().items())
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(found(x), sparse.eval()(x))
    with pytest.raises(EdgeBcsError, match="belongs to another network: beside its 3 kernels"):
        edge_bcs.load(file, nn.Sequential(*Mobile(), nn.Linear(16, 16)))
    with pytest.raises(EdgeBcsError, match=r"belongs to another network: it has 3 kernels \(1\.0"):
        edge_bcs.load(file, nn.Sequential(*list(Mobile())[:1]))


def test_fixed_keeps_the_same_kernels_dense() -> None:
    trained = edge_bcs.sparsify(Mobile(), "0.9", 3, dense=["0.0"])
    other = connectivity.fixed(Mobile(), trained, 4)
    assert other.dense_kernels == ("0.0",) and other.layer_counts() == trained.layer_counts()
