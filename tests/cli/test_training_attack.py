"""Single-step attacks on the command line: train, export, inspect, finetune; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from helpers import commands
from helpers.training_commands import SMALL, write_digits

NETWORK = ("--model", "resnet18", *SMALL)


def run(*words: Any, fails: bool = False) -> str:
    result = commands.run(*words)
    assert (result.exit_code != 0) == fails, result.output
    return str(result.output)


def test_a_training_and_a_fine_tuning_that_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watch(self: Trainer, data: Any, on_batch: Any = None) -> tuple[float, float]:
        seen.append(self.steps)
        return (0.5, 0.5) if len(seen) % 2 else (0.9, 0.0)

    monkeypatch.setattr(Trainer, "watch", watch)
    write_digits(data := tmp_path / "digits.npz")
    common = ("--data", data, "--batch-size", 16)
    trained = run(
        *("train", *NETWORK, *common, "--training-attack", "n-fgsm", "--engine", "sparse", "--epochs", 1),
        *("-o", tmp_path / "trained"),
    )
    steps = seen[-1]
    assert f"n-fgsm collapsed: PGD took its place after step {steps}" in " ".join(trained.split())
    exported = ("--no-validate", "--micro-batch", 4, "--batch-size", 16, "--training-attack", "fgsm-rs")
    run("export", "--checkpoint", tmp_path / "trained", *exported, "--attack-steps", 2, "-o", tmp_path / "a")
    assert Artifact.read(tmp_path / "a").objective.attack.kind == "fgsm-rs"
    shown = " ".join(run("inspect", tmp_path / "a").split())
    assert "at with fgsm-rs, or else PGD-2, ε = 8/255" in shown
    said = run("finetune", tmp_path / "a", "--data", data, "--no-augment", "-o", tmp_path / "run")
    first = json.loads((tmp_path / "run" / "report.json").read_text())["training"]["fell_back"]
    assert f"fgsm-rs collapsed: after step {first} the training attacked with PGD." in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--training-attack", "fgsm"), "Invalid value for '--training-attack'"),
        (("--training-attack", "n-fgsm", "--objective", "natural"), "natural training attacks nothing"),
    ],
)
@pytest.mark.parametrize("command", ["train", "export"])
def test_what_cannot_be(command: str, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    data = ("--data", "digits") if command == "train" else ()
    said = run(command, *NETWORK, *words, *data, "-o", tmp_path / "out", fails=True)
    assert message in " ".join(said.split()) and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_pgd_from_needs_a_single_step(tmp_path: Path) -> None:
    words = ("train", *NETWORK, "--data", "digits", "--pgd-from", 0.8, "-o", tmp_path / "out")
    assert "pgd attacks from the first step" in " ".join(run(*words, fails=True).split())


def test_a_microcontroller_is_given_none(tmp_path: Path) -> None:
    options = ("--training-attack", "n-fgsm", "--no-validate", "--target", "stm32h7", "-o", tmp_path / "a")
    said = " ".join(run("export", *NETWORK, *options, fails=True).split())
    assert "a microcontroller cannot watch n-fgsm: export it with --training-attack pgd" in said
