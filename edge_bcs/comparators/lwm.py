"""LWM: prune the least weight magnitudes of a dense robust network, fine-tune (Sehwag et al., 2019)."""

from __future__ import annotations

from typing import Any

from torch import nn

from edge_bcs.comparators.phases import Phases
from edge_bcs.comparators.pruning import equal_densities, largest, pruned
from edge_bcs.method.sparse_model import SparseModel


def train(
    network: nn.Module, phases: Phases, pretrained: SparseModel | None = None
) -> tuple[SparseModel, dict[str, Any]]:
    """Return a network with κ connections, and the report of its fine-tuning.

    Args:
        network: what to train; it is copied.
        phases: numbers, data and folders.
        pretrained: a dense robust network, instead of training one.
    """
    dense = phases.pretrain(network, pretrained)
    counts = equal_densities(dense.layers, phases.settings.sparsity)
    sparse = pruned(dense, largest(dense.weights, dense.layers, counts), phases.settings.sparsity)
    return sparse, phases.fine_tune(sparse)
