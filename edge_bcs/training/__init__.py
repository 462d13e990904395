"""Training on the host: the plan, the loop, updates, replicas, and the backends that compute a step."""

from __future__ import annotations

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_bcs.training.loop import train

    return train
