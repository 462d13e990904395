"""Where the connections of a network lie, layer by layer, and what the last update did to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from edge_bcs.runtime.artifact import Artifact

from edge_bcs.core.state import NEWBORN

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Connections:
    """Connections of each layer, by its name, in order.

    Attributes:
        active: how many it has; they sum to κ.
        born: how many of them the last update drew.
        died: how many of its connections the last update removed; over the network, as many as were born.
    """

    active: Mapping[str, int]
    born: Mapping[str, int]
    died: Mapping[str, int]


def layer_counts(artifact: Artifact, index: Array) -> Array:
    """Return how many of the positions ``index``, ascending, lie in each layer: i64[layers]."""
    bounds = [*(layer.offset for layer in artifact.layers), artifact.size]
    return np.diff(np.searchsorted(index, np.array(bounds, index.dtype)))


def connections(artifact: Artifact, state: Mapping[str, Array], before: Array | None) -> Connections:
    """The connections of a state, whose last update began with i64[layers] ``before`` of them in each layer.

    Without ``before`` nothing is known of that update, and nothing was born or died. A newborn has its sign
    times a tiny weight and no momentum, as no other connection has unless gradient, decay and noise are all
    zero for a whole step.
    """
    index = state["coo.index"]
    active = layer_counts(artifact, index)
    born = died = np.zeros_like(active)
    if before is not None:
        newborn = np.abs(state["coo.value"]) == NEWBORN
        trained = artifact.trained.connections(index)
        newborn[trained] &= state["coo.momentum"] == 0
        newborn &= trained
        born = layer_counts(artifact, index[newborn])
        died = before + born - active
    names = [layer.name for layer in artifact.layers]
    return Connections(*(dict(zip(names, counts.tolist(), strict=True)) for counts in (active, born, died)))
