"""Pages that a bench writes and a person ends: what follows a heading is written by hand, and kept."""

from __future__ import annotations

from pathlib import Path

from edge_bcs.core.files import read_small


def by_hand(page: Path, heading: str) -> str:
    """Return what a page has from ``heading`` on; "" if there is no such page, or no such heading."""
    before = read_small(page).decode() if page.is_file() else ""
    return before[before.index(heading) :] if heading in before else ""
