"""The numbers drawn by torch are those drawn by numpy, to the bit."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_bcs.core import random
from edge_bcs.method import device_random

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seed", "step", "start"), [(0, 0, 0), (2**64 - 1, 2**40 + 5, 3), (123456789, 7, 2**33 + 1)]
)
def test_words(seed: int, step: int, start: int) -> None:
    expected = random.words(1001, seed=seed, step=step, purpose=random.NOISE, start=start)
    for number in (step, torch.tensor(step)):
        found = device_random.words(
            1001, seed=seed, step=number, purpose=random.NOISE, start=start, device=CPU
        )
        assert np.array_equal(found.numpy(), expected)


def test_distributions() -> None:
    word = np.concatenate(
        [random.words(200_000, seed=1, step=2, purpose=3), np.uint32([0, 1, 2**31, 2**32 - 1])]
    )
    given = torch.from_numpy(word.astype(np.int64))
    found = device_random.normal_from_words(given).numpy()
    assert np.array_equal(found.view(np.int32), random.normal_from_words(word).view(np.int32))
    found = device_random.uniform_from_words(given).numpy()
    assert np.array_equal(found, random.uniform_from_words(word))


def test_words_are_the_published_ones() -> None:
    """kat_vectors of Random123 1.14, philox4x32 10, for counter and key of zeros."""
    found = device_random.words(4, seed=0, step=0, purpose=0, device=CPU)
    assert found.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_cpu_draws_what_torch_computes_elsewhere() -> None:
    """On a CPU numpy draws: held against torch's words and distributions, which a GPU uses."""
    place: dict[str, Any] = {"seed": 5, "step": 6, "purpose": random.PGD_START, "start": 2, "device": CPU}
    word = device_random.words(999, **place)
    for drawn, expected in (
        (device_random.normal, device_random.normal_from_words(word)),
        (device_random.uniform, device_random.uniform_from_words(word)),
    ):
        assert torch.equal(drawn(999, **place), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_numpy_draws() -> None:
    place: dict[str, Any] = {"seed": 5, "step": 6, "purpose": random.PGD_START, "start": 2}
    for drawn, expected in ((device_random.normal, random.normal), (device_random.uniform, random.uniform)):
        found = drawn(999, **place, device=torch.device("cuda")).cpu().numpy()
        assert np.array_equal(found, expected(999, **place))
