"""A run that changes its engine between kills equals an unbroken one, to the bit: `make test-kills`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import board_program as board
from helpers import commands, kills

Make = Callable[..., Path]


def killed(artifact: Path, folder: Path, times: int, steps: int, program: Path | None) -> None:
    """Kill a training so often; the last word has ONNX Runtime."""
    given = (
        "finetune",
        artifact,
        *kills.OPTIONS,
        "--steps",
        steps,
        "--save-steps",
        1,
        "-o",
        folder / "whole",
    )
    commands.succeed(*given, "--engine", "native")
    words = [
        sys.executable,
        kills.__file__,
        artifact,
        folder / "parts",
        times,
        steps,
        *([program] if program else []),
    ]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["kills"]
    print(f"killed {found} of {times}, {steps} steps")
    assert sum(found.values()) == times and len(found) == (3 if program else 2)
    parts, whole = folder / "parts", folder / "whole"
    assert board.states(parts)["state.safetensors"] == board.states(whole)["state.safetensors"]
    lines = [[line | {"peak_bytes": 0} for line in board.metrics(run)] for run in (parts, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == steps


def test_engines_take_turns_between_kills(tiny_artifact: Make, tmp_path: Path) -> None:
    killed(tiny_artifact(batch_norm="batch"), tmp_path, 4, 60, None)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_a_hundred_kills_between_three_engines(tiny_artifact: Make, tmp_path: Path, batch_norm: str) -> None:
    killed(tiny_artifact(batch_norm=batch_norm), tmp_path, 100, 3000, board.program())
