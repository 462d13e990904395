"""The host-side compiler: from a sparse torch network to an artifact folder.

``capture`` traces the network into ``layers``; ``fusion`` makes them ``operators``; ``autodiff``
differentiates those; ``graphs`` writes training, attack, evaluation and optimizer graphs; ``plan`` replays
them for the memory they need; ``artifact`` writes the folder and ``validation`` compares it with torch.
``cost_model`` alone needs neither torch nor onnx; the simulator uses it on boards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .artifact import export

    return export


def __dir__() -> list[str]:
    return sorted(__all__)
