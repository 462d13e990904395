"""Sizes in bytes: what is read as one, and how one is shown."""

from __future__ import annotations

import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6MiB", 6291456),
        ("6MB", 6000000),
        ("6291456", 6291456),
        (6291456, 6291456),
        ("1.5 KiB", 1536),
        ("0.1MB", 100000),
        ("2g", 2147483648),
        (" 12 mib ", 12582912),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "6 parsecs", "-1MiB", "0", "1e6", "6MiBMiB", "99999999999TB", "9" * 40, True, 1.5]
)
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(EdgeBcsError, match="size"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_sizes_are_shown_in_the_largest_unit() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1024, 12 << 20, 200 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "12.0 MiB",
        "200 MiB",
        "3.0 GiB",
    ]
