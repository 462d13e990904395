"""What the tests of commands that train share: a small network, and digits to train it on."""

# mypy: disable-error-code="arg-type, assignment, call-overload"

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SMALL = ("--width", 0.0625, "--input-size", 8, "--channels", 1, "--sparsity", 0.8, "--attack-steps", 1)


def write_digits(file: Path) -> None:
    import numpy as np

    from edge_bcs.data import open_data

    parts = {kind: open_data("digits", kind, (1, 8, 8)) for kind in ("train", "test")}
    arrays = {}
    for kind, data in parts.items():
        arrays[f"x_{kind}"], arrays[f"y_{kind}"] = data.read(np.arange(64))
    np.savez(file, **arrays)


def commands_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run in this process what a bench runs by subprocess.run, the trainings with a network for the digits;
    return the words of each command, as they come."""
    from helpers.commands import run

    asked: list[list[str]] = []

    class Done:
        def __init__(self, arguments: list[str], **_: Any) -> None:
            words = arguments[3:]
            asked.append(words)
            if words[0] == "train":
                words = [*words, "--channels", "1", "--sparsity", "0.8", "--attack-steps", "2"]
            result = run(*words)
            self.returncode, self.stdout = result.exit_code, result.stdout
            assert not self.returncode, result.output

    monkeypatch.setattr("subprocess.run", Done)
    return asked
