"""The photographs of hands: whose hands are in which part."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.hands import archive

from edge_bcs.bench import hands
from edge_bcs.core.errors import EdgeBcsError


def test_no_hand_is_in_two_parts() -> None:
    """Each part is one range of numbers (the first goes on after the last), ten photographs from the next."""
    count, draws = 1641, 5
    measured = np.zeros(count, int)
    for draw in range(draws):
        parts = hands.split(count, draw, draws)
        assert sum(len(part) for part in parts) == count - 6 * hands.GUARD
        for one in parts:
            assert set(np.diff(one)) <= {1, 1 - count}
            for other in parts:
                apart = np.abs(one[:, None] - other)
                assert one is other or np.minimum(apart, count - apart).min() > 2 * hands.GUARD
        assert [len(part) for part in parts[1:]] == [144, 472]
        measured[parts[2]] += 1
    assert measured.max() == 2 and (measured > 0).mean() > 0.95


def test_a_few_of_each_class_keep_their_labels() -> None:
    labels, places = np.arange(200) % 10, np.arange(50, 200)
    few, others = hands.few_of_each(labels, places, 3, draw=0)
    assert np.bincount(labels[few]).tolist() == [3] * 10 and few.min() >= 50
    assert sorted([*few, *others]) == places.tolist()
    assert few.tolist() != hands.few_of_each(labels, places, 3, draw=1)[0].tolist()


def test_photographs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images, labels, numbers = hands.photographs(archive(tmp_path), 8)
    assert images.shape == (40, 3, 8, 8) and images[:, 0, 0, 0].tolist() == list(range(40))
    assert numbers.tolist() == list(range(100, 140)) and labels.tolist() == [n % 10 for n in range(40)]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(EdgeBcsError, match="holds no photographs in folders of classes"):
        hands.photographs(tmp_path / "empty.tar", 8)
