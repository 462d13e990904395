"""Keep the largest weights (or scores) of each layer, κ of them altogether."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge_bcs.core.segments import Segment
from edge_bcs.method.connectivity import kappa, layer_counts, uniform_densities
from edge_bcs.method.sparse_model import SparseModel


def equal_densities(layers: Sequence[Segment], sparsity: str) -> list[int]:
    """Return how many weights each layer keeps: the same share of every layer, κ altogether."""
    sizes = [layer.size for layer in layers]
    counts: list[int] = layer_counts(sizes, uniform_densities(layers), kappa(sum(sizes), sparsity)).tolist()
    return counts


def largest(values: Tensor, layers: Sequence[Segment], counts: Sequence[int]) -> Tensor:
    """Return the positions i64[κ], ascending, of the largest |values| (f32[N]) of each layer."""
    chosen = [
        values[layer.span].abs().topk(count, sorted=False).indices.sort()[0] + layer.offset
        for layer, count in zip(layers, counts, strict=True)
    ]
    return torch.cat(chosen)


def pruned(dense: SparseModel, index: Tensor, sparsity: str) -> SparseModel:
    """Return a copy of a dense network with only the connections at `index` i64[κ], momentum at rest."""
    weights = dense.weights.detach().cpu()
    positions = index.cpu()
    sparse = SparseModel(
        copy.deepcopy(dense.network),
        weights[positions].numpy().astype(np.float32),
        positions.numpy(),
        seed=dense.seed,
        sparsity=sparsity,
        distribution="uniform",
        dense=dense.dense_kernels,
    )
    sparse.classes = dense.classes
    return sparse
