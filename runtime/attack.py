"""Where PGD starts: Philox noise that depends on an image's place in its batch, not on the micro-batch it is
in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_bcs.core import random

Array = np.ndarray[Any, Any]
_PIECE = 1 << 13  # pixels whose noise is drawn at once: drawing takes some fifty bytes for each
GAUSSIAN_START = np.float32(0.001)  # TRADES, MART and RST: x + 0.001·N(0, 1)


def start_images(
    x: Array, kind: str, epsilon: float, *, seed: int, step: int, purpose: int, position: int
) -> Array:
    """Return the first adversarial images f32[m, C, H, W] for the images ``x``, clipped to [0, 1].

    ``kind`` is "uniform" (x ± ε), "none" (x) or "gaussian" (x + 0.001·N(0, 1)). Pixel j of image i takes
    draw number (position + i)·C·H·W + j of the stream (seed, step, purpose), so that splitting a batch
    changes nothing.
    """
    moved: Array = np.array(x, np.float32, order="C")
    if kind == "none":
        return moved
    flat, start = moved.reshape(-1), position * math.prod(x.shape[1:])
    for first in range(0, flat.size, _PIECE):
        piece = flat[first : first + _PIECE]
        draws = {"seed": seed, "step": step, "purpose": purpose, "start": start + first}
        if kind == "uniform":
            drawn = random.uniform(len(piece), **draws)
            piece += (np.float32(2) * drawn - np.float32(1)) * np.float32(epsilon)
        else:
            piece += random.normal(len(piece), **draws) * GAUSSIAN_START
    return np.clip(moved, np.float32(0), np.float32(1), out=moved)


def softmax(logits: Array) -> Array:
    """Return the probabilities f32[n, K] of logits f32[n, K]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities
