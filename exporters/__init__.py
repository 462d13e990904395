"""The host-side compiler: from a sparse torch network to an artifact folder.

``capture`` traces the network into ``layers``; ``fusion`` makes them ``operators``; ``autodiff``
differentiates those; ``graphs`` writes training, attack, evaluation and optimizer graphs; ``plan`` replays
them for the memory they need; ``artifact`` writes the folder and ``validation`` compares it with torch.
"""

from __future__ import annotations

from .artifact import export

__all__ = ["export"]
