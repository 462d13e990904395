"""bfloat16 storage against torch's conversion, and what it promises beyond: no value becomes zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.operators import run

TINY = np.float32(2.0**-133)  # the smallest bfloat16


def narrowed(values: np.ndarray, threads: int = 1) -> np.ndarray:
    return run("Narrow", {"x": values}, {"y": np.uint16}, threads=threads)["y"]


def widened(values: np.ndarray) -> np.ndarray:
    return run("Widen", {"x": values, "token": None}, {"y": np.float32})["y"]


def test_every_bfloat16_survives() -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = widened(every.reshape(1, -1, 2))
    expected = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.ravel(), expected)
    numbers = ~np.isnan(expected)
    assert np.array_equal(narrowed(wide).ravel()[numbers], every[numbers])
    assert np.isnan(widened(narrowed(wide))).ravel()[~numbers].all()


def test_rounding_is_torchs() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 17, dtype=np.uint64).astype(np.uint32)
    halves = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # exactly between two neighbours
    values = np.concatenate([bits, halves, halves + 1, halves - 1]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) >= 2 * TINY)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(narrowed(values), expected)


def test_what_is_not_zero_does_not_become_zero() -> None:
    smallest = np.float32(1e-45)
    values = np.array([0.0, -0.0, smallest, -smallest, TINY / 4, -TINY / 4, TINY], np.float32)
    expected = np.array([0.0, -0.0, TINY, -TINY, TINY, -TINY, TINY], np.float32)
    wide = widened(narrowed(values))
    assert wide.tobytes() == expected.tobytes()


@pytest.mark.parametrize("count", [0, 1, 16384, 40001])
def test_any_length_and_number_of_threads(count: int) -> None:
    values = np.random.default_rng(1).normal(size=count).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert all(np.array_equal(narrowed(values, threads), expected) for threads in (1, 3))
