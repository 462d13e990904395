"""SHA-256 without OpenSSL, whose library is 3 MiB of every process that loads it, as `hashlib` does."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import IO, Any, Protocol


class Digest(Protocol):
    """What is computed piece by piece, as `hashlib` has it."""

    def update(self, data: Any, /) -> None:
        """Take some more bytes."""

    def digest(self) -> bytes:
        """Of all bytes so far, in 32 bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far, in 64 hexadecimal digits."""


def _own() -> Callable[..., Digest]:
    """CPython's own SHA-256, or that of `hashlib` where it has none."""
    for name in ("_sha2", "_sha256", "hashlib"):
        try:
            found: Callable[..., Digest] = importlib.import_module(name).sha256
        except ImportError:
            continue
        return found
    raise ImportError("this Python has no SHA-256")


sha256 = _own()
"""As `hashlib.sha256`."""


def of_stream(stream: io.RawIOBase | IO[bytes]) -> str:
    """Return the digest of what is left in a stream, in hexadecimal; 1 MiB is in memory at a time."""
    digest = sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
