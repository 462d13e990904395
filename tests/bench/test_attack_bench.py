"""Attacks in both precisions are timed on what there is, in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.runtime.library import half_kernels
from helpers.artifacts import tiny_network

from edge_bcs import models
from edge_bcs.bench import attacks
from edge_bcs.bench.turns import TorchStep, median_ratio


class Stepper:
    """A trainer whose steps are not asked for."""

    step = None


def without_a_compiler(model: Any) -> Any:
    """What torch.compile makes of a model where there is no compiler."""

    def forward(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore of it")

    return forward


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
    # Its graphs without the minutes of its code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("half", [pytest.param(True, marks=HERE), False])
def test_every_side_is_timed(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "has_half", lambda: half)
    sides = {"f32", "half"} if half else {"f32"}
    common: dict[str, Any] = {"model": "vgg16", "threads": 1, "repetitions": 2}
    seconds = attacks.compare_attack(sparsity=0.9, images_at_once=16, **common)["seconds"]
    assert seconds.keys() == sides
    assert all(len(taken) == 2 and min(taken) > 0 for taken in seconds.values())
    common |= {"distribution": "uniform", "sparsity": 0.9, "batch_size": 16}
    found = attacks.compare_step(**common)
    seconds = found["seconds"]
    assert found["images"] == dict.fromkeys(sides, 16)
    assert seconds.keys() == {*sides, "torch", "compiled", *(["bf16"] if half else [])}
    assert (median_ratio(seconds, "torch", "half") is None) == (not half)


def test_the_faster_micro_batch_counts_for_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"f32 16": [1.0, 5.0, 1.0], "f32 32": [2.0, 2.0, 2.0], "half 16": [2.0] * 3, "half 32": [1.0] * 3}
    monkeypatch.setattr(attacks, "has_half", lambda: True)
    monkeypatch.setattr("edge_bcs.runtime.Trainer", lambda *_, **__: contextlib.nullcontext(Stepper()))
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(attacks, "in_turn", lambda sides, *_: {name: taken.get(name, []) for name in sides})
    common: dict[str, Any] = {"distribution": "uniform", "sparsity": 0.9, "batch_size": 32}
    found = attacks.compare_step(model="vgg16", threads=2, repetitions=3, **common)
    assert found["images"] == {"f32": 16, "half": 32}
    ours = {name: seconds for name, seconds in found["seconds"].items() if seconds}
    assert ours == {"f32": taken["f32 16"], "half": taken["half 32"]}


def test_without_a_compiler_the_other_sides_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    said: list[str] = []
    common: dict[str, Any] = {"distribution": "uniform", "sparsity": 0.9, "batch_size": 16, "threads": 1}
    seconds = attacks.compare_step(model="vgg16", repetitions=1, progress=said.append, **common)["seconds"]
    assert "torch" in seconds and "compiled" not in seconds
    assert "torch.compile is left out: no C++ compiler" in said


@pytest.mark.parametrize("how", [{}, {"compiled": True}, {"bfloat16": True}])
def test_each_dense_side_takes_the_step_of_the_first(how: dict[str, bool]) -> None:
    """Its weights move as those of PyTorch without any of it, in bfloat16 by its rounding."""
    images, labels = (
        torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.arange(16) % 10,
    )
    moved = []
    for options in ({}, how):
        torch.manual_seed(0)
        network = tiny_network()
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step = TorchStep(network, 2, channels_last=True, **options)
        torch.manual_seed(2)
        step(images, labels)
        moved.append(
            torch.cat([(new - old).flatten() for new, old in zip(network.parameters(), before, strict=True)])
        )
    scale = moved[0].abs().max()
    assert scale > 0
    far = (moved[1] - moved[0]).abs().max() / scale
    assert far <= (0.1 if how == {"bfloat16": True} else 1e-4)
    assert ("bfloat16" in how) == bool(far > 1e-4)
