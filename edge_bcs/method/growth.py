"""Growth scored by gradient: connections that carry least make room where the loss would fall most.

Algorithm 1 is blind where connections are born. Beside its own rewiring, every so many steps a share f of the
κ connections, the smallest, are taken out, and as many of m·f·κ dormant positions, drawn uniformly over the
network, take their place: those with the largest gradient. These gradients are those of the network without
what was taken out, on the batch of the step that follows. So no dense gradient is made: m times f·κ of the
candidates stand in the κ places with a weight of 1e-12, and the ordinary gradient of the connections is read.
What is kept keeps its momentum; a newborn has none, and the sign that its gradient asks for. Before, between
and after there are exactly κ connections, and memory is O(κ).

Where asked for, connections that carry nothing leave first, however many they are: those whose own gradient
is exactly 0 on that batch. No image opens the unit that they come from or lead to, or no path leads on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_bcs.core import random
from edge_bcs.core.state import NEWBORN
from edge_bcs.method.rewiring import draw_births

Coo = tuple[NDArray[np.float32], NDArray[np.signedinteger[Any]], NDArray[np.float32]]
"""value f32[κ], index int[κ] ascending, momentum f32[κ]."""


def is_due(every: int, until: float, step: int, total: int) -> bool:
    """Whether connections move before ``step`` (from 0) of ``total``: every so many, up to a share of all."""
    return step > 0 and step % every == 0 and step < until * total


def moved_at(share: float, until: float, kappa: int, step: int, total: int) -> int:
    """How many of the smallest move before ``step``: f·κ, where f falls from ``share`` along half a cosine to
    0 at the share ``until`` of the steps."""
    return int(share * 0.5 * (1 + math.cos(math.pi * step / (until * total))) * kappa)


def grown(
    connections: Coo,
    count: int,
    rounds: int,
    gradient_of: Callable[[Coo], NDArray[np.float32]],
    *,
    size: int,
    seed: int,
    step: int,
    recycle: bool = False,
) -> Coo:
    """Return the connections after ``count`` of them moved.

    Args:
        connections: before. count: that move, at most as many as there are dormant positions.
        rounds: candidates for each of them, fewer where fewer positions are dormant.
        gradient_of: returns the gradient f32[κ] of the connections that it is given, which it may keep.
        size: N. seed, step: of the draws.
        recycle: whether those that carry nothing leave first, more than ``count`` if there are more.
    """
    value, index, momentum = connections
    idle = gradient_of(connections) == 0 if recycle else np.zeros(len(index), bool)
    count = min(max(count, int(idle.sum())), size - len(index), len(index))
    if not count:
        return connections
    rounds = min(rounds, (size - len(index)) // count)
    leaving = np.zeros(len(index), bool)
    leaving[np.lexsort((np.abs(value), ~idle))[:count]] = True
    kept = value[~leaving], index[~leaving], momentum[~leaving]
    purpose = random.GROWTH
    drawn = draw_births(
        index.astype(np.int32), rounds * count, size=size, seed=seed, step=step, purpose=purpose
    )
    signs = random.signs(drawn, seed=seed)
    found = []
    for places, sign in zip(np.split(drawn, rounds), np.split(signs, rounds), strict=True):
        tried = _joined(kept, places, sign)
        found.append(gradient_of(tried)[np.searchsorted(tried[1], places)])
    gradient = np.concatenate(found)
    largest = np.lexsort((drawn, -np.abs(gradient)))[:count]
    against = np.where(gradient == 0, signs, -np.sign(gradient)).astype(np.float32)
    return _joined(kept, drawn[largest], against[largest])


def _joined(kept: Coo, places: NDArray[np.signedinteger[Any]], signs: NDArray[np.float32]) -> Coo:
    """The connections that are kept, and newborn ones at other places, in order."""
    index = np.concatenate([kept[1], places]).astype(kept[1].dtype)
    order = np.argsort(index)
    value = np.concatenate([kept[0], (signs * NEWBORN).astype(np.float32)])
    momentum = np.concatenate([kept[2], np.zeros(len(places), np.float32)])
    return value[order], index[order], momentum[order]
