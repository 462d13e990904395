"""Projected gradient descent by an engine's graphs. It starts from Philox noise that depends on an image's
place in its batch, not on the micro-batch it is in."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np
from edge_bcs.runtime.engine import Engine

from edge_bcs.core import random
from edge_bcs.core.library import load
from edge_bcs.core.settings import Attack, Crafting

Array = np.ndarray[Any, Any]
_STARTS = ("uniform", "gaussian", "none")
"""As the library numbers them."""


def craft(
    engine: Engine, first: int, batch: int, *, seed: int, step: int, attack: Attack | None = None
) -> None:
    """Fill the buffer `adversarial` for the training graph (Algorithm 1, line 5).

    Args:
        engine: with a micro-batch in its buffers. first: its place in the logical batch of ``batch`` images.
        seed, step: of the random start.
        attack: default: the artifact's.
    """
    arrays, objective = engine.arrays, engine.artifact.objective
    attacked = objective.kind.attacked(batch)
    if first < attacked:
        descend(
            engine,
            objective.kind.crafting(attack or objective.attack),
            loss=objective.attack_loss,
            seed=seed,
            noise=(step, random.PGD_START, first),
        )
    clean = max(0, attacked - first)
    arrays["adversarial"][clean:] = arrays["input"][clean:]


def descend(engine: Engine, how: Crafting, *, loss: str, seed: int, noise: tuple[int, int, int]) -> None:
    """Projected gradient descent from the images in `input` to those in `adversarial`, batch norm frozen.

    Args:
        engine: with a micro-batch in its buffers.
        how: start (see `start_images`), radius and steps.
        loss: what is increased, "cross_entropy" or "kl" against the clean answer.
        seed, noise: of the random start: (step, purpose, place of the first image in its batch).
    """
    arrays, count = engine.arrays, engine.images
    if loss == "kl":
        engine.run("eval")
        softmax(arrays["logits"], arrays["target"])
    else:
        arrays["target"][...] = 0
        arrays["target"][np.arange(len(arrays["labels"])), arrays["labels"]] = 1
    step, purpose, position = noise
    arrays["adversarial"][...] = arrays["input"]
    arrays["adversarial"][:count] = start_images(
        arrays["input"][:count],
        how.start,
        how.noise,
        seed=seed,
        step=step,
        purpose=purpose,
        position=position,
    )
    arrays["epsilon"][0], arrays["step_size"][0] = how.radius, how.step_size
    for _ in range(how.steps):
        engine.run("attack")


def start_images(
    x: Array, kind: str, noise: float, *, seed: int, step: int, purpose: int, position: int
) -> Array:
    """Return the first adversarial images f32[m, C, H, W] for the images ``x``, clipped to [0, 1].

    ``kind`` is "uniform" (x ± noise), "gaussian" (x + 0.001·N(0, 1), as TRADES, MART and RST start) or "none"
    (x). Pixel j of image i takes draw number (position + i)·C·H·W + j of the stream (seed, step, purpose), so
    that splitting a batch changes nothing.
    """
    moved: Array = np.array(x, np.float32, order="C")
    _library().edge_bcs_move_to_start(
        moved.ctypes.data,
        len(moved),
        math.prod(x.shape[1:]),
        _STARTS.index(kind),
        noise,
        seed,
        step,
        purpose,
        position,
    )
    return moved


def softmax(logits: Array, into: Array) -> None:
    """Write the probabilities f32[n, K] of logits f32[n, K]; both lie in C order.

    The library computes them, for numpy's exponential of a float differs from machine to machine.
    """
    _library().edge_bcs_softmax(logits.ctypes.data, *logits.shape, into.ctypes.data)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    size, pointer = ctypes.c_uint64, ctypes.c_void_p
    start = [pointer, size, size, ctypes.c_int, ctypes.c_double, size, size, ctypes.c_uint32, size]
    return load(
        {
            "edge_bcs_softmax": (None, [pointer, size, size, pointer]),
            "edge_bcs_move_to_start": (None, start),
        }
    )
