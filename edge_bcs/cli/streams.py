"""Standard input, output and error of a command, whatever they are: closed, of another encoding, gone."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import Any

HANDLER = "edge-bcs"
_ASCII = "edge_bcs_ascii"
# What we print, where an encoding lacks it. What else it lacks, such as a letter of a file's name, is "?".
_PLAIN = {
    "κ": "kappa", "ε": "epsilon", "λ": "lambda", "μ": "mu", "µ": "u", "σ": "sigma", "γ": "gamma", "ρ": "rho",
    "×": "x", "·": "*", "÷": "/", "±": "+-", "−": "-", "²": "^2", "½": "1/2", "∞": "inf", "≤": "<=",
    "≥": ">=", "–": "-", "—": "-", "→": "->", "…": "...", "°": " deg ", "✓": "+", "✗": "x",
    "━": "#", "─": ".", "│": "|", "\u202f": " ", "\xa0": " ",
}  # fmt: skip


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what cannot be encoded (see `codecs.register_error`)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte of a file's name that is no text: as it is
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character, "?"), error.start + 1


def _codec(name: str) -> codecs.CodecInfo | None:
    """ASCII by another name: click writes UTF-8 to a stream whose encoding is called ascii."""
    if name != _ASCII:
        return None
    same = codecs.lookup("ascii")
    return codecs.CodecInfo(
        same.encode, same.decode, incrementalencoder=same.incrementalencoder,
        incrementaldecoder=same.incrementaldecoder, name=_ASCII,
    )  # fmt: skip


codecs.register_error(HANDLER, _plainly)
codecs.register(_codec)


def prepare() -> None:
    """Make sure that there are three standard streams, and that anything can be written to the last two."""
    for descriptor in range(3):  # else the next file that is opened would take its place
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as we run)
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                ascii_alone = codecs.lookup(stream.encoding).name == "ascii"
                stream.reconfigure(errors=HANDLER, **({"encoding": _ASCII} if ascii_alone else {}))
