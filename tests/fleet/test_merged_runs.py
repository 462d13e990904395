"""A merged run is a run: trained, evaluated, exported and merged again like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.state import read_state
from helpers.artifacts import tiny_network
from helpers.commands import run

import edge_bcs
from edge_bcs.core.metadata import images_seen
from edge_bcs.core.state import STATE_NAMES
from edge_bcs.fleet.merging import merge

Make = Callable[..., Path]
FITTING = ("--no-augment", "--eval-samples", 0, "--batch-size", 16)


def seen(folder: Path) -> int | None:
    return images_seen(read_state(Artifact.read(folder))[1])


def test_three_boards(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    artifact = tiny_artifact()
    boards = [tmp_path / name for name in "abc"]
    for number, board in enumerate(boards):
        steps = ("--steps", number + 1, "--seed", 5, *FITTING)
        result = run("finetune", artifact, "--data", digits, "-o", board, *steps)
        assert result.exit_code == 0, result.output
    merged, again = tmp_path / "merged", tmp_path / "again"
    assert run("merge", *boards, "-o", merged).exit_code == 0
    states = [read_state(Artifact.read(board))[0] for board in boards]
    found, metadata = read_state(Artifact.read(merged))
    assert len(found["coo.index"]) == len(np.unique(found["coo.index"])) == Artifact.read(artifact).kappa
    union = np.unique(np.concatenate([state["coo.index"] for state in states]))
    assert set(found["coo.index"].tolist()) <= set(union.tolist())
    weights = np.array([1, 2, 3]) / 6
    expected = sum(n * state["dense.value"].astype(float) for n, state in zip(weights, states, strict=True))
    assert found["dense.value"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (metadata["step"], metadata["seed"], metadata["images"]) == ("3", "5", "96")
    # It learns on, as a new training that counts from its step.
    result = run("finetune", merged, "--data", digits, "-o", again, "--steps", 2, *FITTING)
    assert result.exit_code == 0, result.output
    assert read_state(Artifact.read(again))[1]["step"] == "5" and seen(again) == 32
    assert run("evaluate", merged, "--data", digits, "--attack", "fgsm").exit_code == 0
    # Back in torch, and compiled anew for another board.
    loaded = edge_bcs.load(merged, tiny_network())
    assert all(np.array_equal(loaded.state()[name], found[name]) for name in STATE_NAMES)
    other = tmp_path / "other"
    memory = edge_bcs.Memory(micro_batch=2)
    edge_bcs.export(loaded, other, input_shape=(1, 8, 8), memory=memory, validate=False)
    assert np.array_equal(read_state(Artifact.read(other))[0]["coo.value"], found["coo.value"])
    merge([merged, again], tmp_path / "tree")


def test_a_run_says_how_many_images_its_training_saw(tiny_artifact: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 1, 8, 8), np.float32), rng.integers(0, 10, 10)
    with Trainer(tiny_artifact()) as trainer:
        trainer.step(x, y)
        trainer.step(x[:3], y[:3])
        assert trainer.images == 13
        x[0, 0, 0, 0] = np.nan
        with pytest.raises(NotFiniteError):
            trainer.step(x, y)
        trainer.fit((x[1:], y[1:]), epochs=2, batch_size=4, progress=False, save=tmp_path / "run")
        assert trainer.images == 13 + 2 * 9
    assert seen(tmp_path / "run") == 31
    with Trainer(tmp_path / "run") as trainer:
        assert trainer.images == 0  # a new training
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.images == 31


def test_a_run_that_is_resumed_has_seen_as_much_as_one_that_was_not(
    tiny_artifact: Make, digits: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("finetune", tiny_artifact(), "--data", digits, *FITTING)
    assert run(*arguments, "-o", whole, "--steps", 3).exit_code == 0
    assert run(*arguments, "-o", cut, "--steps", 2).exit_code == 0
    assert run(*arguments, "-o", cut, "--steps", 3, "--resume").exit_code == 0
    assert seen(whole) == seen(cut) == 48
