"""Sizes as people write them: "6MiB", "6MB", "512 KiB", 6291456."""

from __future__ import annotations

import re

from edge_bcs.core.errors import EdgeBcsError

_UNITS = {
    "": 1, "b": 1,
    "k": 1024, "kib": 1024, "kb": 1000,
    "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
    "g": 1024**3, "gib": 1024**3, "gb": 1000**3,
}  # fmt: skip
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_LARGEST = 1 << 50


def parse_bytes(size: int | str) -> int:
    """Return the number of bytes that ``size`` names.

    Binary units are KiB, MiB, GiB (and K, M, G alone); decimal ones KB, MB, GB; a bare number is bytes.
    Fractions such as "1.5MiB" are rounded down to whole bytes. Raises EdgeBcsError for anything else, for
    zero and for sizes beyond 1 PiB.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise EdgeBcsError(f"a size is a number of bytes or text such as 6MiB, not {size!r}.")
    if isinstance(size, int):
        value = size
    else:
        match = _PATTERN.fullmatch(size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise EdgeBcsError(f"{size!r} is not a size: write it as 6MiB, 6MB, 512KiB or 6291456.")
        if "." in match[1]:
            whole, fraction = match[1].split(".")
            value = int(whole) * unit + int(fraction) * unit // 10 ** len(fraction)
        else:
            value = int(match[1]) * unit
    if not 0 < value <= _LARGEST:
        raise EdgeBcsError(f"a size must lie between 1 byte and 1 PiB, not {size}.")
    return value


def format_bytes(size: int) -> str:
    """Return ``size`` bytes in the largest binary unit that keeps the number at least 1, e.g. "11.3 MiB"."""
    if abs(size) < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.1f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Return a duration in the largest unit that keeps the number at least 1, e.g. "9.3 min"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
