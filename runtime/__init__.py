"""What runs on the board: numpy, ONNX Runtime and the operator library.

`Trainer` fine-tunes an artifact inside a byte budget. Nothing here imports torch, onnx or scipy.
"""

from __future__ import annotations

from typing import Any

_LAZY = {
    "Trainer": "trainer",
    "Artifact": "artifact",
    "BudgetExceeded": "budget",
    "parse_bytes": "units",
    "format_bytes": "units",
}

__all__ = ["Artifact", "BudgetExceeded", "Trainer", "format_bytes", "parse_bytes"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edge_bcs.runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"edge_bcs.runtime.{_LAZY[name]}"), name)
