"""Boards, and the simulator of their memory budget."""

from __future__ import annotations

from edge_bcs.targets.boards import Cluster, Target, load, names

__all__ = ["Cluster", "Target", "load", "names"]


def __dir__() -> list[str]:
    return sorted(__all__)
