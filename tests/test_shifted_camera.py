"""examples/shifted_camera.py: what its camera does to an image, and the whole of it on digits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "shifted_camera.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shifted_camera", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_camera_tints_flattens_blurs_and_adds_noise(example: ModuleType) -> None:
    images = np.full((8, 3, 32, 32), 0.5, np.float32)
    images[:, :, 16:] = 0.9  # an edge between two even halves
    seen = example.seen_by_the_camera(images, seed=0)
    assert seen.dtype == np.float32 and seen.min() >= 0 and seen.max() <= 1
    # Far from the edge: 0.5 + 0.75·(0.5·1.10 − 0.5) in red, 0.5 + 0.75·(0.5·0.80 − 0.5) in blue.
    red, _, blue = seen[:, :, :8].mean(axis=(0, 2, 3))
    assert red == pytest.approx(0.5375, abs=2e-3) and blue == pytest.approx(0.425, abs=2e-3)
    assert seen[:, 0, :8].std() == pytest.approx(0.03, rel=0.1)
    rows = seen[:, 0].mean(axis=(0, 2))  # the edge is no longer one of a single row
    assert rows[15] - rows[8] > 0.02 and rows[24] - rows[16] > 0.02


def test_the_camera_sees_what_the_network_takes(example: ModuleType) -> None:
    training, held_out, names = example.camera_images("digits", (3, 16, 16), seed=0)
    assert training.images([0]).shape == held_out.images([0]).shape == (1, 3, 16, 16)
    assert held_out.classes == tuple(names[label] for label in example.CLASSES)


@pytest.mark.slow
def test_the_example_runs_inside_its_budget(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    import edge_bcs
    from edge_bcs.models import resnet18

    torch.manual_seed(0)  # which draws the biases, whatever ran before
    names = ["none", "plain, --augment photo", "robust (AT, PGD-10), ε = 2/255"]
    monkeypatch.setattr(example, "WAYS", {name: example.WAYS[name] for name in names})
    sparse = edge_bcs.sparsify(resnet18(width=0.125), "0.95", seed=0)
    edge_bcs.export(sparse, tmp_path / "artifact", validate=False, memory="2MiB")
    arguments = [str(tmp_path / "artifact"), "--data", "digits", "--epochs", "1", "--attack-steps", "2"]
    arguments += ["--corrupted", "4"]
    arguments += ["--memory", "2MiB", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "robust (AT, PGD-10)" in result.output
    assert "corrupted" in result.output
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["fine_tuning"] for row in rows] == names
    for row in rows:
        shares = np.array(list(row["corruptions"].values()))
        assert shares.shape == (14, 5) and row["mean_corruption_acc"] == pytest.approx(shares.mean())
    assert all(row["peak_bytes"] <= 2 << 20 and row["samples"] > 15 for row in rows)
    assert rows[1]["accuracy"] != rows[0]["accuracy"]
