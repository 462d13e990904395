"""`make training-attacks`: a row for each attack, kept when it is whole; what is there is not done again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from helpers.training_commands import commands_in_this_process, write_digits

from edge_bcs.bench import training_attacks
from edge_bcs.bench.training_attacks import main, step_seconds


def test_rows_of_a_tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, on digits, by the commands themselves."""
    asked = commands_in_this_process(monkeypatch)
    monkeypatch.setattr(
        training_attacks, "step_seconds", lambda *_: {"pgd": 0.4, "fgsm-rs": 0.1, "n-fgsm": 0.08}
    )
    write_digits(tmp_path / "digits.npz")
    common = [
        "bench",
        str(tmp_path / "results"),
        "--data",
        str(tmp_path / "digits.npz"),
        "--out",
        str(tmp_path / "out"),
    ]
    small = [
        "--epochs",
        "1",
        "--width",
        "0.0625",
        "--size",
        "8",
        "--batch-size",
        "16",
        "--few",
        "8",
        "--fewer",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", [*common, *small, "--kinds", "n-fgsm"])
    main()
    assert [words[0] for words in asked] == ["train", "export", "evaluate", "evaluate"]
    (row,) = json.loads((tmp_path / "results" / "rows.json").read_text())["rows"]
    assert (row["kind"], row["seed"], row["fell_back"], row["pgd50"]["samples"]) == ("n-fgsm", 0, None, 8)
    readme = tmp_path / "results" / "README.md"
    readme.write_text(readme.read_text() + "\nMine.\n")
    main()
    assert len(asked) == 4  # a row that is there stays
    shown = f"{100 * row['pgd20']['robust_accuracy']:.1f} %"
    line = next(line for line in readme.read_text().splitlines() if line.startswith("| n-fgsm"))
    assert shown in line and line.endswith("| – | 0.20 × PGD-10's | no |")
    (tmp_path / "results" / "rows.json").unlink()
    main()
    assert len(asked) == 4 and readme.read_text().endswith(
        "\nMine.\n"
    )  # nor is what was trained and measured


def test_the_attacks_are_timed_in_turn(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_bcs.runtime import Trainer

    kinds: list[str] = []
    step = Trainer.step

    def noting(self: Trainer, x: Any, y: Any) -> Any:
        kinds.append(self.attack.kind)
        return step(self, x, y)

    monkeypatch.setattr(Trainer, "step", noting)
    found = step_seconds(tiny_artifact(), 8, 2, 1)
    assert kinds == ["pgd", "fgsm-rs", "n-fgsm"] * 3
    assert set(found) == {"pgd", "fgsm-rs", "n-fgsm"} and min(found.values()) > 0
