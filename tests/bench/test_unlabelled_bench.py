"""`make unlabelled`: whose hands are in which part, and what of its results is kept."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.bench import unlabelled
from edge_bcs.core.errors import EdgeBcsError


def test_no_hand_is_in_two_parts() -> None:
    """Each part is one range of numbers (the first goes on after the last), ten photographs from the next."""
    count, draws = 1641, 5
    measured = np.zeros(count, int)
    for draw in range(draws):
        parts = unlabelled.split(count, draw, draws)
        assert sum(len(part) for part in parts) == count - 6 * unlabelled.GUARD
        for one in parts:
            assert set(np.diff(one)) <= {1, 1 - count}
            for other in parts:
                apart = np.abs(one[:, None] - other)
                assert one is other or np.minimum(apart, count - apart).min() > 2 * unlabelled.GUARD
        assert [len(part) for part in parts[1:]] == [144, 472]
        measured[parts[2]] += 1
    assert measured.max() == 2 and (measured > 0).mean() > 0.95


def test_a_few_of_each_class_keep_their_labels() -> None:
    labels, places = np.arange(200) % 10, np.arange(50, 200)
    few, others = unlabelled.few_of_each(labels, places, 3, draw=0)
    assert np.bincount(labels[few]).tolist() == [3] * 10 and few.min() >= 50
    assert sorted([*few, *others]) == places.tolist()
    assert few.tolist() != unlabelled.few_of_each(labels, places, 3, draw=1)[0].tolist()


def row(draw: int, way: str, clean: float, robust: float) -> dict[str, Any]:
    return {"draw": draw, "way": way, "held_out": {"accuracy": clean, "robust_accuracy": robust}}


def test_the_gain_is_that_of_the_draws_that_have_both() -> None:
    rows = [row(0, "labelled", 0.5, 0.2), row(0, "unlabelled", 0.75, 0.3), row(1, "labelled", 0.7, 0.4),
            row(1, "unlabelled", 0.85, 0.5), row(2, "labelled", 0.9, 0.1)]  # fmt: skip
    found = unlabelled.summary(rows)
    assert found["accuracy"]["labelled"]["draws"] == 3
    assert found["accuracy"]["gain"] == pytest.approx({"mean": 0.2, "deviation": 0.05, "draws": 2})
    assert found["robust_accuracy"]["gain"]["mean"] == pytest.approx(0.1)


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Forty photographs, whose order in the archive is not that of their numbers."""
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "signs.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for number in reversed(range(40)):
            stream = io.BytesIO()
            image.new("RGB", (12, 10), (number, 0, 0)).save(stream, "PNG")
            member = tarfile.TarInfo(f"signs/{number % 10}/IMG_{100 + number}.JPG")
            member.size = len(stream.getvalue())
            archive.addfile(member, io.BytesIO(stream.getvalue()))
    return file


def test_photographs_come_in_the_order_of_their_numbers(signs: Path, tmp_path: Path) -> None:
    images, labels, numbers = unlabelled.photographs(signs, 8)
    assert images.shape == (40, 3, 8, 8) and images[:, 0, 0, 0].tolist() == list(range(40))
    assert numbers.tolist() == list(range(100, 140)) and labels.tolist() == [n % 10 for n in range(40)]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(EdgeBcsError, match="holds no photographs in folders of classes"):
        unlabelled.photographs(tmp_path / "empty.tar", 8)


def test_what_was_measured_is_kept(signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    words = ["unlabelled", str(tmp_path / "results"), "--data", str(signs), "--draws", "2", "--size", "8"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(KeyboardInterrupt):
        unlabelled.main()
    kept = measured.copy()
    measured.clear()
    unlabelled.main()
    assert kept + measured == [(0, "labelled"), (0, "unlabelled"), (1, "labelled"), (1, "unlabelled")]
    content = json.loads((tmp_path / "results" / "efficientnet-lite0.json").read_text())
    assert len(content["rows"]) == 4 and content["summary"]["accuracy"]["gain"]["draws"] == 2
