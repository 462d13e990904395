"""`make attack-precision`: what a row and the page of rows tell."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from edge_bcs.runtime import Trainer
from edge_bcs.runtime.precision import half_kernels

from edge_bcs.bench import attack_precision
from edge_bcs.bench.attack_precision import Settings, page
from edge_bcs.data.dataset import ArrayDataset


def row(seed: int, precision: str, clean: float, robust: float, **more: Any) -> dict[str, Any]:
    found = {"seed": seed, "precision": precision, "settings": asdict(Settings()), "processor_seconds": 1.5}
    return found | {"accuracy": clean, "robust_accuracy": robust} | more


def test_the_page_sets_the_precisions_beside_the_seeds() -> None:
    rows = [row(0, "f32", 0.5, 0.3, loss={"f32": 2.0, "half": 1.99}), row(0, "half", 0.52, 0.31),
            row(1, "f32", 0.54, 0.32), row(1, "half", 0.52, 0.3), row(2, "f32", 0.9, 0.9)]  # fmt: skip
    lines = page(rows, "## What the rows say\n\nkept\n").splitlines()
    assert "| 0 | f32 | 50.00 | 30.00 | 1.5 | 0.9950 |" in lines
    assert "- clean: f32 52.00 ± 2.83, half 52.00 ± 0.00 over 2 seeds; the means differ by 0.00." in lines
    assert (
        "- under attack: f32 31.00 ± 1.41, half 30.50 ± 0.71 over 2 seeds; the means differ by 0.50." in lines
    )
    assert lines[-1] == "kept"


@pytest.mark.skipif(half_kernels() != 2, reason="no arithmetic in half precision here")
def test_rows_of_a_tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not done again; the losses are those of attacks that differ, on the same network."""
    data, rng = tmp_path / "images.npz", np.random.default_rng(0)
    images: dict[str, Any] = {
        f"x_{part}": rng.integers(0, 256, (64, 3, 8, 8), np.uint8) for part in ("train", "test")
    }
    np.savez(data, **images, y_train=np.arange(64) % 10, y_test=np.arange(64) % 10)
    words = ["bench", str(tmp_path / "results"), "--data", str(data), "--out", str(tmp_path / "out"),
             "--width", "0.125", "--sparsity", "0.5", "--size", "8", "--images", "64", "--epochs", "1",
             "--batch-size", "16", "--attack-steps", "2", "--measured-steps", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "0"])
    attack_precision.main()
    file = tmp_path / "results" / "rows.json"
    first = json.loads(file.read_text())["rows"]
    assert [(one["seed"], one["precision"]) for one in first] == [(0, "f32"), (0, "half")]
    loss = first[0]["loss"]
    assert loss["half"] == pytest.approx(loss["f32"], rel=0.05) and loss["half"] != loss["f32"]
    (run,) = (tmp_path / "out").glob("*/f32-0")
    with Trainer(run, threads=1, engine="native") as trainer:
        before = trainer.state()
        test = ArrayDataset(images["x_test"], np.arange(64) % 10)
        again = attack_precision.reached(trainer, test, attack_precision.attack_of(10))
        assert again == pytest.approx(loss["f32"], rel=1e-6)
        for name in ("coo.index", "coo.value", "dense.value"):
            assert np.array_equal(trainer.state()[name], before[name])
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "0", "1"])
    attack_precision.main()
    rows = json.loads(file.read_text())["rows"]
    assert rows[:2] == first and [one["seed"] for one in rows] == [0, 0, 1, 1]
    monkeypatch.setattr(
        "sys.argv", [*words, "--seeds", "0", "--epochs", "2"]
    )  # other settings, another training
    attack_precision.main()
    longer = json.loads(file.read_text())["rows"][4]
    assert longer["loss"]["f32"] != loss["f32"] and longer["processor_seconds"] is not None
