"""Philox against the published vectors of Random123, and the distributions against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError

# kat_vectors of Random123 1.14, philox4x32 10.
KNOWN_ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    assert random.philox(counter, key).tolist() == expected


def test_counter_words_are_block_step_and_purpose() -> None:
    # The third published vector: block 0x85a308d3_243f6a88, step low word 0x13198a2e, word 3 = 0x03707344.
    step = (0x037073 << 32) | 0x13198A2E
    drawn = random.blocks(0x85A308D3_243F6A88, seed=0x299F31D0_A4093822, step=step, purpose=0x44)
    assert drawn.tolist() == [KNOWN_ANSWERS[2][2]]


def test_draws_do_not_depend_on_where_they_start() -> None:
    key = {"seed": 3, "step": 4, "purpose": random.NOISE}
    whole = random.words(50, **key)
    for start in range(9):
        assert (random.words(20, **key, start=start) == whole[start : start + 20]).all()
    assert (whole[4:8] == random.blocks(1, **key)[0]).all()


def test_normal_is_the_inverse_of_the_normal_distribution() -> None:
    edges = np.array([0, 1, 2, 3, 10**3, 10**6, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    word = np.concatenate([edges, random.words(100_000, seed=1, step=0, purpose=random.NOISE)])
    expected = stats.norm.ppf((word + 0.5) / 2**32).astype(np.float32)
    # Two good double-precision quantiles round to the same float or, rarely, to neighbours.
    difference = np.abs(random.normal_from_words(word) - expected)
    assert (difference <= np.spacing(np.abs(expected))).all()
    assert (difference == 0).mean() > 0.9999


def test_uniform_fills_the_unit_interval() -> None:
    drawn = random.uniform(100_000, seed=5, step=1, purpose=random.PGD_START)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4
    assert random.uniform_from_words(np.array([0xFFFFFFFF], np.uint32))[0] == np.float32(1 - 2**-24)


@pytest.mark.parametrize("below", [7, 1000, 3 << 30, 1 << 32])
def test_integers_are_uniform(below: int) -> None:
    drawn = random.integers(20_000, below, seed=7, step=2, purpose=random.BIRTH)
    assert drawn.min() >= 0 and drawn.max() < below
    bins = min(below, 50)
    counts = np.bincount(drawn * bins // below, minlength=bins)
    assert stats.chisquare(counts).pvalue > 1e-4


# Of 3·2³⁰ numbers one word in four is rejected; of one, and of 2³², none.
@pytest.mark.parametrize("below", [1, 7, 3 << 30, 1 << 32])
def test_integer_stream_is_lemires_rejection_word_by_word(below: int) -> None:
    word = random.words(400, seed=9, step=0, purpose=random.BIRTH).tolist()
    expected = [w * below >> 32 for w in word if w * below % 2**32 >= 2**32 % below]
    stream = random.IntegerStream(below, seed=9, step=0, purpose=random.BIRTH)
    drawn = np.concatenate([stream.take(count) for count in (1, 2, 50, 100)]).tolist()
    assert drawn == expected[:153]


def test_signs_are_fair_and_depend_on_seed_and_position_only() -> None:
    gamma = random.signs(np.arange(20_000), seed=11)
    assert set(gamma.tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((gamma > 0).sum()), 20_000).pvalue > 1e-4
    assert (random.signs([19_999, 5], seed=11) == gamma[[19_999, 5]]).all()
    assert (random.signs(np.arange(20_000), seed=12) != gamma).any()


def test_out_of_range_is_refused() -> None:
    with pytest.raises(EdgeBcsError, match="seed"):
        random.words(1, seed=-1, step=0, purpose=1)
    with pytest.raises(EdgeBcsError, match="not below 0"):
        random.IntegerStream(0, seed=0, step=0, purpose=1)
