"""A process that is killed without warning, again and again, ends where one that was left alone ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state

Make = Callable[..., Path]
STEPS = 250
PROGRAM = f"""
import sys
import time
from pathlib import Path
from edge_bcs.data import open_data
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.runtime import Trainer
artifact, run = sys.argv[1:3]
pause = float(sys.argv[3])  # seconds after each step, so that a fast machine is not done before it is killed
try:
    trainer = Trainer.resume(run, threads=1)
except EdgeBcsError:  # killed before the first save
    trainer = Trainer(artifact, threads=1)
with trainer:
    data = open_data("digits", "train", (1, 8, 8))
    saving = dict(save=run, save_steps=1, max_writes=None)
    trainer.fit(
        data, steps={STEPS}, batch_size=4, progress=False, on_step=lambda _: time.sleep(pause), **saving
    )
"""


def saved_at(file: Path) -> int:
    """When the file was written; 0 if there is none, as between the two renames of a save."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_killed_at_any_moment_the_run_ends_the_same(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = tiny_artifact(batch_norm="batch")

    def start(run: str, pause: float = 0.0) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, artifact, tmp_path / run, str(pause)])

    assert start("whole").wait(timeout=120) == 0
    random = np.random.default_rng(0)
    # At any moment from the start of the process on: loading, making the folder, the first saves.
    for seconds in (*random.uniform(0.2, 1.2, 2), 0.7):
        process = start("cut", pause=0.02)
        time.sleep(seconds)
        process.kill()
        process.wait(timeout=60)
    state_file = tmp_path / "cut" / "state.safetensors"
    kills = 0
    for _ in range(6):
        process = start("cut", pause=0.02)
        seen = saved_at(state_file)
        # Wait until it saves, so that every kill lands in a training that saves after each step.
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if saved_at(state_file) not in (0, seen):
                break
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
        if process.returncode == 0:
            break
    assert kills >= 3
    assert start("cut").wait(timeout=120) == 0
    states = [read_state(Artifact.read(tmp_path / run)) for run in ("whole", "cut")]
    assert states[0][1] == states[1][1] and int(states[0][1]["step"]) == STEPS
    for name, expected in states[0][0].items():
        np.testing.assert_array_equal(states[1][0][name], expected)
