"""`make unlabelled`: what of its results is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.hands import archive

from edge_bcs.bench import unlabelled


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

        def row(self, way: str, threads: int) -> dict[str, Any]:
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
    assert kept + measured == [(0, "labelled"), (0, "unlabelled"), (1, "labelled"), (1, "unlabelled")]
    content = json.loads((tmp_path / "results" / "efficientnet-lite0.json").read_text())
    assert len(content["rows"]) == 4 and content["summary"]["accuracy"]["gain"]["draws"] == 2
