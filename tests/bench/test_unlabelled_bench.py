"""`make unlabelled`: what of its results is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers.hands import archive

from edge_bcs.bench import hands, unlabelled


def row(draw: int, way: str, clean: float, robust: float) -> dict[str, Any]:
    return {"draw": draw, "way": way, "held_out": {"accuracy": clean, "robust_accuracy": robust}}


def test_the_gain_is_that_of_the_draws_that_have_both() -> None:
    rows = [row(0, "labelled", 0.5, 0.2), row(0, "unlabelled", 0.75, 0.3), row(1, "labelled", 0.7, 0.4),
            row(1, "unlabelled", 0.85, 0.5), row(2, "labelled", 0.9, 0.1)]  # fmt: skip
    found = unlabelled.summary(rows)
    assert found["accuracy"]["labelled"]["draws"] == 3
    assert found["accuracy"]["gain"] == pytest.approx({"mean": 0.2, "deviation": 0.05, "draws": 2})
    assert found["robust_accuracy"]["gain"]["mean"] == pytest.approx(0.1)


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, str]] = []

    class Draw:
        def __init__(self, settings: Any, data: Any, draw: int, draws: int, out: Path) -> None:
            self.draw, self.settings = draw, settings

        def row(self, way: str, choosing: bool, threads: int) -> dict[str, Any]:
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append((self.draw, way))
            return {**row(self.draw, way, 0.5, 0.25), "settings": vars(self.settings)}

    monkeypatch.setattr(unlabelled, "Draw", Draw)
    words = [
        "unlabelled",
        str(tmp_path / "results"),
        "--data",
        str(archive(tmp_path)),
        "--draws",
        "2",
        "--size",
        "8",
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(KeyboardInterrupt):
        unlabelled.main()
    kept = measured.copy()
    measured.clear()
    unlabelled.main()
    assert kept + measured == [(draw, way) for draw in range(2) for way in unlabelled.WAYS]
    content = json.loads((tmp_path / "results" / "efficientnet-lite0.json").read_text())
    assert len(content["rows"]) == 6 and content["summary"]["accuracy"]["gain"]["draws"] == 2


@pytest.mark.slow
def test_a_small_one_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways go on from the same training, through all stages; the other way is measured apart."""
    words = ["unlabelled", str(tmp_path / "results"), "--data", str(archive(tmp_path)), "--out",
             str(tmp_path / "out"), "--network", "resnet18", "--size", "16", "--draws", "1",
             "--labelled", "1", "--first-steps", "2", "--batch-size", "8", "--measured-steps", "1",
             "--confidence", "0.11", "--threads", "1", "--choosing",
             "--stages", "0:1:1:0.001 0.5:1:1:0.001 1:1:2:0.001"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(hands, "GUARD", 0)  # of forty photographs it would leave none
    unlabelled.main()
    content = json.loads((tmp_path / "results" / "resnet18-choosing.json").read_text())
    assert [row["way"] for row in content["rows"]] == list(unlabelled.WAYS)
    assert all("choosing" in row and "held_out" not in row for row in content["rows"])
    assert content["summary"]["robust_accuracy"]["gain"]["draws"] == 1
    done = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("done.json")}
    assert set(done) == {"first"} | {f"{way}-{n}" for way in unlabelled.WAYS for n in range(3)}
    assert len({done[f"{way}-0"]["steps"] for way in unlabelled.WAYS}) == 1
    runs = {path.parent.name: path.parent for path in tmp_path.rglob("done.json")}
    told = {name: read_state(Artifact.read(run))[1]["progress"] for name, run in runs.items()}
    images = {name: json.loads(progress)["samples"] for name, progress in told.items()}
    assert images["all labels-0"] > images["labelled-0"] == images["unlabelled-0"] == 10
    assert done["unlabelled-1"]["unlabelled"]["images"] > 0 and "unlabelled" not in done["labelled-1"]
    manifests = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")}
    objectives = {name: manifest["objective"]["name"] for name, manifest in manifests.items()}
    assert objectives["artifact-first"] == objectives["artifact-stage-0"] == "natural"
    assert objectives["artifact-stage-1"] == objectives["artifact-stage-2"] == "at"
    epsilons = [manifests[f"artifact-stage-{stage}"]["objective"]["epsilon"] for stage in (1, 2)]
    assert epsilons == pytest.approx([1 / 255, 2 / 255])
