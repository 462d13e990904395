"""Attacks in half precision: which machine has them, that engines agree, what a run keeps, what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import precision
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.library import half_kernels
from edge_bcs.runtime.trainer import Trainer

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import open_data

MakeArtifact = Callable[..., Path]
HERE = pytest.mark.skipif(half_kernels() == 0, reason="no half precision here")
WIDE = {"micro_batch": 16, "batch_size": 32, "attack_steps": 10}


@pytest.fixture
def artifact(tiny_artifact: MakeArtifact) -> Path:
    """Trained in micro-batches of 16, whose attacks may be in half precision."""
    return tiny_artifact(**WIDE, attack_precision="auto")


def some_digits(count: int) -> tuple[Any, Any]:
    return open_data("digits", "train", (1, 8, 8)).read(np.arange(count))


def state(trainer: Trainer) -> dict[str, Any]:
    names = ("coo.value", "coo.index", "coo.momentum", "dense.value")
    return {name: trainer.buffers[name].copy() for name in names}


def after(path: Path, steps: int, **options: Any) -> dict[str, Any]:
    with Trainer(path, **options) as trainer:
        for _ in range(steps):
            trainer.step(*some_digits(32))
        return state(trainer)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_the_machine_decides(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Artifact.read(artifact)
    for kernels, expected in ((0, False), (1, False), (2, True)):
        monkeypatch.setattr(precision, "half_kernels", lambda kernels=kernels: kernels)
        assert precision.half_attack(read) == precision.half_attack(read, "auto") == expected
        assert not precision.half_attack(read, "f32")
    assert precision.half_attack(read, "half")
    monkeypatch.setattr(precision, "half_kernels", lambda: 0)
    with pytest.raises(EdgeBcsError, match="no arithmetic in half precision"):
        Trainer(artifact, attack_precision="half")
    with pytest.raises(EdgeBcsError, match="the attack precision is f32, half or auto, not 'f16'"):
        Trainer(artifact, attack_precision="f16")


def test_without_the_arithmetic_nothing_changes(
    artifact: Path, tiny_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "half_kernels", lambda: 0)
    assert equal(after(artifact, 2), after(tiny_artifact(**WIDE), 2))


@HERE
def test_both_engines_and_any_threads_give_the_same_bits(artifact: Path) -> None:
    half = {"attack_precision": "half"}
    bits = after(artifact, 3, engine="onnxruntime", threads=1, **half)
    assert equal(bits, after(artifact, 3, engine="native", threads=2, **half))
    assert not equal(bits, after(artifact, 3, attack_precision="f32"))


@HERE
def test_memory_is_that_of_float32(artifact: Path) -> None:
    with Trainer(artifact, engine="onnxruntime", attack_precision="half") as trainer:
        trainer.step(*some_digits(32))
        assert trainer.peak_bytes == trainer.artifact.predicted_peak_bytes


@HERE
def test_a_run_goes_on_with_what_it_was_begun_with(artifact: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for wanted in ("half", "f32"):
        whole = after(artifact, 4, attack_precision=wanted)
        with Trainer(artifact, attack_precision=wanted) as trainer:
            for _ in range(2):
                trainer.step(*some_digits(32))
            trainer.save(run / wanted)
        assert json.loads((run / wanted / "manifest.json").read_text())["attack_precision"] == wanted
        with Trainer.resume(run / wanted) as trainer:
            assert trainer.attack_precision == wanted
            for _ in range(2):
                trainer.step(*some_digits(32))
            assert equal(state(trainer), whole)
    with Trainer.resume(run / "half", attack_precision="f32") as trainer:
        trainer.step(*some_digits(32))
        trainer.save(run / "half")
    assert Artifact.read(run / "half").attack_precision == "f32"


@HERE
def test_half_steps_reach_the_loss_of_float32_steps(tiny_artifact: MakeArtifact, tmp_path: Path) -> None:
    data = some_digits(256)
    learning = tiny_artifact(**WIDE, batch_norm="batch", attack_precision="auto")
    with Trainer(learning, attack_precision="f32") as trainer:
        for first in range(0, 32 * 120, 32):
            rows = np.arange(first, first + 32) % 256
            trainer.step(data[0][rows], data[1][rows])
        trainer.save(tmp_path / "run")
    losses = {}
    for wanted in ("f32", "half"):
        with Trainer(tmp_path / "run", attack_precision=wanted) as trainer:
            trainer.learning_rate = trainer.weight_decay = trainer.momentum = trainer.noise = 0
            losses[wanted] = trainer.step(*data)["loss"]
    with Trainer(tmp_path / "run", attack_precision="f32") as trainer:
        assert trainer.evaluate(data, 0)["accuracy"] > 0.5  # it has learned something to attack
    assert losses["half"] >= 0.99 * losses["f32"]


@HERE
@pytest.mark.parametrize("channels", [12, 16])
def test_depthwise_layers(channels: int, tmp_path: Path) -> None:
    """As MobileNet has them, with either stride: the same bits whoever computes, and a gradient's signs."""
    torch = pytest.importorskip("torch")
    from torch import nn

    import edge_bcs

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, 24, 1), nn.BatchNorm2d(24),
        nn.Conv2d(24, 48, 5, padding=2, stride=2, groups=24), nn.BatchNorm2d(48), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    sparse = edge_bcs.sparsify(network, 0.3, start="new")
    path = tmp_path / "artifact"
    edge_bcs.export(
        sparse, path, "at", input_shape=(1, 8, 8), batch_size=32, memory=edge_bcs.Memory(micro_batch=16),
        attack=edge_bcs.Attack(steps=1), attack_precision="half", validate=False,
    )  # fmt: skip
    half = {"attack_precision": "half"}
    bits = after(path, 2, engine="onnxruntime", threads=1, **half)
    assert equal(bits, after(path, 2, engine="native", threads=2, **half))
    moves = {}
    for wanted in ("f32", "half"):
        with Trainer(path, attack_precision=wanted, engine="onnxruntime") as trainer:
            trainer.step(*some_digits(16))
            moves[wanted] = np.sign(trainer.buffers["adversarial"] - trainer.buffers["input"])
            assert trainer.peak_bytes == trainer.artifact.predicted_peak_bytes
    assert np.mean(moves["f32"] == moves["half"]) > 0.97 and np.mean(moves["f32"] != 0) > 0.5


def test_what_has_no_half_precision_form(tiny_artifact: MakeArtifact) -> None:
    with pytest.raises(EdgeBcsError, match="no half-precision form: images lie 4 side by side"):
        tiny_artifact(attack_precision="half")
    narrow = tiny_artifact(attack_precision="auto")
    assert Artifact.read(narrow).attack_precision is None
    with pytest.raises(EdgeBcsError, match="no half-precision form"):
        Trainer(narrow, attack_precision="half")
    with Trainer(narrow, attack_precision="auto") as trainer:
        assert trainer.attack_precision == "f32"
