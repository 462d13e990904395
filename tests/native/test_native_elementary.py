"""exp, log and the writing of numbers, of our own: a loss must not depend on the C library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import programs

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
SMALLEST, LARGEST = float(np.finfo(np.float64).smallest_subnormal), float(np.finfo(np.float64).max)


def computed(function: str, numbers: Array, folder: Path) -> Array:
    given, made = folder / "numbers", folder / "results"
    given.write_bytes(numbers.tobytes())
    result = programs.run("elementary", function, given, made)
    assert result.returncode == 0, result.stderr
    return np.frombuffer(made.read_bytes(), np.float64)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="numpy has no longer double here")
@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        ("exp", RANDOM.uniform(-745, 709.7, 200_000)),
        ("exp", RANDOM.uniform(-1, 1, 200_000) * 2.0 ** RANDOM.integers(-60, 6, 200_000)),
        ("exp", np.log(2) * (np.arange(-1022, 1024) + RANDOM.choice([-0.5, 0.5], 2046) * (1 - 1e-12))),
        ("log", RANDOM.integers(1, 0x7FEFFFFFFFFFFFFF, 200_000).view(np.float64)),
        ("log", 1 + RANDOM.uniform(-1, 1, 200_000) * 2.0 ** RANDOM.integers(-52, 0, 200_000)),
        ("log", RANDOM.uniform(1, 1000, 100_000)),
    ],
)
def test_within_one_unit_of_the_last_place(function: str, numbers: Array, tmp_path: Path) -> None:
    numbers = numbers[numbers > 0] if function == "log" else numbers
    exact = getattr(np, function)(numbers.astype(np.longdouble))
    found = computed(function, numbers, tmp_path)
    unit = np.spacing(np.abs(exact.astype(np.float64)))
    error = np.abs((found.astype(np.longdouble) - exact) / unit.astype(np.longdouble))
    assert error.max() < 1, numbers[np.argmax(error)]


def test_the_ends_of_the_range(tmp_path: Path) -> None:
    given = np.array([-np.inf, -1e308, -746, 0.0, -0.0, 709.78, 709.79, 1e308, np.inf, np.nan])
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_allclose(computed("exp", given, tmp_path), np.exp(given), rtol=3e-16)
    given = np.array([0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, SMALLEST, LARGEST, 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(computed("log", given, tmp_path), np.log(given), rtol=3e-16)
