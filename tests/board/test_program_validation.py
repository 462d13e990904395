"""edge-bcs-run with --validation and --patience: the runs of Python, whatever cuts them off."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import board_program as board
from helpers import commands

Make = Callable[..., Path]
OPTIONS = ("--threads", 1, "--eval-samples", 8, "--eval-steps", 1, "--max-writes", "none", "--save-steps", 3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images that a tiny network does not learn, so that its best epoch is not its last; uneven classes."""
    draws = np.random.default_rng(5)
    images = draws.integers(0, 256, (60, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=draws.integers(0, 10, 60) // 2)
    return tmp_path / "images.npz"


@pytest.mark.parametrize("objective", ["at", "natural"])
def test_a_training_ends_with_its_best_epoch_as_in_python(
    tiny_artifact: Make, data: Path, tmp_path: Path, objective: str
) -> None:
    given: tuple[object, ...] = (
        "finetune",
        tiny_artifact(objective=objective),
        "--data",
        data,
        *OPTIONS,
        "--balance",
        "--epochs",
        8,
    )
    given += ("--validation", 0.25, "--patience", 2, "--batch-size", 8, "--learning-rate", 0.05)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    report, wanted = (
        board.succeed(*given, "-o", ours),
        commands.succeed(*given, "-o", theirs, "--engine", "native"),
    )
    assert "state.best.safetensors" in board.states(ours)
    assert board.states(ours) == board.states(theirs)
    assert board.metrics(ours) == board.metrics(theirs)
    assert report["training"]["best"]["step"] < report["training"]["done"]
    assert report["training"]["early"] == wanted["training"]["early"]
    del report["run"], wanted["run"]
    assert board.timeless(report) == board.timeless(wanted)
    assert list(report["training"]) == list(wanted["training"])
    shown = board.run(*given, "-o", tmp_path / "again")
    assert f"The best epoch ended with step {report['training']['best']['step']}: " in shown.stdout
    assert "epoch 1: " in shown.stderr and "on 14 held-out images, the best so far" in shown.stderr


def test_a_training_that_is_killed_ends_with_the_same_best_epoch(
    tiny_artifact: Make, data: Path, tmp_path: Path
) -> None:
    """In turns with Python; each goes on with what the other left, kills fall anywhere."""
    given: tuple[object, ...] = ("finetune", tiny_artifact(), "--data", data, *OPTIONS, "--epochs", 40)
    given += ("--validation", 0.25)
    given += ("--batch-size", 8, "--learning-rate", 0.05)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    board.succeed(*given, "-o", whole)
    draws = np.random.default_rng(2)
    for attempt in range(6):
        words = [str(board.program()), *map(str, given), "-o", str(parts), "--resume"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(float(draws.uniform(0.01, 0.15)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if attempt % 3 == 2 else signal.SIGKILL)
            process.wait()
        if attempt % 3 == 1:
            done = commands.run(*given, "-o", parts, "--resume", "--engine", "native", "--max-hours", 1e-5)
            assert done.exit_code in (0, 75), done.output
    board.succeed(*given, "-o", parts, "--resume")
    names = ("state.safetensors", "state.best.safetensors")
    assert all(board.states(parts)[name] == board.states(whole)[name] for name in names)
    assert board.metrics(parts) == board.metrics(whole)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--patience", 2), "patience needs images that are held out"),
        (("--validation", 0.001), "60 images are too few to hold 0.001 of them out"),
        (("--validation", 0.999), "60 images are too few to hold 0.999 of them out"),
    ],
)
def test_what_cannot_be_held_out_is_refused_as_by_python(
    tiny_artifact: Make, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    draws = np.random.default_rng(5)
    images = draws.integers(0, 256, (60, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, y_train=np.arange(60) % 10)
    given = ("finetune", tiny_artifact(), "--data", tmp_path / "images.npz", *OPTIONS, "--eval-samples", 0)
    for program in (board.refused, lambda *words: commands.run(*words).output):
        told = program(*given, *options, "-o", tmp_path / f"run{hash(program)}")
        assert " ".join(told.split()).find(sentence) >= 0


def test_a_run_keeps_the_share_that_it_began_with(tiny_artifact: Make, data: Path, tmp_path: Path) -> None:
    given = ("finetune", tiny_artifact(), "--data", data, *OPTIONS, "-o", tmp_path / "run")
    board.succeed(*given, "--epochs", 1, "--validation", 0.25)
    told = board.refused(*given, "--epochs", 2, "--resume", "--validation", 0.5)
    assert "holds 0.25 of its images out, not 0.5; resume it with the same share" in told
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    board.succeed(*given, "--epochs", 2, "--resume")
    after = json.loads((tmp_path / "run" / "report.json").read_text())
    assert after["training"]["done"] == 2 * report["training"]["done"]
    assert board.run(*given, "--resume", "--validation", 1).returncode == 2
