"""Other classes for a network that is sparse already: what it has learnt stays, and so does its sparsity."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_bcs.core import random
from edge_bcs.core.segments import Segment
from edge_bcs.exportable import with_outputs
from edge_bcs.method.connectivity import draw_positions, kappa
from edge_bcs.method.rewiring import NEWBORN
from edge_bcs.method.sparse_model import SparseModel, prunable_layers, weight_name


def with_classes(
    sparse: SparseModel, classes: int | Sequence[str], *, input_shape: Sequence[int] | None = None
) -> SparseModel:
    """Return a copy of a sparse network with other classes: its last layer is new, the others keep their
    connections and weights.

    κ is floor((1 − sparsity)·N) of the N weights that there are then. If the last layer is sparse, it gets
    what the others leave of it, but at least its even part, for which the smallest weights of the others make
    way; if that is more than it has weights, the others get new connections at random places. Training begins
    at step 0, without momentum.

    Args:
        sparse: a network, trained or not. classes: how many, or their names.
        input_shape: (C, H, W) of the images; default: what the network was made for.

    Raises:
        EdgeBcsError: the last layer cannot be told, or cannot have so many outputs.
    """
    outputs = classes if isinstance(classes, int) else len(classes)
    network = copy.deepcopy(sparse.network)
    new = with_outputs(network, outputs, input_shape=input_shape or sparse.input_shape, seed=sparse.seed)
    value, index = sparse.coo()
    if new is not None:
        layers = prunable_layers(network, sparse.dense_kernels)
        value, index = _with_new_layer(sparse, network, layers, new.layer)
    made = SparseModel(
        network,
        value,
        index,
        seed=sparse.seed,
        sparsity=sparse.sparsity,
        distribution=sparse.distribution,
        dense=sparse.dense_kernels,
    )
    made.classes = None if isinstance(classes, int) else tuple(classes)
    if new is None:
        made.load_state(sparse.state())
        made.step, made.classes = sparse.step, made.classes or sparse.classes
    return made.train(sparse.training)


def _with_new_layer(
    sparse: SparseModel, network: nn.Module, layers: Sequence[Segment], name: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the connections (value f32[κ], index i64[κ]) of `sparse` among the kernels `layers` of
    `network`, of which the one called `name` is new."""
    value, old = sparse.coo()
    size, seed = sum(layer.size for layer in layers), sparse.seed
    numbers = [number for number, layer in enumerate(layers) if layer.name == name]
    span = layers[numbers[0]].span if numbers else slice(0, 0)
    index, weights = [], []
    for before, after in zip(sparse.layers, layers, strict=True):
        if after.name != name:
            part = slice(*np.searchsorted(old, [before.offset, before.offset + before.size]))
            index.append(old[part].astype(np.int64) - before.offset + after.offset)
            weights.append(value[part])
    kept, values = np.concatenate([*index, np.zeros(0, np.int64)]), np.concatenate([*weights, value[:0]])
    if not numbers:
        return values, kept
    count, room = kappa(size, sparse.sparsity), span.stop - span.start
    inside = min(room, max(count - len(kept), max(1, round(count * room / size))))
    drawn = span.start + draw_positions(seed, numbers[0], room, inside)
    surplus = len(kept) + inside - count
    if surplus > 0:
        stay = np.sort(np.argsort(-np.abs(values), kind="stable")[: len(kept) - surplus])
        kept, values = kept[stay], values[stay]
    born = _dormant(size, [kept, np.arange(span.start, span.stop)], max(0, -surplus), seed, len(layers))
    kernel = network.get_parameter(weight_name(layers[numbers[0]])).detach().cpu().numpy().reshape(-1)
    newborn = (random.signs(born, seed=seed) * NEWBORN).astype(np.float32)
    positions = np.concatenate([kept, drawn, born])
    order = np.argsort(positions)
    return np.concatenate([values, kernel[drawn - span.start], newborn])[order], positions[order]


def _dormant(
    size: int, taken: Sequence[NDArray[np.int64]], count: int, seed: int, stream: int
) -> NDArray[np.int64]:
    """Return `count` distinct positions below `size` that are not taken, drawn uniformly (MASK)."""
    if count == 0:
        return np.zeros(0, np.int64)
    free = np.ones(size, dtype=bool)
    for positions in taken:
        free[positions] = False
    places = np.flatnonzero(free)
    return places[draw_positions(seed, stream, len(places), count)].astype(np.int64)
