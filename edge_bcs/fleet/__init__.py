"""Boards that learn apart meet again: runs of one network become one, which has exactly κ connections.

`merge` makes a run of several; `Rounds` exchanges runs through a folder, round after round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_bcs.fleet.merging import merge
    from edge_bcs.fleet.rounds import Rounds

_LAZY = {"Rounds": "edge_bcs.fleet.rounds", "merge": "edge_bcs.fleet.merging"}

__all__ = ["Rounds", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edge_bcs.fleet' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
