"""edge-bcs-run and the C interface with single-step attacks: Python's bits; watched; PGD after a collapse."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers import board_program as board
from helpers import commands
from helpers.c_interface import POINTER, CError, Network, Watched, batch_of

from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset, Subset, held_apart, some_of

Make = Callable[..., Path]
OPTIONS = ("--threads", 1, "--eval-samples", 8, "--eval-steps", 1, "--max-writes", "none")
PYTHON = ("--engine", "native")


@pytest.fixture
def artifact(tiny_artifact: Make) -> Path:
    """Whose single step is a weak attack at the radius that it has."""
    return tiny_artifact(training_attack="fgsm-rs", epsilon=0.11)


@pytest.fixture
def data(artifact: Path, tmp_path: Path) -> Path:
    """Twelve images that are watched, with the labels that the network, which is new, gives them: the single
    step leaves seven of them right, PGD-20 one. A look is due after a hundred passes over them."""
    images = np.random.default_rng(2).integers(0, 256, (12, 1, 8, 8)).astype(np.uint8)
    with Trainer(artifact, engine="native") as trainer:
        labels = trainer.probabilities(images / np.float32(255)).argmax(axis=1)
    parts = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "images.npz", **parts)
    return tmp_path / "images.npz"


def by_both(folder: Path, *given: object) -> list[dict[str, Any]]:
    """The reports of both programs, whose runs in ``folder`` are the same."""
    ours, theirs = folder / "ours", folder / "theirs"
    reports = [
        board.succeed(*given, "-o", ours),
        commands.succeed(*given, "-o", theirs, *PYTHON),
    ]
    assert board.states(ours) == board.states(theirs)
    assert board.metrics(ours) == board.metrics(theirs)
    for report in reports:
        del report["run"]
    assert board.timeless(reports[0]) == board.timeless(reports[1])
    assert list(reports[0]["training"]) == list(reports[1]["training"])
    return reports


@pytest.mark.parametrize("kind", ["fgsm-rs", "n-fgsm"])
@pytest.mark.parametrize("objective", ["at", "mixed", "trades"])
def test_a_training_is_pythons(tiny_artifact: Make, tmp_path: Path, objective: str, kind: str) -> None:
    artifact = tiny_artifact(objective=objective, training_attack=kind)
    report, _ = by_both(tmp_path, "finetune", artifact, "--data", "digits", *OPTIONS, "--steps", 6)
    assert report["training"]["fell_back"] is None
    assert [line["attack"] for line in board.metrics(tmp_path / "ours")] == 6 * [kind]
    assert f"{objective} with {kind}, or else PGD-3" in board.run("inspect", artifact).stdout


def test_held_out_images_are_watched(tiny_artifact: Make, tmp_path: Path) -> None:
    given = ("--data", "digits", *OPTIONS, "--epochs", 1, "--batch-size", 96, "--validation", 0.1)
    by_both(tmp_path, "finetune", tiny_artifact(training_attack="n-fgsm"), *given)


def begin_before_a_collapse(artifact: Path, data: Path, run: Path) -> None:
    """A run that was looked at once, of which is said that PGD had left nine of ten images right."""
    given = ("finetune", artifact, "--data", data, *OPTIONS, "--steps", 104, "--batch-size", 12)
    assert board.run(*given, "--max-hours", 1e-9, "-o", run).returncode == 75
    read = Artifact.read(run)
    tensors, metadata = read_state(read)
    progress = json.loads(metadata["progress"])
    assert progress["watch"]["step"] == 0
    progress["watch"]["best"] = 0.9
    write_run(run, read, tensors, {**metadata, "progress": json.dumps(progress, sort_keys=True)})


def test_it_falls_back_as_python_does_wherever_it_is_cut(artifact: Path, data: Path, tmp_path: Path) -> None:
    begin_before_a_collapse(artifact, data, tmp_path / "ours")
    for name in ("theirs", "parts", "said"):
        shutil.copytree(tmp_path / "ours", tmp_path / name)
    given = ("finetune", artifact, "--data", data, *OPTIONS, "--learning-rate", 1e-12, "--resume")
    report, _ = by_both(tmp_path, *given)
    assert report["training"]["fell_back"] == 100
    attacks = [line["attack"] for line in board.metrics(tmp_path / "ours")]
    assert attacks == 100 * ["fgsm-rs"] + 4 * ["pgd"]
    saving = ("--save-steps", 1, "--eval-samples", 0, "-o", tmp_path / "parts")
    for seconds in (0.06, 0.12):
        words = [str(board.program()), *map(str, (*given, *saving))]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(words, capture_output=True, check=False, timeout=seconds)  # kills it
        commands.run(*given, *saving, *PYTHON, "--max-hours", 3e-6)
    board.succeed(*given, *saving)
    states = [board.states(tmp_path / name)["state.safetensors"] for name in ("parts", "ours")]
    assert states[0] == states[1]
    said = board.run(*given, "-o", tmp_path / "said")
    assert "fgsm-rs has collapsed: it leaves" in said.stderr and "from step 101 on" in said.stderr
    assert "fgsm-rs collapsed: after step 100 the training attacked with PGD." in said.stdout


@pytest.mark.parametrize("kind", ["fgsm-rs", "n-fgsm"])
def test_steps_of_the_c_interface(tiny_artifact: Make, tmp_path: Path, kind: str) -> None:
    artifact = tiny_artifact(training_attack=kind)
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(16))
    with Network(artifact) as network, Trainer(artifact, engine="native") as trainer:
        assert network.info.attack.decode() == kind
        for _ in range(3):
            assert network.step(x, y).loss == trainer.step(x, y)["loss"]
        state = trainer.state()
        assert all(np.array_equal(network.tensor(name), state[name]) for name in state)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6])
def test_what_the_c_interface_watches(tiny_artifact: Make, tmp_path: Path, share: float) -> None:
    """The images and shares of Python: held-out ones, or others where 24 are too few."""
    artifact = tiny_artifact(training_attack="n-fgsm")
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(60))
    whole = ArrayDataset(x, y)
    kept, held = held_apart(whole, share, 0)
    part = Subset(whole, held if len(held) >= 32 else kept)
    with Network(artifact) as network:
        network.call("save_into", str(tmp_path / "run").encode())
        network.begin(images=60, batch_size=12, validation=share, has_validation=1)
        assert network.position.watch == 1 and network.position.attack == b"n-fgsm"
        places = np.empty(60, np.uint32)
        network.call("watched_places", POINTER(places.ctypes.data), ctypes.c_size_t(60))
        chosen = places[: network.position.watched]
        wanted = (held if len(held) >= 32 else kept)[some_of(part, 128, 0)]
        assert np.array_equal(chosen, wanted)
        with pytest.raises(CError, match="the single-step attack is to be looked at: call edge_bcs_watch"):
            network.train(x[:12], y[:12])
        with pytest.raises(CError, match=f"a look takes {len(chosen)} images, not 3"):
            network.call("watch", batch_of(x[:3], y[:3]), Watched())
        found = Watched()
        network.call("watch", batch_of(x[chosen], y[chosen]), found)
        assert network.position.watch == 0
        with pytest.raises(CError, match="nothing is to be looked at now"):
            network.call("watch", batch_of(x[chosen], y[chosen]), None)
    with Trainer(artifact, engine="native") as trainer:
        assert (found.own, found.pgd) == trainer.watch(Subset(whole, chosen.astype(np.int64)))


def test_a_damaged_watch_is_refused(artifact: Path, data: Path, tmp_path: Path) -> None:
    begin_before_a_collapse(artifact, data, tmp_path / "run")
    read = Artifact.read(tmp_path / "run")
    tensors, metadata = read_state(read)
    progress = json.loads(metadata["progress"])
    for bad in ({"best": 2}, {"more": 1}, {"step": "six"}, {"fell_back": -1}, [1], "none"):
        watch = {**progress["watch"], **bad} if isinstance(bad, dict) else bad
        changed = json.dumps({**progress, "watch": watch}, sort_keys=True)
        write_run(tmp_path / "run", read, tensors, {**metadata, "progress": changed})
        told = pytest.raises(CError, match="the saved position of the training is damaged")
        with Network(tmp_path / "run") as network, told:
            network.begin(images=12, resume=1)
