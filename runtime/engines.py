"""Which engine runs an artifact's graphs."""

from __future__ import annotations

from importlib.util import find_spec

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.engine import Engine

from edge_bcs.core.errors import EdgeBcsError

ENGINES = ("onnxruntime", "native")


def check_engine(name: str | None) -> str:
    """The engine called ``name``; for None ONNX Runtime where it is installed, elsewhere our own.

    Raises EdgeBcsError for a name that is none, and for ONNX Runtime where it is missing.
    """
    installed = find_spec("onnxruntime") is not None
    if name is None:
        return "onnxruntime" if installed else "native"
    if name not in ENGINES:
        raise EdgeBcsError(f"the engine must be one of {', '.join(ENGINES)}, not {name!r}.")
    if name == "onnxruntime" and not installed:
        raise EdgeBcsError(
            "ONNX Runtime is not installed: pip install onnxruntime, or take the native engine."
        )
    return name


def open_engine(
    kind: str, artifact: Artifact, cap: int | None, threads: int | None, half: bool = False
) -> Engine:
    """Open an artifact's graphs.

    Args:
        kind: one of ENGINES. cap: bytes of the working set, None for no limit.
        threads: of each graph, None for all processors. half: whether attacks are in half precision.
    """
    # Megabytes of ONNX Runtime, which the other engine does without.
    if kind == "native":
        from edge_bcs.runtime.program import ProgramEngine

        return ProgramEngine(artifact, cap, threads, half)
    from edge_bcs.runtime.sessions import SessionEngine

    return SessionEngine(artifact, cap, threads, half)
