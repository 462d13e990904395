"""What a comparison of whole steps says of its seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from edge_bcs.bench.step import StepComparison

COMPARISON: dict[str, Any] = {
    "model": "vgg16", "sparsity": 0.99, "distribution": "uniform", "batch_size": 128, "micro_batch": 32,
    "attack_steps": 10, "threads": 2, "isa": "avx512", "sparse_seconds": (1.0, 2.0, 4.0),
    "dense_seconds": (30.0, 20.0, 80.0), "sparseprop_seconds": (5.0, 6.0, 20.0),
    "optimizer_seconds": (0.1, 0.01, 0.02), "operators": {"optimizer": {"RewireStep": 0.01}}, "kappa": 1,
    "peak_bytes": 1,
}  # fmt: skip


def test_the_least_of_a_step_is_the_sum_over_its_runs() -> None:
    def least(seconds: float) -> dict[str, dict[str, float]]:
        return {"Conv": {"seconds": seconds, "in_cache_seconds": seconds / 2}, "MaxPool": {"seconds": 0.0}}

    taken = StepComparison(**COMPARISON, parts={"attack": (0.5, 10), "training": (0.5, 2)}, rooflines={})
    assert taken.least() is None and "least_seconds" not in taken.as_dict()
    rooflines = {"attack": least(0.25), "training": least(0.5), "optimizer": least(1.0)}
    for kinds in rooflines.values():
        kinds["MaxPool"]["in_cache_seconds"] = 0.125
    taken = replace(taken, rooflines=rooflines)
    assert taken.as_dict()["least_seconds"] == 10 * 0.25 + 2 * 0.5 + 1.0
    assert taken.as_dict()["least_in_cache_seconds"] == 10 * 0.25 + 2 * 0.375 + 0.625


def test_the_ratio_is_the_median_of_neighbouring_repetitions() -> None:
    taken = StepComparison(**COMPARISON, parts={}, rooflines={})
    assert taken.ratio == 20.0  # of 30, 10 and 20; the ratio of the medians would be 15
    assert taken.as_dict()["sparseprop_ratio"] == 5.0  # of 5, 3 and 5
    assert taken.optimizer_share == 0.02 / 2.0
    assert taken.rewiring_share == 0.01 / 2.0
