"""The rule of merging: hand-worked networks of 8 positions, and random ones beside a dense reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edge_bcs.core import random
from edge_bcs.core.state import NEWBORN
from edge_bcs.fleet.rule import Group, Kept, average, median, merge_connections

Array = np.ndarray[Any, Any]
Client = tuple[Sequence[int], Sequence[float], float]


def merged(*clients: Client, groups: Sequence[Group] | None = None, size: int = 8, segment: int = 8) -> Kept:
    """What clients of (positions, values, n) become."""

    def each() -> Iterator[tuple[Array, Array, float]]:
        for index, value, weight in clients:
            yield np.array(index, np.int32), np.array(value, np.float32), weight

    groups = groups or [Group([(0, size)], len(clients[0][0]))]
    return merge_connections(each, len(clients), size, groups, seed=3, segment=segment)


def positions(kept: Kept) -> list[int]:
    return kept.index.tolist()  # type: ignore[no-any-return]


def values(kept: Kept) -> list[float]:
    return kept.value.tolist()  # type: ignore[no-any-return]


# By hand: 8 positions


def test_positions_are_never_averaged() -> None:
    """What stock federated averaging makes of [2, 5] and [5, 7] is [3.5, 6]."""
    kept = merged(([2, 5], [1.0, 0.5], 1), ([5, 7], [1.5, -3.0], 1))
    # Scores: 1/2 at 2, (0.5 + 1.5)/2 = 1 at 5, 3/2 at 7; the mean of those who hold 5 is 1, of 7 is −3.
    assert positions(kept) == [5, 7] and values(kept) == [1.0, -3.0]
    assert kept.holders.tolist() == [2, 1]
    assert (kept.union, kept.common, kept.shared) == (3, 1, 1)


def test_the_picture_of_the_documents() -> None:
    """docs/pictures/fleet.svg shows these two masks and what they become."""
    kept = merged(([2, 4, 5], [1.0, 0.4, -0.6], 1), ([1, 2, 5], [2.0, 0.8, 0.5], 1))
    assert positions(kept) == [1, 2, 4] and values(kept) == pytest.approx([2.0, 0.9, 0.4])


def test_the_value_is_the_mean_of_those_who_hold_it_and_the_score_is_not() -> None:
    # 0: 3·1/4 = 0.75; 1: (1·0.5 + 3·0.9)/4 = 0.8; 6: 1·2.9/4 = 0.725, though 2.9 is the largest.
    kept = merged(([1, 6], [0.5, 2.9], 1), ([0, 1], [1.0, 0.9], 3))
    assert positions(kept) == [0, 1]
    assert kept.value[0] == 1 and kept.value[1] == pytest.approx(0.8)


def test_of_equal_scores_the_lowest_positions_stay() -> None:
    kept = merged(([6, 7], [1, -1], 1), ([0, 4], [-1, 1], 1))
    assert positions(kept) == [0, 4] and values(kept) == [-1, 1]


def test_equal_masks_give_the_plain_average() -> None:
    kept = merged(([1, 3, 7], [1, 2, -4], 1), ([1, 3, 7], [3, -1, -2], 1))
    assert positions(kept) == [1, 3, 7] and values(kept) == [2, 0.5, -3]
    weighted = merged(([1, 3, 7], [1, 2, -4], 1), ([1, 3, 7], [3, -1, -2], 3))
    assert values(weighted) == [2.5, -0.25, -2.5]


@pytest.mark.parametrize("segment", [1, 3, 8])
def test_a_mean_of_zero_is_a_newborn_with_the_sign_of_its_position(segment: int) -> None:
    """No connection weighs 0; one whose weights cancel out is where Algorithm 1 has those that it draws."""
    kept = merged(([1, 3, 6], [1, 2, 4], 1), ([1, 3, 6], [-1, 2, -4], 1), segment=segment)
    own = random.signs(np.array([1, 6]), seed=3) * NEWBORN
    assert positions(kept) == [1, 3, 6]
    assert kept.value[[0, 2]].tolist() == own.tolist() and kept.value[1] == 2


def test_a_mean_below_the_smallest_number_keeps_its_sign() -> None:
    tiny = 1.4e-45  # of which a third is no number
    kept = merged(([2], [-tiny], 1), ([2], [tiny], 2), ([2], [-tiny], 2))
    assert values(kept) == [-float(NEWBORN)]


def test_weights_cancel_out_of_what_stays() -> None:
    """A position that two clients hold with opposite signs scores 0, and any other is kept before it."""
    kept = merged(([0, 5], [9, 0.1], 1), ([0, 2], [-9, 0.2], 1))
    assert positions(kept) == [2, 5]


def test_what_is_not_trained_keeps_its_own_number() -> None:
    """Positions 0 to 3 keep two connections and 4 to 7 one, however large the weights of the latter."""
    groups = [Group([(0, 4)], 2), Group([(4, 8)], 1)]
    kept = merged(([0, 1, 5], [0.1, 0.2, 9], 1), ([1, 3, 4], [0.2, 0.3, 8], 1), groups=groups)
    assert positions(kept) == [1, 3, 5]
    assert values(kept) == pytest.approx([0.2, 0.3, 9])


def test_a_group_may_lie_in_several_runs_and_be_empty() -> None:
    groups = [Group([(0, 2), (6, 8)], 2), Group([(2, 6)], 0)]
    kept = merged(([0, 7], [1, 2], 1), ([1, 6], [3, 1], 1), groups=groups, segment=5)
    assert positions(kept) == [1, 7]


def test_averages_and_medians() -> None:
    first, second = average(
        [((np.array([1, 2]), np.array([8])), 1.0), ((np.array([3, -2]), np.array([0])), 3.0)]
    )
    assert first.tolist() == [2.5, -1] and second.tolist() == [2]
    nan = np.nan
    columns = np.array([[1, nan, 5, 7], [nan, nan, 1, 9], [4, 2, 3, nan]], np.float32)
    assert median(columns).tolist() == [2.5, 2, 3, 8]


# At random, beside a reference that has every number of the dense network


def dense_reference(clients: Sequence[Client], size: int, groups: Sequence[Group]) -> dict[int, float]:
    """Position → value, by sorting the scores of the whole dense grid."""
    total = sum(weight for _, _, weight in clients)
    grid = np.zeros((len(clients), size))
    held = np.zeros((len(clients), size), bool)
    for row, (index, value, _) in enumerate(clients):
        grid[row, list(index)], held[row, list(index)] = np.array(value, np.float32), True
    weights = np.array([weight for _, _, weight in clients])[:, None]
    score = np.abs((weights * grid).sum(axis=0)) / total
    found = {}
    for group in groups:
        inside = [place for begin, end in group.spans for place in range(begin, end) if held[:, place].any()]
        for place in sorted(inside, key=lambda place: (-score[place], place))[: group.kappa]:
            n = weights[held[:, place], 0]
            found[place] = float((n * grid[held[:, place], place]).sum() / n.sum())
    return found


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, count = int(rng.integers(8, 80)), int(rng.integers(1, 7))
    middle = int(rng.integers(1, size))
    groups = [Group([(0, middle)], int(rng.integers(0, middle + 1)))]
    groups.append(Group([(middle, size)], int(rng.integers(0 if groups[0].kappa else 1, size - middle + 1))))
    clients: list[Client] = []
    for _ in range(count):
        parts = [rng.choice(np.arange(*group.spans[0]), group.kappa, replace=False) for group in groups]
        index = np.sort(np.concatenate(parts))
        # Few different magnitudes, so that scores are equal and cancel out now and then.
        value = rng.choice([-2, -1, -0.5, 0.25, 0.5, 1, 3], len(index))
        clients.append((index.tolist(), value.tolist(), int(rng.integers(1, 4))))
    kept = merged(*clients, groups=groups, size=size, segment=int(rng.integers(1, size + 1)))
    expected = dense_reference(clients, size, groups)
    assert positions(kept) == sorted(expected)
    assert len(set(positions(kept))) == sum(group.kappa for group in groups)
    for place, found in zip(positions(kept), values(kept), strict=True):
        assert found == pytest.approx(expected[place], rel=1e-6, abs=2e-12) and found != 0
    masks = [set(index) for index, *_ in clients]
    assert kept.union == len(set.union(*masks)) and kept.common == len(set.intersection(*masks))
    pairs = [(a, b) for a in range(count) for b in range(a)]
    assert kept.shared == sum(len(masks[a] & masks[b]) for a, b in pairs)
