"""Two processes train one network: the same connectivity to the bit, and the numbers of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, TESTS

from edge_bcs.training.replicas import Replicas

OPTIONS: dict[str, Any] = {"schedule": {"steps": 8}}
"""Of the schedule, as helpers/replica.py reads it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, processes: int, **options: Any) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Train in so many processes as torchrun starts them; return the state that each ended with."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
    }
    arguments = [
        sys.executable,
        str(TESTS / "helpers" / "replica.py"),
        str(folder),
        json.dumps({**OPTIONS, **options}),
    ]
    started = [
        subprocess.Popen(
            arguments,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        # The last one first: the others wait for it if it ends early.
        for process in reversed(started):
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.communicate()
    states = []
    for rank in range(processes):
        with np.load(folder / f"state-{rank}.npz") as stored:
            states.append({name: stored[name] for name in stored.files})
    return states


@pytest.mark.parametrize("objective", ["mixed", pytest.param("rst", marks=pytest.mark.slow)])  # two halves
def test_replicas_agree_and_match_one_process(objective: str, tmp_path: Path) -> None:
    """With frozen statistics the sum over replicas is that of one process, up to rounding."""
    options = {"objective": objective, "batch_norm": "frozen", "hyper": {"learning_rate": 0.02}}
    (alone,) = run(tmp_path / "alone", 1, **options)
    first, second = run(tmp_path / "pair", 2, **options)
    assert all(np.array_equal(buffer, second[name]) for name, buffer in first.items())
    common = np.intersect1d(alone["coo.index"], first["coo.index"])
    # A weight on the edge of zero may die on one side of rounding only.
    assert len(common) >= 0.995 * len(alone["coo.index"])
    values = [dict(zip(state["coo.index"], state["coo.value"], strict=True)) for state in (alone, first)]
    differences = [abs(values[0][position] - values[1][position]) for position in common]
    assert np.quantile(differences, 0.99) < 1e-5
    assert first["dense.value"] == pytest.approx(alone["dense.value"], abs=1e-4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "pair")
    ]
    assert len(lines[1]) == 8  # one process writes
    for one, two in zip(lines[0][:4], lines[1][:4], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["accuracy"] == one["accuracy"]
    reports = [json.loads((tmp_path / "pair" / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0]["best_robust_acc"] == reports[1]["best_robust_acc"]


def test_batch_statistics_are_shared_and_a_training_goes_on(tmp_path: Path) -> None:
    states = run(tmp_path / "run", 2, objective="trades", schedule={"epochs": 2})
    assert all(np.array_equal(buffer, states[1][name]) for name, buffer in states[0].items())
    assert states[0]["batchnorm.mean"].any()
    again = run(tmp_path / "run", 2, objective="trades", schedule={"epochs": 2}, resume=True)
    assert all(np.array_equal(buffer, again[1][name]) for name, buffer in states[0].items())


def test_shares_cover_a_batch() -> None:
    shares = [Replicas(rank, 3).share(5, 15) for rank in range(3)]
    assert shares == [(5, 8), (8, 11), (11, 15)]
