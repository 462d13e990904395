"""Growth scored by gradient: which connections leave and which are born, by hand; κ is exact throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_bcs.core import random
from edge_bcs.method.growth import Coo, grown, is_due, moved_at

Array = np.ndarray[Any, Any]
SIZE = 16
STREAM: dict[str, Any] = {"size": SIZE, "seed": 3, "step": 100}


def connections() -> Coo:
    value = np.array([0.5, -0.01, 0.3, 0.02, -0.4], np.float32)
    return value, np.array([1, 4, 7, 8, 13], np.int32), np.arange(1, 6, dtype=np.float32)


def test_the_smallest_leave_and_the_largest_gradients_come() -> None:
    field = np.linspace(-0.9, 1.1, SIZE).astype(np.float32)  # what the gradient is at each position
    seen: list[Array] = []

    def gradient_of(tried: Coo) -> Array:
        value, index, momentum = tried
        assert len(value) == len(index) == len(momentum) == 5 and (np.diff(index) > 0).all()
        assert set(index[np.abs(value) > 1e-6]) == {1, 7, 13}  # 4 and 8 have left
        assert (np.abs(value[np.abs(value) < 1e-6]) == np.float32(1e-12)).all()
        assert momentum[np.abs(value) < 1e-6].tolist() == [0, 0]
        seen.append(np.setdiff1d(index, [1, 7, 13]))
        return field[index]

    value, index, momentum = grown(connections(), 2, 3, gradient_of, **STREAM)
    candidates = np.concatenate(seen)
    assert len(seen) == 3 and len(set(candidates)) == 6 and not set(candidates) & {1, 4, 7, 8, 13}
    born = sorted(sorted(candidates, key=lambda place: -abs(field[place]))[:2])
    assert index.tolist() == sorted([1, 7, 13, *born]) and index.dtype == np.int32
    for place, number, speed in zip(index, value, momentum, strict=True):
        if place in born:  # no momentum, and the sign against the gradient
            assert (number, speed) == (-np.sign(field[place]) * np.float32(1e-12), 0)
        else:
            old = {1: (0.5, 1), 7: (0.3, 3), 13: (-0.4, 5)}[int(place)]
            assert (number, speed) == (np.float32(old[0]), old[1])


def test_a_gradient_of_zero_leaves_the_sign_of_the_place() -> None:
    value, index, _ = grown(connections(), 2, 2, lambda tried: np.zeros(5, np.float32), **STREAM)
    born = np.abs(value) < 1e-6
    assert born.sum() == 2
    assert np.array_equal(np.sign(value[born]), random.signs(index[born], seed=3))


@pytest.mark.parametrize(("size", "asked"), [(5, 0), (6, 1), (8, 1), (9, 2), (40, 4)])
def test_where_few_positions_are_dormant(size: int, asked: int) -> None:
    value, index, momentum = connections()
    index = np.arange(5, dtype=np.int32)
    calls: list[int] = []

    def gradient_of(tried: Coo) -> Array:
        calls.append(1)
        return np.ones(5, np.float32)

    made = grown((value, index, momentum), 2, 4, gradient_of, size=size, seed=3, step=100)
    assert len(calls) == asked
    assert len(made[1]) == 5 and (np.diff(made[1]) > 0).all() and made[1][-1] < size
    assert (made[0] != 0).all()


def test_the_share_falls_along_a_cosine() -> None:
    # Of 1,000 connections 40 % at first, every 10 of 100 steps, in the first half: (1 + cos(π·t/50))/2.
    due = [step for step in range(101) if is_due(10, 0.5, step, 100)]
    assert {step: moved_at(0.4, 0.5, 1000, step, 100) for step in due} == {10: 361, 20: 261, 30: 138, 40: 38}


@pytest.mark.parametrize(("count", "leave"), [(0, {4, 13}), (1, {4, 13}), (3, {4, 13, 8})])
def test_what_carries_nothing_leaves_first(count: int, leave: set[int]) -> None:
    """Of five connections two have no gradient, one of them among the largest."""
    asked: list[Array] = []

    def gradient_of(tried: Coo) -> Array:
        asked.append(tried[1])
        return np.where(np.isin(tried[1], [4, 13]), 0, 1 + tried[1]).astype(np.float32)

    made = grown(connections(), count, 2, gradient_of, **STREAM, recycle=True)
    assert asked[0].tolist() == [1, 4, 7, 8, 13] and len(asked) == 3
    assert set(connections()[1]) - set(made[1]) == leave
    assert len(made[1]) == 5 and (np.diff(made[1]) > 0).all() and (made[0] != 0).all()


def test_where_everything_carries_something_nothing_is_recycled() -> None:
    made = grown(connections(), 0, 2, lambda tried: np.ones(5, np.float32), **STREAM, recycle=True)
    assert all(np.array_equal(one, other) for one, other in zip(made, connections(), strict=True))
