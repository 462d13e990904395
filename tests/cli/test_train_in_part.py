"""Training in part on the command line: export, inspect, simulate, finetune, and export again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edge_bcs.runtime.artifact import Artifact
from helpers import commands


def run(*words: Any, fails: bool = False) -> str:
    result = commands.run(*words)
    assert (result.exit_code != 0) == fails, result.output
    return result.output


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    network = ("--model", "resnet18", "--width", "0.0625", "--input-size", "16", "--sparsity", "0.9")
    trained = ("--train", "last:2", "--objective", "natural", "--batch-size", "8", "--micro-batch", "4")
    said = run("export", *network, *trained, "--memory", "1MiB", "--no-validate", "-o", path)
    assert "batch norm frozen" in said and "last:2: " in said
    return path


def test_a_part_is_shown_trained_and_exported_again(artifact: Path, tmp_path: Path) -> None:
    shown = run("inspect", artifact)
    assert "learns" in shown and "last:2: " in shown
    assert json.loads(run("inspect", artifact, "--json"))["train"]["part"] == "last:2"
    read = Artifact.read(artifact)
    answer = json.loads(run("simulate", artifact, "--no-run", "--json", "-"))
    assert (answer["train"], answer["predicted_peak_bytes"]) == ("last:2", read.predicted_peak_bytes)
    assert answer["untrained_bytes"] == read.untrained_bytes > 0
    # What training needs is less than an attack would.
    cap, steps = read.predicted_peak_bytes, ("--steps", "2", "--no-augment", "--eval-samples", "8")
    said = run("finetune", artifact, "--data", "digits", *steps, "--memory", cap, "-o", tmp_path / "run")
    assert said.count("Robust accuracy is not measured") == 1 and f"--memory {read.attack_bytes}" in said
    said = run("evaluate", artifact, "--data", "digits", "--limit", "4", "--memory", cap, fails=True)
    assert "memory budget exceeded" in said
    run("evaluate", artifact, "--data", "digits", "--limit", "4", "--memory", read.attack_bytes)
    again = ("--train", "all", "--no-validate", "--micro-batch", "4", "-o", tmp_path / "all")
    run("export", "--checkpoint", tmp_path / "run", *again)
    assert Artifact.read(tmp_path / "all").trained.part.everything


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train", "first"), "what is trained is all, head, last:N"),
        (("--train", "last:99"), "last:99 are more layers than the 21 with weights"),
        (("--train", "head", "--batch-norm", "batch"), "take --batch-norm frozen"),
    ],
)
def test_a_part_that_is_none_is_one_sentence(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    said = run("export", "--model", "resnet18", "--width", "0.0625", *words, "-o", tmp_path / "a", fails=True)
    assert message in " ".join(said.split()) and "Traceback" not in said
