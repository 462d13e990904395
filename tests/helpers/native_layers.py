"""What the tests of layers' operators share: shapes, masks, and the comparison with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from helpers.operators import pack, pack_bits

F = np.float32
U8 = np.uint8
# blocks, lanes, channels, height, width
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 4), (3, 4, 2, 5, 9), (1, 16, 3, 6, 6), (2, 8, 4, 3, 5)]


def close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


MASKS = ["none", "stack", "bits"]


def mask_of(kind: str, shape: tuple[int, ...], lanes: int, halo: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A mask f32 of zeros and ones as a reference wants it, and the operator's input and attributes."""
    values = np.random.default_rng(7).normal(size=shape).astype(F)
    if kind == "none":
        return np.ones(shape, F), {"mask": None, "mask_kind": 0}
    if kind == "stack":
        return (values > 0).astype(F), {"mask": pack(values, lanes, halo), "mask_kind": 1, "mask_halo": halo}
    return (values > 0).astype(F), {"mask": pack_bits(values, lanes), "mask_kind": 2}
