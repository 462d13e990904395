"""What files say about a network and its training beside the numbers, checked before it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

_BOUNDS = {"step": 2**56, "seed": 2**64}  # of the counters of the random numbers
_MOST_IMAGES = 2**53  # which a float64 counts exactly


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Return what JSON text holds; ValueError if it is none, or nested too deeply.

    With ``unique`` also if an object has a name twice, of which others might read the first and we the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that ``text`` is; ValueError if it is anything else."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return what TOML text holds; ValueError if it is none, or nested too deeply."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def counters(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Return (step, seed) of a state's metadata.

    Raises:
        EdgeBcsError: one of them is missing, or not a number that the random numbers can be counted by.
    """
    found = []
    for name, bound in _BOUNDS.items():
        number = _whole(metadata.get(name, ""), bound)
        if number is None:
            raise EdgeBcsError(f"its metadata has no valid {name}")
        found.append(number)
    return found[0], found[1]


def images_seen(metadata: Mapping[str, str]) -> int | None:
    """Return how many images the training of a state saw, as its metadata say; None if they do not, or say
    what cannot be."""
    return _whole(metadata.get("images", ""), _MOST_IMAGES)


def _whole(text: str, bound: int) -> int | None:
    """The whole number in [0, bound) that a text is; None if it is none."""
    valid = text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < bound
    return int(text) if valid else None


def exact_sparsity(sparsity: float | str | Decimal) -> Decimal:
    """Return a sparsity in [0, 1) as a decimal number.

    A float means the shortest decimal that prints as it (0.99 is ninety-nine hundredths, not the nearest
    double).

    Raises:
        EdgeBcsError: it is no such number.
    """
    try:
        exact = Decimal(str(sparsity))
    except InvalidOperation:
        raise EdgeBcsError(f"the sparsity must be a number, not {str(sparsity)[:60]!r}") from None
    if not (exact.is_finite() and 0 <= exact < 1):
        raise EdgeBcsError(f"the sparsity must be at least 0 and below 1, not {str(sparsity)[:60]}")
    return exact
