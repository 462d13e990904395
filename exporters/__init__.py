"""The host-side compiler: from a sparse torch network to an artifact folder.

``compiler`` has the passes in their order, from `frontends` (a torch module becomes layers) to `memory` (what
fits a budget); ``artifact`` writes the folder and ``validation`` compares it with torch.
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
