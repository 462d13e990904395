"""What ONNX Runtime's profiler says of single operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def operator_seconds(session: Any) -> dict[str, list[float]]:
    """End a session's profiling; returns node → seconds of each of its runs, in the order in which they ran.

    Args:
        session: an onnxruntime.InferenceSession that was made with profiling enabled.
    """
    taken: dict[str, list[float]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        name = event.get("name", "")
        if name.endswith("_kernel_time"):
            taken.setdefault(name.removesuffix("_kernel_time"), []).append(event["dur"] * 1e-6)
    return taken
