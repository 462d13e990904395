"""Which kernel a layer gets: the sparse one, or the blocked dense one where the layer is dense enough."""

from __future__ import annotations

DENSE_THRESHOLD = 0.15
"""Density from which the dense kernel is the faster one."""


def algorithm(density: float, threshold: float = DENSE_THRESHOLD) -> str:
    """ "dense" for a layer whose fraction of active connections reaches ``threshold``, else "sparse"."""
    return "dense" if density >= threshold else "sparse"
