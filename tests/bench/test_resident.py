"""What `make resident` measures, and the page that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_bcs.bench import resident

MIB = 1 << 20
ROW = {
    "network": "wrn28_2", "statistics": "frozen", "arena_bytes": 2 * MIB, "program_bytes": 6 * MIB,
    "program": {"peak_bytes": 5 * MIB, "looks": [{"seconds": 0.1, "own": MIB, "files": 2 * MIB}]},
    "python": {"peak_bytes": 41 * MIB, "looks": []},
}  # fmt: skip


def test_a_process_is_watched_to_its_end() -> None:
    grown = "import time; x = bytearray(40 << 20); time.sleep(0.3)"
    looks, highest = resident.watched((sys.executable, "-c", grown))
    assert highest >= max(look.own for look in looks) > 40 * MIB
    assert looks[0].seconds < looks[-1].seconds and all(look.files > 0 for look in looks[1:])
    with pytest.raises(RuntimeError, match=r"failed: .*no such thing"):
        resident.watched((sys.executable, "-c", "raise SystemExit('no such thing')"))


def test_the_page_and_its_picture(tmp_path: Path) -> None:
    content = {"date": "2026-11-29", "machine": "a machine", "rows": [ROW]}
    line = "| wrn28_2 | frozen | 2.00 | 5.00 | 3.00 | 10.00 | 5.00 | 41.00 | 45.00 |"
    assert line in resident.table(content)
    resident.draw(content, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
