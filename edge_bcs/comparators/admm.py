"""Adv-ADMM: adversarial training under the constraint of sparsity, split in two (Ye et al., 2019).

W minimises the robust loss + ρ/2·‖W − Z + U‖² by SGD; now and then Z becomes the sparse weights nearest to
W + U, U grows by W − Z, and ρ by a factor, so that W is drawn to a sparse point. What is then small is
pruned, and the rest retrained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_bcs.comparators.phases import Phases
from edge_bcs.comparators.pruning import equal_densities, largest, pruned
from edge_bcs.core.segments import Segment
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.updates import Sgd

PENALTY, GROWTH, INTERVAL = 1e-3, 1.3, 20


def project(weights: Tensor, layers: Sequence[Segment], counts: Sequence[int]) -> Tensor:
    """Return the nearest f32[N] with so many weights in each layer: the largest stay, others are 0."""
    index = largest(weights, layers, counts)
    nearest = torch.zeros_like(weights)
    nearest[index] = weights[index]
    return nearest


class Admm(Sgd):
    """SGD on all weights with the penalty's gradient ρ·(W − Z + U), and the two other updates.

    Attributes:
        target: Z, f32[N]. dual: U, f32[N]. penalty: ρ.
        interval: epochs between two updates of Z, U and ρ.
    """

    def __init__(
        self, weights: Tensor, layers: Sequence[Segment], counts: Sequence[int], interval: int = INTERVAL
    ) -> None:
        self.layers, self.counts, self.interval = layers, counts, interval
        self.target = project(weights, layers, counts)
        self.dual = torch.zeros_like(weights)
        self.penalty = PENALTY
        self._total = 0

    def begin(self, sparse: SparseModel, total: int) -> None:
        """See `Update`."""
        self._total = total

    def is_settled(self, step: int) -> bool:
        """Whether it is the end: of all epochs the last is the most nearly sparse, and is kept."""
        return step >= self._total

    def extra_gradient(self, sparse: SparseModel, value: Tensor) -> Tensor:
        """Return ρ·(W − Z + U) of W f32[N]; the network is dense."""
        return self.penalty * (value - self.target + self.dual)

    def end_of_epoch(self, sparse: SparseModel, epoch: int) -> None:
        """Every `interval` epochs: Z ← projection of W + U; U ← U + W − Z; ρ ← 1.3·ρ."""
        if (epoch + 1) % self.interval == 0:
            weights = sparse.value()
            self.target = project(weights + self.dual, self.layers, self.counts)
            self.dual = self.dual + (weights - self.target)
            self.penalty *= GROWTH

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Update`."""
        return {
            "admm.target": self.target.cpu().numpy(),
            "admm.dual": self.dual.cpu().numpy(),
            "admm.penalty": np.array(self.penalty),
        }

    def load_state(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """See `Update`."""
        device = self.dual.device
        self.target = torch.from_numpy(tensors["admm.target"].copy()).to(device)
        self.dual = torch.from_numpy(tensors["admm.dual"].copy()).to(device)
        self.penalty = float(tensors["admm.penalty"])


def train(
    network: nn.Module, phases: Phases, pretrained: SparseModel | None = None, interval: int = INTERVAL
) -> tuple[SparseModel, dict[str, Any]]:
    """Return a network with κ connections, and the report of its retraining; arguments as in `lwm.train`.

    The alternating phase keeps its last epoch, not its best: the best is the least pruned one.
    """
    dense = phases.pretrain(network, pretrained)
    settings = phases.settings
    counts = equal_densities(dense.layers, settings.sparsity)
    dense.momentum.zero_()
    dense.dense_momentum.zero_()
    update = Admm(dense.weights.detach().to(phases.device), dense.layers, counts, interval)
    phases.run("alternating", dense, settings.search_epochs, settings.learning_rate, update)
    sparse = pruned(dense, largest(dense.weights, dense.layers, counts), settings.sparsity)
    return sparse, phases.fine_tune(sparse)
