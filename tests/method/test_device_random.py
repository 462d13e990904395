"""The numbers drawn by torch are those drawn by numpy, to the bit."""

from __future__ import annotations

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


def test_on_the_device() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for drawn, expected in ((device_random.normal, random.normal), (device_random.uniform, random.uniform)):
        found = drawn(999, seed=5, step=6, purpose=random.PGD_START, start=2, device=device).cpu().numpy()
        assert np.array_equal(found, expected(999, seed=5, step=6, purpose=random.PGD_START, start=2))
