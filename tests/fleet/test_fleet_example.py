"""examples/fleet.py: how it deals images out, and the whole of it, shortened."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "fleet.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("fleet_example", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_image_goes_to_one_board(example: ModuleType) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    for alpha in (0.1, 100.0):
        dealt = example.dealt(labels, 3, alpha, 1)
        assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(2000))
        counts = np.array([np.bincount(labels[places], minlength=10) for places in dealt])
        largest = (counts.max(axis=0) / counts.sum(axis=0)).mean()
        assert largest > 0.8 if alpha < 1 else largest < 0.5


def test_boards_together_and_alone(example: ModuleType, tmp_path: Path) -> None:
    words = ["--boards", "2", "--rounds", "1", "--steps", "1", "--attack-steps", "1", "--alpha", "5"]
    result = CliRunner().invoke(example.main, [*words, "-o", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and "together, round 1" in result.output, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (len(report["rounds"]), len(report["alone"])) == (1, 2)
    assert all(0 < one["overlap"] <= 1 and one["samples"] == 359 for one in report["rounds"])
