"""What the operator library does with images, as numpy arrays."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from edge_bcs.runtime.library import load

Array = np.ndarray[Any, Any]
KINDS = ("none", "shift", "photo", "zoom", "mix", "mirror")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    number, wide, place = ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p
    taken = [place, number, number, number, number, wide, wide, wide, place]
    return load({"edge_bcs_augment": (number, taken)})


def augmented(image: Array, kind: str, *, seed: int, epoch: int, position: int) -> Array:
    """f32 [C, H, W] as the augmentation changes it."""
    image = np.ascontiguousarray(image)
    result = np.empty_like(image)
    draw = KINDS.index(kind), seed, epoch, position
    assert not _library().edge_bcs_augment(image.ctypes.data, *image.shape, *draw, result.ctypes.data)
    return result
