"""The C interface, call by call, beside the Python runtime: the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from helpers.c_interface import (
    BUSY,
    ERROR,
    NO_MEMORY,
    NOT_FINITE,
    STOPPED,
    CError,
    Network,
    Progress,
    Rates,
    library,
)

from edge_bcs.core.objectives import OBJECTIVES
from edge_bcs.core.state import STATE_NAMES

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
STEPS = 20
RATES = {"learning_rate": 0.05, "weight_decay": 0.001, "momentum": 0.8, "noise": 1e-4}


@pytest.fixture
def pixels() -> tuple[Array, Array]:
    """Ten images u8 [10, 1, 8, 8], and labels."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (10, 1, 8, 8), np.uint8), rng.integers(0, 10, 10)


def python_training(path: Path, x: Array, y: Array, engine: str) -> tuple[dict[str, bytes], list[Any]]:
    with Trainer(path, engine=engine, threads=1) as trainer:
        for name, value in RATES.items():
            setattr(trainer, name, value)
        told: list[Any] = [trainer.step(x, y) for _ in range(STEPS)]
        measured = trainer.evaluate((x, y), attack_steps=2, restarts=2)
        told.append((measured["accuracy"], measured["robust_accuracy"]))
        return {name: array.tobytes() for name, array in trainer.state().items()}, told


def c_training(path: Path, x: Array, y: Array, threads: int) -> tuple[dict[str, bytes], list[Any]]:
    told: list[Any] = []
    with Network(path, threads=threads) as network:
        network.call("set_rates", Rates(**RATES))
        for _ in range(STEPS):
            result = network.step(x, y)
            facts = {name: getattr(result, name) for name in ("loss", "accuracy", "robust_accuracy")}
            told.append({name: value for name, value in facts.items() if value == value})
        measured = network.evaluate(x, y, attack_steps=2, restarts=2)
        told.append((measured.right / measured.images, measured.robust_right / measured.images))
        assert network.steps == STEPS
        return {name: network.tensor(name).tobytes() for name in STATE_NAMES}, told


@pytest.mark.parametrize(("micro_batch", "memory"), [(4, None), (5, None), (2, 46_000)])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_trains_to_the_bits_of_python(
    tiny_artifact: Make,
    pixels: tuple[Array, Array],
    objective: str,
    batch_norm: str,
    micro_batch: int,
    memory: int | None,
) -> None:
    """Also where the memory lets more images be attacked than trained on at once."""
    options: dict[str, Any] = {} if memory is None else {"memory": memory}
    path = tiny_artifact(objective=objective, batch_norm=batch_norm, micro_batch=micro_batch, **options)
    images = Artifact.read(path).attack_micro_batch
    assert images == micro_batch if memory is None or objective == "natural" else images in (6, 8)
    x, y = pixels
    floats = x.astype(np.float32) / np.float32(255)
    expected = python_training(path, floats, y, "onnxruntime")
    assert python_training(path, floats, y, "native") == expected
    assert c_training(path, x, y, threads=1) == expected
    assert c_training(path, floats, y, threads=2) == expected


def test_what_it_says_of_a_network(tiny_artifact: Make) -> None:
    path = tiny_artifact(objective="trades")
    with Trainer(path, engine="native") as trainer:
        artifact, arena = trainer.artifact, trainer.peak_bytes
    with Network(path, threads=2) as network:
        info = network.info
        assert (info.channels, info.height, info.width) == artifact.input_shape
        assert (info.connections, info.positions) == (artifact.kappa, artifact.size)
        assert (info.arena_bytes, info.working_set_bytes) == (arena, artifact.predicted_peak_bytes)
        assert (info.classes, info.named, info.micro_batch, info.threads) == (10, 0, artifact.micro_batch, 2)
        assert (info.objective, info.batch_norm, info.name) == (
            b"trades",
            b"frozen",
            artifact.network.encode(),
        )
        assert (info.epsilon, info.attack_steps) == (artifact.objective.attack.epsilon, 3)
        assert (info.resize, info.trained, info.seed) == (b"squash", b"all", artifact.seed)
        assert library().edge_bcs_class_name(network.handle, 0) is None
        assert library().edge_bcs_warning(network.handle) == b""


def test_it_lives_in_the_callers_memory(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    path = tiny_artifact()
    with Network(path) as network:
        needed, expected = network.info.arena_bytes, network.step(*pixels).loss
    memory = np.full(needed + 128, 255, np.uint8)
    begin = -memory.ctypes.data % 64
    address = memory.ctypes.data + begin
    with Network(path, arena=address, arena_bytes=needed) as network:
        assert network.step(*pixels).loss == expected
    assert set(memory[:begin]) | set(memory[begin + needed :]) == {255}
    for options, sentence in (
        (
            {"arena": address, "arena_bytes": needed - 1},
            f"the arena has {needed - 1} bytes, and the network needs",
        ),
        ({"arena_bytes": needed - 1}, f"the arena needs {needed} bytes, and {needed - 1} are allowed"),
    ):
        with pytest.raises(CError, match=sentence) as refused:
            Network(path, **options)
        assert refused.value.status == NO_MEMORY
    with pytest.raises(CError, match="does not begin at a multiple of 64"):
        Network(path, arena=address + 8, arena_bytes=needed)


def test_files_in_memory(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    path = tiny_artifact()
    files = {
        name: (path / name).read_bytes() for name in ("manifest.json", "program.bin", "state.safetensors")
    }
    with Network(path) as one, Network.of_files(files) as other:
        assert one.step(*pixels).loss == other.step(*pixels).loss
    for name in files:
        with pytest.raises(CError, match=f"{name} is missing"):
            Network.of_files({other: content for other, content in files.items() if other != name})


def test_answers(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    path, (x, _) = tiny_artifact(), pixels
    floats = x.astype(np.float32) / np.float32(255)
    with Trainer(path) as trainer:
        expected = trainer.probabilities(floats)
    with Network(path) as network:
        np.testing.assert_allclose(network.predict(x), expected, rtol=1e-6)
        assert np.array_equal(network.predict(floats), network.predict(x))
        assert network.steps == 0


def test_a_seed_changes_the_attack(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    losses = []
    for options in ({}, {"seeded": 1, "seed": 2**64 - 1}):
        with Network(tiny_artifact(), **options) as network:
            losses.append(network.step(*pixels).loss)
    with Trainer(tiny_artifact(), seed=2**64 - 1) as trainer:
        floats = pixels[0].astype(np.float32) / np.float32(255)
        assert trainer.step(floats, pixels[1])["loss"] == losses[1] != losses[0]


def test_bad_images_leave_no_trace(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    x, y = pixels
    floats = x.astype(np.float32) / np.float32(255)
    wrong = {}
    for name, value in (("infinite", np.inf), ("large", 2.0)):
        wrong[name] = floats.copy()
        wrong[name][7, 0, 3, 3] = value
    with Network(tiny_artifact(batch_norm="batch")) as network:
        before = network.state(STATE_NAMES)
        for images, labels, status, sentence in (
            (wrong["infinite"], y, NOT_FINITE, "in step 1, image 7 of the batch has a pixel"),
            (wrong["large"], y, ERROR, r"must lie in \[0, 1\], but they reach 0 to 2"),
            (floats, np.where(np.arange(10) == 8, 10, y), ERROR, r"label 10 is out of range \(image 8"),
            (floats, np.where(np.arange(10) == 8, -1, y), ERROR, r"label -1 is out of range \(image 8"),
            (floats[:0], y, ERROR, "the batch has no images"),
        ):
            with pytest.raises(CError, match=sentence) as refused:
                network.step(images, labels)
            assert refused.value.status == status
        with pytest.raises(CError, match="a rate must be a finite number"):
            network.call("set_rates", Rates(**{**RATES, "noise": float("nan")}))
        network.call("set_rates", Rates(**{**RATES, "learning_rate": 3e38}))
        with pytest.raises(CError, match="would overflow; lower the learning rate") as refused:
            network.step(x, y)
        assert refused.value.status == NOT_FINITE
        after = network.state(STATE_NAMES)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert network.steps == 0


def test_callbacks_stop_it(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    told: list[tuple[int, int]] = []
    with Network(tiny_artifact(batch_norm="batch")) as network:
        before = network.state(STATE_NAMES)

        def progress(user: int | None, done: int, images: int) -> int:
            told.append((done, images))
            nested = library().edge_bcs_step(network.handle, None, None)
            return 7 if nested != BUSY or done == 8 else 0

        hook = Progress(progress)
        network.call("on_progress", hook, None)
        with pytest.raises(CError, match="stopped by a callback") as refused:
            network.step(*pixels)
        assert refused.value.status == STOPPED
        assert told == [(4, 10), (8, 10)]
        after = network.state(STATE_NAMES)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        network.call("on_progress", Progress(), None)
        assert network.step(*pixels).step == 1


def test_handles_in_many_threads(tiny_artifact: Make, pixels: tuple[Array, Array]) -> None:
    paths = [tiny_artifact(), tiny_artifact(objective="trades")]
    expected = [c_training(path, *pixels, threads=1) for path in paths]
    found: dict[int, Any] = {}

    def train(number: int) -> None:
        found[number] = c_training(paths[number % 2], *pixels, threads=1 + number % 2)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == [expected[number % 2] for number in range(4)]
