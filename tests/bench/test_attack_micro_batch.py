"""The table of an attack's time by the images that are held at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.bench import attack_micro_batch as bench

pytest.importorskip("torch")


def test_time_and_bytes_of_each_size(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def exported(*given: Any) -> Iterator[tuple[Path, Any]]:
        yield tiny_artifact(micro_batch=given[4], batch_size=4), None

    monkeypatch.setattr(bench, "exported", exported)
    monkeypatch.setattr(
        bench,
        "batch_of",
        lambda count, size: (np.zeros((count, 1, 8, 8), np.float32), np.zeros(count, np.int64)),
    )
    monkeypatch.setattr(bench, "SIZES", (1, 4))
    found = bench.measure("tiny")
    assert all(seconds > 0 for seconds, *_ in found.values())
    assert found[4][1] > found[1][1] > 0 and found[4][2] > found[1][2] > 0
    table = bench.table({"tiny": {1: (0.012, 3 << 20, 2 << 20), 4: (0.004, 6 << 20, 5 << 19)}})
    assert table.splitlines()[2:] == ["| 1 | 12.00 | 3.0 / 2.0 |", "| 4 | 4.00 | 6.0 / 2.5 |"]
