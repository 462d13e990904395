"""What edge-bcs-run takes: bytes of its file, and memory of its process beside the arena."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import board_program as board

from edge_bcs.bench.resident import watched

LARGEST = {"x86_64": 6_000_000, "aarch64": 4_000_000}
"""Bytes of the program without its symbols."""
MOST_BESIDE = 7 << 19
"""Bytes of a whole process beside its arena."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="edge-bcs-run is for Linux")


@pytest.fixture
def static_program(tmp_path: Path) -> Path:
    """The program as it is copied to a board: static, without symbols."""
    if shutil.which("strip") is None or platform.machine() not in LARGEST:
        pytest.skip("sizes are those of 64-bit x86 and ARM, without symbols")
    stripped = tmp_path / "edge-bcs-run"
    subprocess.run(["strip", "-o", stripped, board.program()], check=True)
    if b"/ld-linux" in stripped.read_bytes()[:4096]:
        pytest.skip("edge-bcs-run is linked against shared libraries here")
    return stripped


@linux
def test_the_program_is_small_with_all_instruction_sets(static_program: Path) -> None:
    assert static_program.stat().st_size <= LARGEST[platform.machine()]


@linux
def test_a_process_takes_little_beside_its_arena(
    static_program: Path, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """By the kernel's mark: measurements, steps enough for a look in time, and what opening took."""
    options = (
        "--data",
        "digits",
        "--steps",
        "300",
        "--eval-samples",
        "8",
        "--eval-steps",
        "2",
        "--threads",
        "1",
    )
    artifact = tiny_artifact()
    arena = json.loads((artifact / "manifest.json").read_text())["memory"]["predicted_peak_bytes"]
    _, highest = watched((static_program, "finetune", artifact, *options, "-o", tmp_path / "run"))
    assert arena < highest <= arena + MOST_BESIDE
