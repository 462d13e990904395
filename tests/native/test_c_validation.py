"""Held-out images by the C interface: what is measured is the caller's, what is kept is the library's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from helpers.c_interface import POINTER, U64, CError, Network, StepResult, batch_of

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
SCORES = [0.1, 0.4, 0.4, 0.3, 0.9]
"""Robust accuracies of the epochs: the third is the best one, and after the fourth patience of 2 is over."""
SLOTS = ("state.safetensors", "state.previous.safetensors", "state.best.safetensors")


@pytest.fixture
def data() -> tuple[Array, Array]:
    """64 images, 48 of them to train on: six steps an epoch."""
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, (64, 1, 8, 8), np.uint8), rng.integers(0, 10, 64)


def expected(
    path: Path, data: tuple[Array, Array], run: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """The slots of Python's training."""

    def evaluate(self: Trainer, given: Any, steps: int, *, on_batch: Any) -> dict[str, Any]:
        score = SCORES[self.steps // 6 - 1]
        return {"accuracy": 0.95, "robust_accuracy": score, "samples": len(given)}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    wishes: dict[str, Any] = {
        "epochs": 8,
        "validation": 0.25,
        "patience": 2,
        "batch_size": 8,
        "augment": "none",
    }
    with Trainer(path) as trainer:
        result = trainer.fit(data, save=run, progress=False, **wishes)
    assert result["early"] and result["best"] == {"step": 18, "accuracy": 0.4}
    return {name: (run / name).read_bytes() for name in SLOTS}


def begin(network: Network, run: Path) -> None:
    network.call("save_into", str(run).encode())
    wishes = {"images": 64, "epochs": 8, "batch_size": 8, "augment": b"none", "resume": 1}
    network.begin(validation=0.25, has_validation=1, patience=2, **wishes)


def go_on(network: Network, data: tuple[Array, Array], until: int) -> None:
    """Train until so many steps are done, measuring as the position says."""
    places = np.empty(64, np.uint32)
    network.call("split", POINTER(places.ctypes.data), ctypes.c_size_t(64))
    position = network.position
    assert position.samples == 48 and sorted(places) == list(range(64))
    assert (np.diff(places[:48].astype(int)) > 0).all() and (np.diff(places[48:].astype(int)) > 0).all()
    order = np.empty(48, np.uint32)
    while position.done < until or position.measure:
        if position.measure:
            with pytest.raises(CError, match="an epoch has ended"):
                network.call("skip")
            network.call("note", ctypes.c_double(SCORES[position.done // 6 - 1]), None)
        elif position.finished:
            break
        else:
            network.call("order", U64(position.epoch), POINTER(order.ctypes.data), ctypes.c_size_t(48))
            chosen = places[order[position.first : position.first + position.count]]
            network.call("train", batch_of(data[0][chosen], data[1][chosen]), StepResult())
        position = network.position


@pytest.mark.parametrize("cut", [None, 3, 12, 18])
def test_a_training_ends_with_its_best_state(
    tiny_artifact: Make,
    data: tuple[Array, Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: int | None,
) -> None:
    path, run = tiny_artifact(), tmp_path / "run"
    wanted = expected(path, data, tmp_path / "python", monkeypatch)
    if cut is not None:
        with Network(path) as network:
            begin(network, run)
            go_on(network, data, cut)
            network.save()
        (run / "state.best.safetensors").unlink(missing_ok=True)  # cut before it was kept
    with Network(path if cut is None else run) as network:
        begin(network, run)
        assert (run / "state.best.safetensors").exists() == (cut in (12, 18))
        with pytest.raises(CError, match="the training is not finished"):
            network.call("return_to_best", None)
        go_on(network, data, 99)
        position = network.position
        assert (position.done, position.finished, position.best_step) == (24, 1, 18)
        network.call("return_to_best", None)
        network.save()
    assert {name: (run / name).read_bytes() for name in SLOTS} == wanted


def test_a_best_state_that_cannot_be_read_leaves_the_newest(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    with Network(tiny_artifact()) as network:
        begin(network, tmp_path / "run")
        go_on(network, data, 99)
        newest = network.state(("coo.value", "dense.value"))
        best = tmp_path / "run" / "state.best.safetensors"
        content = bytearray(best.read_bytes())
        content[-1] ^= 1
        best.unlink()
        best.write_bytes(content)
        network.call("return_to_best", None)
        assert all((network.tensor(name) == array).all() for name, array in newest.items())
        assert b"its checksum does not match" in network_warning(network)


def network_warning(network: Network) -> bytes:
    from helpers.c_interface import library

    found: bytes = library().edge_bcs_warning(network.handle)
    return found


def test_what_makes_no_sense_is_refused(tiny_artifact: Make, tmp_path: Path) -> None:
    with Network(tiny_artifact()) as network:
        wishes = {"images": 64, "epochs": 1, "has_validation": 1}
        with pytest.raises(CError, match="validation needs a run folder"):
            network.begin(validation=0.25, **wishes)
        with pytest.raises(CError, match="must be at least 0 and below 1, not 1"):
            network.begin(validation=1.0, **wishes)
        with pytest.raises(CError, match="patience needs images that are held out"):
            network.begin(images=64, patience=1)
        begin(network, tmp_path / "run")
        with pytest.raises(CError, match="nothing is to be measured now"):
            network.call("note", ctypes.c_double(0.5), None)
        with pytest.raises(CError, match="the training has other images than 63"):
            network.call("split", POINTER(np.empty(64, np.uint32).ctypes.data), ctypes.c_size_t(63))
