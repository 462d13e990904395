"""What runs on the board: numpy, ONNX Runtime and the operator library.

`Trainer` fine-tunes an artifact inside a byte budget. Nothing here imports torch, onnx or scipy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.budget import BudgetExceeded
    from edge_bcs.runtime.connections import Connections
    from edge_bcs.runtime.engine import GraphRun
    from edge_bcs.runtime.trainer import Trainer

    from edge_bcs.core.units import format_bytes, parse_bytes

_LAZY = {
    "Trainer": "edge_bcs.runtime.trainer",
    "Artifact": "edge_bcs.runtime.artifact",
    "BudgetExceeded": "edge_bcs.runtime.budget",
    "Connections": "edge_bcs.runtime.connections",
    "GraphRun": "edge_bcs.runtime.engine",
    "parse_bytes": "edge_bcs.core.units",
    "format_bytes": "edge_bcs.core.units",
}

__all__ = [
    "Artifact",
    "BudgetExceeded",
    "Connections",
    "GraphRun",
    "Trainer",
    "format_bytes",
    "parse_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edge_bcs.runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
