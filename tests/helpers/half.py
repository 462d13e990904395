"""Stacks in half precision: bfloat16 in pairs of pixels, as ``runtime/native/ops/stack.h`` says.

They lie in the memory of a float32 stack, of which they use a part; the rest holds what is no number, so that
an operator that reads it is seen.
"""

from __future__ import annotations

import numpy as np


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 numbers rounded to bfloat16, ties to even, and those below the normal ones to 0."""
    wide = np.ascontiguousarray(values, np.float32)
    bits = wide.view(np.uint32)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.abs(wide) < np.finfo(np.float32).tiny, np.float32(0), kept).astype(np.float32)


def _geometry(height: int, width: int, halo: int) -> tuple[int, int]:
    """(row stride, first pixel), in pixels."""
    if (height, width, halo) == (1, 1, 0):
        return 1, 0  # a vector: pairs of channels
    row = (width + halo + 1) // 2 * 2
    return row, (halo * row + halo + 1) // 2 * 2


def pack_half(images: np.ndarray, lanes: int, halo: int) -> np.ndarray:
    """f32 [n, C, H, W] as the tensor f32 [n / lanes, P, lanes] of a stack in half precision."""
    n, channels, height, width = images.shape
    row, first = _geometry(height, width, halo)
    planes = np.zeros((n, channels, height + halo, row), np.float32)
    planes[:, :, :height, :width] = rounded(images)
    pixels = np.concatenate([np.zeros((n, first), np.float32), planes.reshape(n, -1)], axis=1)
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2)))
    numbers = (pixels.view(np.uint32) >> 16).astype(np.uint16)
    pairs = numbers.reshape(n // lanes, lanes, -1, 2).transpose(0, 2, 1, 3).reshape(-1)
    blocks = n // lanes
    floats = blocks * (halo * (width + halo) + halo + channels * (height + halo) * (width + halo)) * lanes
    assert len(pairs) <= 2 * floats, "a stack in half precision is larger than that of floats"
    tensor = np.full(floats, np.nan, np.float32)
    tensor.view(np.uint16)[: len(pairs)] = pairs
    return tensor.reshape(blocks, -1, lanes)


def unpack_half(stack: np.ndarray, channels: int, height: int, width: int, halo: int) -> np.ndarray:
    """The images f32 [n, C, H, W] of such a tensor; fails if a place that is no pixel is not zero."""
    blocks, _, lanes = stack.shape
    row, first = _geometry(height, width, halo)
    count = first + channels * (height + halo) * row
    end, count = count, count + count % 2
    numbers = np.ascontiguousarray(stack).view(np.uint16).reshape(-1)[: blocks * count * lanes]
    pixels = (
        numbers.reshape(blocks, count // 2, lanes, 2).transpose(0, 2, 1, 3).reshape(blocks * lanes, count)
    )
    values = (pixels.astype(np.uint32) << 16).view(np.float32)
    planes = values[:, first:end].reshape(blocks * lanes, channels, height + halo, row)
    for part in (values[:, :first], values[:, end:], planes[:, :, height:], planes[:, :, :, width:]):
        assert not part.any(), "a place that is no pixel is not zero"
    return planes[:, :, :height, :width].copy()
