"""Sparse starts from trained dense weights: which connections are kept.

Magnitude pruning (Han et al., 2015) keeps the largest |w|, of the whole network or of each layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_bcs.core.segments import Segment

FLOOR = 0.1
"""Share of its even part that every layer keeps where the whole network is ranked: a layer whose weights are
all small would be cut, and the network with it."""


def largest_of_layers(
    weights: NDArray[np.float32], layers: Sequence[Segment], counts: Sequence[int]
) -> NDArray[np.int64]:
    """Return the positions, ascending, of the `counts[i]` largest |w| of each layer; ties go to the first.

    Args:
        weights: f32[N]. layers: their kernels. counts: how many are kept of each.
    """
    kept = [
        layer.offset + _largest(np.abs(weights[layer.span]), int(count))
        for layer, count in zip(layers, counts, strict=True)
    ]
    return np.concatenate(kept)


def largest_of_all(
    weights: NDArray[np.float32],
    layers: Sequence[Segment],
    count: int,
    drawn: Mapping[int, NDArray[np.int64]] | None = None,
    even: Collection[int] = (),
) -> NDArray[np.int64]:
    """Return the positions, ascending, of the `count` largest |w| of the network.

    Every layer keeps the largest of its own, a share `FLOOR` of what it would have if all were equally dense.

    Args:
        weights: f32[N]. layers: their kernels. count: κ.
        drawn: of layers, by their number, in which no weight means anything yet: the positions that they
            keep, whatever the weights there are; together fewer than `count`, unless they are all there are.
        even: layers, by their number, that keep all of their even part: those whose weights are of another
            size than the others' because they began later.
    """
    drawn = drawn or {}
    shares = [(1 if number in even else FLOOR) * count / len(weights) for number in range(len(layers))]
    floors = [
        min(layer.size, max(1, int(share * layer.size))) for layer, share in zip(layers, shares, strict=True)
    ]
    for number in drawn:
        floors[number] = 0
    left = count - sum(map(len, drawn.values()))
    for number in sorted(range(len(layers)), key=lambda number: layers[number].size):
        if sum(floors) <= left:
            break
        floors[number] = 0  # there are fewer connections than layers: the small ones have none
    certain = largest_of_layers(weights, layers, floors)
    rank = np.abs(weights).astype(np.float32)
    for number, positions in drawn.items():
        rank[layers[number].span] = -1
        rank[positions] = np.inf
    rank[certain] = np.inf
    return _largest(rank, count)


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the positions, ascending, of the `count` largest values; among equal ones the first."""
    if count == 0:
        return np.zeros(0, np.int64)
    smallest = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > smallest), np.flatnonzero(values == smallest)
    return np.sort(np.concatenate([above, equal[: count - len(above)]])).astype(np.int64)
