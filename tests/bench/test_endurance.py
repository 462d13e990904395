"""The short version of `make endurance`, and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer

from edge_bcs.bench import endurance
from edge_bcs.core.errors import EdgeBcsError

Make = Callable[..., Path]


@pytest.mark.slow
def test_many_steps_drift_nowhere(tiny_artifact: Make, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_bcs.bench.endurance", "--artifact", str(tiny_artifact())]
    command += ["--steps", "20000", "--training-steps", "300", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "endurance.json").read_text())
    rewiring, training = result["rewiring"], result["training"]
    assert rewiring["checks"] == 100 and rewiring["replaced_per_step"] > 1
    assert rewiring["first_connections_left"] < 300  # of 364
    assert rewiring["growth_bytes"] < 1 << 20 and rewiring["budget_growth_bytes"] == 0
    assert training["saves"] == 30 and training["budget_growth_bytes"] == 0
    assert "| steps | 20,000 | 300 |" in (tmp_path / "README.md").read_text()


def test_a_step_that_is_off_by_a_bit_is_noticed(tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.run_optimizer_only

    def off(self: Trainer) -> None:
        real(self)
        value = self.buffers["coo.value"]
        value[7] = np.nextafter(value[7], np.float32(1))

    monkeypatch.setattr(Trainer, "run_optimizer_only", off)
    with pytest.raises(EdgeBcsError, match=r"after step 1, coo\.value is not that of the reference"):
        endurance.rewire(tiny_artifact(), 5)


def test_growth_of_memory_is_noticed() -> None:
    def readings(grown: int, counted: int) -> list[dict[str, int]]:
        return [
            {"step": step, "private_bytes": 10**8 + step * grown, "budget_bytes": 1000 + step * counted}
            for step in range(101)
        ]

    found = endurance.growth_of(readings(1000, 0))
    assert found["growth_bytes"] == 90 * 1000 and found["largest_rise_bytes"] == 1000
    assert found["readings_that_rose"] == found["readings"] == 90
    for grown, counted in ((20_000, 0), (0, 1)):
        with pytest.raises(EdgeBcsError, match="memory grew"):
            endurance.growth_of(readings(grown, counted))


def test_connections_that_drift_are_noticed() -> None:
    value = np.ones(3, np.float32)
    state: dict[str, Any] = {"coo.value": value, "coo.momentum": value, "coo.index": np.array([0, 4, 4])}
    with pytest.raises(EdgeBcsError):
        endurance.check_connections(state, 3, 9)
    state["coo.index"] = np.array([0, 4, 5])
    endurance.check_connections(state, 3, 9)
    with pytest.raises(EdgeBcsError, match="3 connections instead of 4"):
        endurance.check_connections(state, 4, 9)
