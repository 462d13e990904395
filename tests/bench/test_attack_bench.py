"""Attacks in both precisions are timed on what there is, in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.runtime.library import half_kernels
from helpers.artifacts import tiny_network

from edge_bcs import models
from edge_bcs.bench import attacks
from edge_bcs.bench.turns import median_ratio

HERE = pytest.mark.skipif(half_kernels() != 2, reason="no arithmetic in half precision here")


@pytest.fixture(autouse=True)
def tiny(tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network in the place of those that are measured."""

    @contextlib.contextmanager
    def exported(*_: Any) -> Iterator[tuple[Path, Any]]:
        yield tiny_artifact(micro_batch=16, batch_size=32), None

    def batch_of(count: int, size: int) -> tuple[Any, Any]:
        return np.random.default_rng(0).random((count, 1, 8, 8), np.float32), np.arange(count) % 10

    monkeypatch.setattr(attacks, "exported", exported)
    monkeypatch.setattr(attacks, "batch_of", batch_of)
    monkeypatch.setattr(models, "create", lambda *_, **__: tiny_network())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.mark.parametrize("half", [pytest.param(True, marks=HERE), False])
def test_every_side_is_timed(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "has_half", lambda: half)
    sides = {"f32", "half"} if half else {"f32"}
    common: dict[str, Any] = {"model": "vgg16", "threads": 1, "repetitions": 2, "images_at_once": 16}
    seconds = attacks.compare_attack(sparsity=0.9, **common)["seconds"]
    assert seconds.keys() == sides
    assert all(len(taken) == 2 and min(taken) > 0 for taken in seconds.values())
    seconds = attacks.compare_step(batch_size=16, **common)["seconds"]
    assert seconds.keys() == {*sides, "torch"}
    assert (median_ratio(seconds, "torch", "half") is None) == (not half)
