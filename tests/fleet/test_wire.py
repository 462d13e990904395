"""Positions as gaps of seven bits a byte."""

from __future__ import annotations

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.fleet.wire import coded, decoded


def test_hand_worked() -> None:
    """0, 128, 257, 558: none lies before 0; then 127, 128 and 300 lie between."""
    index = np.array([0, 128, 257, 558], np.int32)
    data = coded(index)
    assert data.tolist() == [0, 127, 0x80, 1, 172, 2]
    back = decoded(data, 4, 559, "int32")
    assert back.dtype == np.int32 and np.array_equal(back, index)
    assert coded(np.zeros(0, np.int32)).tolist() == []
    assert decoded(np.zeros(0, np.uint8), 0, 9, "int32").tolist() == []


@pytest.mark.parametrize("size", [40, 1 << 20, 1 << 40])
def test_there_and_back(size: int) -> None:
    rng = np.random.default_rng(size % 1000)
    index = np.unique(np.append(rng.integers(0, size, 30), size - 1))
    assert np.array_equal(decoded(coded(index), len(index), size, "int64"), index)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([0, 0], "are 2 numbers instead of 3"),
        ([0, 0, 0, 0], "are 4 numbers instead of 3"),
        ([0, 0, 0, 0x80], "does not end"),
        ([], "are 0 numbers instead of 3"),
        ([0, 0, 8], "lead beyond the network's 10 weights"),
        ([4, 4, 0], "lead beyond the network's 10 weights"),
        ([0, 0, *[0xFF] * 8, 0x7F], "lead beyond the network's 10 weights"),
        ([0, 0, *[0x80] * 9, 0], "more than 9 bytes"),
    ],
)
def test_what_is_none(data: list[int], sentence: str) -> None:
    with pytest.raises(EdgeBcsError, match=sentence):
        decoded(np.array(data, np.uint8), 3, 10, "int32")


def test_the_largest_positions() -> None:
    assert decoded(np.array([7, 0, 0], np.uint8), 3, 10, "int32").tolist() == [7, 8, 9]
