"""HYDRA: learn which weights of a dense robust network matter to the robust loss (Sehwag et al., 2020).

Every weight w has a score s, at first √(6/fan-in)·w/max|w| of its layer. The network uses w where |s| is
among its layer's largest, and 0 elsewhere. Scores are trained with the robust loss, kernels stay as they are;
on the way back the selection lets everything through: ∂L/∂s = ∂L/∂(w·mask)·w·sign(s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_bcs.comparators.phases import Phases
from edge_bcs.comparators.pruning import equal_densities, largest, pruned
from edge_bcs.core.segments import Segment
from edge_bcs.core.settings import Coefficients
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.updates import Update, descend


def initial_scores(weights: Tensor, layers: Sequence[Segment]) -> Tensor:
    """Return s f32[N] = √(6/fan-in)·w/max|w|, layer by layer, of weights f32[N]."""
    scores = torch.empty_like(weights)
    for layer in layers:
        part = layer.span
        fan_in = math.prod(layer.shape[1:])
        scores[part] = math.sqrt(6 / fan_in) * weights[part] / weights[part].abs().max()
    return scores


class Scores(Update):
    """SGD on the scores of frozen weights; biases and batch norm are trained as they are.

    Attributes:
        weights: f32[N], frozen.
        scores, momentum: f32[N], trained.
        counts: connections of each layer.
    """

    needs_all_gradients = True

    def __init__(self, weights: Tensor, layers: Sequence[Segment], counts: Sequence[int]) -> None:
        self.weights, self.layers, self.counts = weights.detach().clone(), layers, counts
        self.scores = initial_scores(self.weights, layers)
        self.momentum = torch.zeros_like(self.scores)

    def __call__(
        self, sparse: SparseModel, hyper: Coefficients, *, step: int | Tensor, failed: Tensor | None
    ) -> Tensor:
        """See `Update`; connections that make way for others are counted as deaths."""
        with torch.no_grad():
            gradient = sparse.all_gradients() * self.weights * self.scores.sign()
            scores, momentum = descend(self.scores, self.momentum, gradient, hyper)
            parameters, velocity = descend(
                sparse.dense_value, sparse.dense_momentum, sparse.gradients()[1], hyper
            )
            success = torch.isfinite(scores).all() & torch.isfinite(parameters).all()
            if failed is not None:
                success = success & ~failed
            self.scores = torch.where(success, scores, self.scores)
            self.momentum = torch.where(success, momentum, self.momentum)
            sparse.dense_value.copy_(torch.where(success, parameters, sparse.dense_value))
            sparse.dense_momentum.copy_(torch.where(success, velocity, sparse.dense_momentum))
            index = largest(self.scores, self.layers, self.counts)
            kept = torch.searchsorted(index, sparse.index).clamp(max=len(index) - 1)
            replaced = (index[kept] != sparse.index).sum()
            sparse.write(self.weights[index], index)
            return torch.stack([replaced, success.long()])

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Update`."""
        tensors = {"weights": self.weights, "scores": self.scores, "momentum": self.momentum}
        return {f"hydra.{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """See `Update`."""
        for name in ("weights", "scores", "momentum"):
            stored = torch.from_numpy(tensors[f"hydra.{name}"].copy())
            setattr(self, name, stored.to(self.weights.device))


def train(
    network: nn.Module, phases: Phases, pretrained: SparseModel | None = None
) -> tuple[SparseModel, dict[str, Any]]:
    """Return a network with κ connections, and the report of its fine-tuning; arguments as in `lwm.train`."""
    dense = phases.pretrain(network, pretrained)
    settings, device = phases.settings, phases.device
    counts = equal_densities(dense.layers, settings.sparsity)
    weights = dense.weights.detach().to(device)
    scores = Scores(weights, dense.layers, counts)
    masked = pruned(dense, largest(scores.scores, dense.layers, counts), settings.sparsity)
    phases.run("scores", masked, settings.search_epochs, settings.learning_rate, scores)
    masked.momentum.zero_()
    masked.dense_momentum.zero_()
    return masked, phases.fine_tune(masked)
