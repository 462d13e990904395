"""Stacks in half precision, as ``runtime/native/ops/stack.h`` says: bfloat16 in pairs of pixels or, on ARM,
FP16 pixel after pixel.

They lie in the memory of a float32 stack, of which they use a part; the rest holds what is no number, so that
an operator that reads it is seen.
"""

from __future__ import annotations

import platform

import numpy as np

from helpers.programs import EMULATOR

FP16 = bool(EMULATOR) or platform.machine() in ("aarch64", "arm64")
ULP = 2.0**-10 if FP16 else 2.0**-8
"""Of a number, relative."""
LEAST = 2.0**-24 if FP16 else 1e-38
"""What a number may differ by near 0."""


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 numbers rounded, ties to even; a bfloat16 below the normal ones is 0."""
    if FP16:
        return values.astype(np.float16).astype(np.float32)
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
    numbers = (
        pixels.astype(np.float16).view(np.uint16)
        if FP16
        else (pixels.view(np.uint32) >> 16).astype(np.uint16)
    )
    order = (0, 2, 3, 1) if FP16 else (0, 2, 1, 3)
    pairs = numbers.reshape(n // lanes, lanes, -1, 2).transpose(order).reshape(-1)
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
    if FP16:
        pixels = numbers.reshape(blocks, count, lanes).transpose(0, 2, 1).reshape(blocks * lanes, count)
        values = np.ascontiguousarray(pixels).view(np.float16).astype(np.float32)
    else:
        pairs = numbers.reshape(blocks, count // 2, lanes, 2).transpose(0, 2, 1, 3)
        values = (pairs.reshape(blocks * lanes, count).astype(np.uint32) << 16).view(np.float32)
    planes = values[:, first:end].reshape(blocks * lanes, channels, height + halo, row)
    for part in (values[:, :first], values[:, end:], planes[:, :, height:], planes[:, :, :, width:]):
        assert not part.any(), "a place that is no pixel is not zero"
    return planes[:, :, :height, :width].copy()
