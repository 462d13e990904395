"""Gradual pruning in training: dense in the beginning, κ connections in the end (Zhu & Gupta, 2017).

Of n steps each `_EVENTS`-th part ends with a pruning: the connections with the smallest weights go, until
κ + (N − κ)·(1 − t/n)³ are left after step t. Every number is whole, so that it is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Coefficients
from edge_bcs.method.connectivity import densities_of, kappa, layer_counts
from edge_bcs.method.heads import is_new
from edge_bcs.method.pruning import largest_of_all, largest_of_layers
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import update
from edge_bcs.training.settings import Gradual
from edge_bcs.training.updates import Rewiring

_EVENTS = 100


def left_after(step: int, steps: int, size: int, count: int) -> int:
    """Return how many of ``size`` connections are left after ``step`` of ``steps``, ``count`` after the last.

    >>> [left_after(step, 4, 1000, 100) for step in range(6)]
    [1000, 479, 212, 114, 100, 100]
    """
    return count + (size - count) * max(0, steps - step) ** 3 // steps**3


class GradualPruning(Rewiring):
    """Prunes a dense network in the first steps, and rewires what is left in the others.

    Args:
        rewire: how, see `Rewiring`.
        gradual: until when, and to what.
    """

    def __init__(self, rewire: str, gradual: Gradual) -> None:
        super().__init__(rewire)
        self.needs_torch = True  # the number of connections changes
        self._gradual = gradual
        self._steps = self._every = 1
        self._count = 0
        self._new: list[int] = []

    def begin(self, sparse: SparseModel, total: int) -> None:
        """See `Update`; EdgeBcsError if the network is not dense."""
        if sparse.kappa != sparse.size:
            raise EdgeBcsError(
                f"gradual pruning begins with all {sparse.size:,} weights, and the network has "
                f"{sparse.kappa:,}: make it with a sparsity of 0"
            )
        self._count = kappa(sparse.size, self._gradual.sparsity)
        self._steps = max(1, int(self._gradual.share * total))
        self._every = max(1, self._steps // _EVENTS)
        modules = [sparse.network.get_submodule(layer.name) for layer in sparse.layers]
        self._new = [number for number, module in enumerate(modules) if is_new(module)]

    def is_settled(self, step: int) -> bool:
        """See `Update`."""
        return step >= self._steps

    def queues(self, sparse: SparseModel) -> bool:
        """See `Update`: while it prunes, every step has other shapes."""
        return False

    def __call__(
        self, sparse: SparseModel, hyper: Coefficients, *, step: int | Tensor, failed: Tensor | None
    ) -> Tensor:
        """See `Update`; what is pruned counts as died."""
        step = int(step)
        if self.is_settled(step):
            return super().__call__(sparse, hyper, step=step, failed=failed)
        update(sparse, replace(hyper, noise=0.0), step=step, rewire="none")
        done, before = step + 1, sparse.kappa
        if done % self._every == 0 or self.is_settled(done):
            count = left_after(done, self._steps, sparse.size, self._count)
            sparse.keep(self._largest(sparse, count))
            self._name(sparse)
        return torch.tensor([before - sparse.kappa, 1])

    def took_over(self, sparse: SparseModel) -> None:
        """See `Update`."""
        self._name(sparse)

    def _name(self, sparse: SparseModel) -> None:
        """Let a network that has its κ connections say how many these are."""
        if sparse.kappa == self._count:
            sparse.sparsity, sparse.distribution = self._gradual.sparsity, self._gradual.distribution

    def _largest(self, sparse: SparseModel, count: int) -> Tensor:
        """Return bool[κ]: which connections are among the ``count`` that stay."""
        weights = sparse.weights.detach().cpu().numpy()
        if self._gradual.distribution == "global":
            index = largest_of_all(weights, sparse.layers, count, even=self._new)
        else:
            connectivity = float(1 - Decimal(self._gradual.sparsity))
            densities = densities_of(self._gradual.distribution, sparse.network, sparse.layers, connectivity)
            wanted = layer_counts([layer.size for layer in sparse.layers], densities, count)
            index = largest_of_layers(weights, sparse.layers, _within(wanted, sparse))
        mask = np.zeros(sparse.size, dtype=bool)
        mask[index] = True
        return torch.from_numpy(mask).to(sparse.index.device)[sparse.index]


def _within(wanted: NDArray[np.int64], sparse: SparseModel) -> Sequence[int]:
    """Return counts with the same sum of which no layer has more than it has connections: rounding may ask a
    layer for one more than a pruning before left it."""
    there = np.array(list(sparse.layer_counts().values()))
    counts = np.minimum(wanted, there)
    lacking = int(wanted.sum() - counts.sum())
    for number in np.argsort(counts - there, kind="stable"):
        more = min(lacking, int(there[number] - counts[number]))
        counts[number] += more
        lacking -= more
    return [int(count) for count in counts]
