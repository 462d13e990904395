"""`make in-part`: rows that are there are kept, and the table says what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from helpers.in_part import mobile

from edge_bcs import EdgeBcsError
from edge_bcs.bench import in_part

MIB = 1 << 20


def row(objective: str, part: str, images: int, predicted: int, measured: int) -> dict[str, Any]:
    return {
        "network": "efficientnet_lite0",
        "objective": objective,
        "part": part,
        "micro_batch": images,
        "connections": 0,
        "others": 12_810,
        "of_connections": 314_611,
        "of_others": 237_706,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "board_seconds_per_image": 0.1,
        "seconds_per_image": 0.0125,
        "cores_share": 0.97,
    }


def test_the_table_says_what_meets_its_target_and_what_was_predicted() -> None:
    found = [
        row("natural", "head", 1, 7 * MIB, 7 * MIB),
        row("natural", "head", 8, 20 * MIB, 20 * MIB),
        row("at", "head", 1, 11 * MIB, 11 * MIB + 4),
    ]
    text = in_part.readme(found, 2)
    assert "| head | 0 | 12,810 | 1 | 7,340,032 | 7.00 (≤ 8) | 100 | 12.5 |" in text
    assert "| head | 0 | 12,810 | 8 | 20,971,520 | 20.00 | 100 | 12.5 |" in text
    assert "| 11,534,336 ≠ 11,534,340 | 11.00 (not ≤ 10) |" in text
    assert (
        "314,611 connections and 237,706 other numbers" in text
        and "while 97 % of the cores' time or more was to be had." in text
    )


def test_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, int]] = []

    def measured(_: Any, objective: str, part: str, images: int, threads: int) -> dict[str, Any]:
        made.append((objective, part, images))
        return row(objective, part, images, 7 * MIB, 7 * MIB)

    monkeypatch.setattr(in_part, "network", mobile)
    monkeypatch.setattr(in_part, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["in_part", str(tmp_path / "partial")])
    in_part.main()
    cells = len(in_part.OBJECTIVES) * len(in_part.PARTS) * len(in_part.MICRO_BATCHES)
    assert len(made) == len(set(made)) == cells
    file = tmp_path / "partial" / "in_part.json"
    kept = json.loads(file.read_text())[1:]
    file.write_text(json.dumps(kept))
    made.clear()
    in_part.main()
    assert made == [("natural", "head", 1)] and len(json.loads(file.read_text())) == cells
    assert (tmp_path / "partial" / "in_part.png").stat().st_size > 1000
    (tmp_path / "partial" / "README.md").write_text("mine")
    with pytest.raises(EdgeBcsError, match="README"):
        in_part.main()
