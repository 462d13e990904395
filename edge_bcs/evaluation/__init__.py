"""Measuring a network: accuracy under attacks of our own and of other libraries."""

from __future__ import annotations

from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_bcs.evaluation.measures import evaluate

    return evaluate
