"""Which kernel a layer gets: the sparse one, or the blocked dense one where the layer is dense enough."""

from __future__ import annotations

DENSE_THRESHOLD = 0.55
"""Density from which the dense kernel is the faster one: measured for all directions, 3×3 kernels on 4²
to 32² pixels, with AVX-512 (where they meet between 0.5 and 0.6)."""


def algorithm(density: float, threshold: float = DENSE_THRESHOLD) -> str:
    """ "dense" for a layer whose fraction of active connections reaches ``threshold``, else "sparse"."""
    return "dense" if density >= threshold else "sparse"
