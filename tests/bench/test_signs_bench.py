"""`make signs`: what is trained after what, what of it is kept, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hands import archive

import edge_bcs
from edge_bcs import models
from edge_bcs.bench import signs
from edge_bcs.checkpoint import read_checkpoint

TINY: dict[str, Any] = {"size": 16, "host_epochs": 1, "host_batch": 4, "epochs": 1, "batch": 4, "at_batch": 4}
TINY |= {"measured_steps": 2, "augment": "shift", "stages": "0.5:1:1:0.001 1:1:2:0.001"}


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> signs.Draw:
    """A draw of few small images and of a small network."""
    pytest.importorskip("torch")
    network = models.resnet18(num_classes=10, width=0.0625, input_size=16)

    def sparse(sparsity: float, seed: int) -> Any:
        return edge_bcs.sparsify(network, sparsity, seed=seed)

    for name, small in (("pretrained", sparse), ("untrained", sparse), ("with_head", lambda: None)):
        monkeypatch.setattr(signs, name, small)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 3, 16, 16)).astype(np.uint8), np.arange(40) % 10
    monkeypatch.setattr(signs, "split", lambda *_: (np.arange(12), np.arange(12, 20), np.arange(20, 40)))
    monkeypatch.setattr(signs, "PATIENCE", 1000)
    return signs.Draw(signs.Settings(**TINY), images, labels, 0, 5, tmp_path)


@pytest.mark.slow
def test_the_stages_of_a_draw(draw: signs.Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way begins where the one before ended, and what two have in common is trained once."""
    trained: list[tuple[str, float, int]] = []
    fit = signs.Trainer.fit

    def counted(self: Any, *given: Any, **options: Any) -> Any:
        attack = self.artifact.objective.attack
        trained.append((self.artifact.trained.part.text, round(attack.epsilon * 255, 3), attack.steps))
        return fit(self, *given, **options)

    monkeypatch.setattr(signs.Trainer, "fit", counted)
    natural = draw.row("natural", False, 1)
    assert len(trained) == 1 and natural["held_out"]["samples"] == 20
    assert "robust_accuracy" not in natural["held_out"] and natural["peak_bytes"] <= natural["cap_bytes"]
    robust = draw.row("at", False, 1)
    assert trained[1:] == [("all", 2.0, 1), ("all", 4.0, 2)] and "robust_accuracy" in robust["held_out"]
    assert draw.row("at", True, 1)["choosing"]["samples"] == 8 and len(trained) == 3
    steps = [json.loads((run / "done.json").read_text())["step"] for run in sorted(draw.out.glob("*/run"))]
    assert steps == [3, 3, 3]
    # Its head alone goes on from what all of it learnt.
    draw.row("head at", False, 1)
    assert [part for part, *_ in trained[3:]] == ["head", "head"]


def test_the_dense_network_is_trained_on_the_host_alone(draw: signs.Draw, tmp_path: Path) -> None:
    dense = draw.row("dense natural", False, 1)
    assert dense["held_out"]["samples"] == 20 and "peak_bytes" not in dense
    epochs = [
        json.loads(line) for line in (next(draw.out.iterdir()) / "epochs.jsonl").read_text().splitlines()
    ]
    assert (
        len(epochs) == 2
        and sum(epochs[-1]["connections"].values()) == edge_bcs.load(next(draw.out.iterdir())).size
    )
    signs.write_page(tmp_path, [dense], draw.settings)
    page = (tmp_path / "README.md").read_text()
    assert "| dense natural | none | – | " in page and "| 0 | dense natural | " in page


def test_the_dense_network_teaches_the_sparse_one(draw: signs.Draw) -> None:
    row = draw.row("distilled natural", False, 1)
    assert row["held_out"]["samples"] == 20 and row["peak_bytes"] <= row["cap_bytes"]
    (dense,), (host,) = (list(draw.out.glob(f"host-{start}-*")) for start in ("dense", "distilled"))
    plan = json.loads(read_checkpoint(host / "last.safetensors").metadata["plan"])
    assert plan["teacher"] == edge_bcs.Teacher(edge_bcs.load(dense)).fingerprint
    learnt = edge_bcs.load(host)
    assert learnt.kappa == round(learnt.size * 0.1)
    # The dense network's own row needs nothing more.
    before = (dense / "metrics.jsonl").stat().st_mtime_ns
    draw.row("dense natural", False, 1)
    assert (dense / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_network_that_is_pruned_while_it_learns(draw: signs.Draw) -> None:
    """It begins with all weights, ends on the host with as many as the other way, and the board goes on."""
    row = draw.row("gradual natural", False, 1)
    assert row["held_out"]["samples"] == 20 and row["peak_bytes"] <= row["cap_bytes"]
    host = edge_bcs.load(next(draw.out.glob("host-gradual-*")))
    draw.row("natural", False, 1)
    assert host.kappa == edge_bcs.load(next(draw.out.glob("host-pretrained-*"))).kappa < host.size
    assert signs.WAYS["gradual natural"].clean == signs.WAYS["natural"].clean
    plan = read_checkpoint(next(draw.out.glob("host-gradual-*")) / "last.safetensors").metadata["plan"]
    assert json.loads(plan)["gradual_sparsity"] == "0.9"


def test_a_training_at_chance_ends(draw: signs.Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "PATIENCE", 2)
    monkeypatch.setattr(signs, "CLASSES", 1)  # so that nothing is better than chance
    row = draw.row("natural", False, 1)
    assert "held_out" not in row and "up to 2: by chance" in row["collapsed"]
    assert signs.told(row).startswith("collapsed, ")
    watch = signs.Watch()
    monkeypatch.setattr(signs, "CLASSES", 10)
    for accuracy in (0.0, 0.3, 0.1, 0.2):
        watch({"robust_accuracy": accuracy, "step": 1})
    with pytest.raises(signs.CollapsedError):
        watch({"robust_accuracy": 0.0, "step": 5})


def test_pair_by_pair_and_draw_by_draw() -> None:
    names = ["head natural", "at", "natural"]
    found = list(signs.order(names, range(2)))
    assert found == [
        (0, "natural"),
        (0, "at"),
        (1, "natural"),
        (1, "at"),
        (0, "head natural"),
        (1, "head natural"),
    ]


def row(draw: int, way: str, clean: float, robust: float) -> dict[str, Any]:
    return {"draw": draw, "way": way, "held_out": {"accuracy": clean, "robust_accuracy": robust},
            "peak_bytes": 40 << 20, "cap_bytes": 48 << 20, "settings": vars(signs.Settings())}  # fmt: skip


def test_what_was_measured_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, str]] = []

    class Draw:
        def __init__(self, settings: Any, images: Any, labels: Any, draw: int, draws: int, out: Path) -> None:
            self.draw = draw

        def row(self, way: str, choosing: bool, threads: int) -> dict[str, Any]:
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append((self.draw, way))
            return row(self.draw, way, 0.9 - self.draw / 10, 0.5)

    monkeypatch.setattr(signs, "Draw", Draw)
    words = ["signs", str(tmp_path / "r"), "--data", str(archive(tmp_path)), "--draws", "2", "--size", "128"]
    monkeypatch.setattr("sys.argv", [*words, "--ways", "natural", "at"])
    with pytest.raises(KeyboardInterrupt):
        signs.main()
    kept = measured.copy()
    measured.clear()
    signs.main()
    assert kept + measured == [(0, "natural"), (0, "at"), (1, "natural"), (1, "at")]
    page = tmp_path / "r" / "README.md"
    page.write_text(page.read_text() + "## What the rows say\n\nThis.\n")
    (tmp_path / "r" / "signs.png").unlink()
    signs.write_page(
        tmp_path / "r", json.loads((tmp_path / "r" / "rows.json").read_text())["rows"], signs.Settings()
    )
    assert page.read_text().endswith("\n\n## What the rows say\n\nThis.\n")
    content = json.loads((tmp_path / "r" / "rows.json").read_text())
    assert content["summary"]["at"]["accuracy"] == pytest.approx(
        {"mean": 0.85, "deviation": 0.05, "draws": 2}
    )
    assert "| natural | all | 48 | 85.0 ± 5.0 (≥ 97 missed by 12.0) |" in page.read_text()
    assert "50.0 ± 0.0 (≥ 60 missed by 10.0)" in page.read_text()
    assert (tmp_path / "r" / "signs.png").exists()
