"""Positions as they are sent: the gaps between them, seven bits a byte.

Positions ascend, so that each is told by how many lie between it and the one before (the first: before it).
A gap is written with its lowest seven bits first; all bytes but its last have the highest bit set. At 99 %
nearly every gap is below 128, so a position takes little more than a byte instead of four.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError

Array = np.ndarray[Any, Any]
_BITS, _MORE = 7, 128
_LONGEST = 9
"""Bytes of a gap: 63 bits."""


def coded(index: Array) -> Array:
    """Return positions i32 or i64[κ], of at least 0, strictly ascending, as bytes u8[n]."""
    gaps: Array = np.diff(index.astype(np.int64), prepend=np.int64(-1)) - 1
    length = np.ones(len(gaps), np.int64)
    for bits in range(_BITS, _BITS * _LONGEST, _BITS):
        length += gaps >= 1 << bits
    first = np.cumsum(length) - length
    found = np.empty(int(length.sum()), np.uint8)
    for place in range(int(length.max(initial=0))):
        some = length > place
        more = np.where(length[some] > place + 1, _MORE, 0)
        found[first[some] + place] = gaps[some] >> _BITS * place & _MORE - 1 | more
    return found


def decoded(data: Array, count: int, size: int, kind: str) -> Array:
    """Return the positions that bytes u8[n] tell, of the given element type.

    Args:
        data: from anywhere. count: positions that there must be, κ. size: N, above all of them.
        kind: element type of the positions.

    Raises EdgeBcsError if the bytes are none of so many positions in [0, size).
    """
    last = data < _MORE
    ends = np.flatnonzero(last)
    if len(data) and not last[-1]:
        raise EdgeBcsError("the last gap between positions does not end.")
    if len(ends) != count:
        raise EdgeBcsError(f"the gaps between positions are {len(ends)} numbers instead of {count}.")
    first = np.append(0, ends[:-1] + 1) if count else ends
    length = ends - first + 1
    if length.max(initial=0) > _LONGEST:
        raise EdgeBcsError(f"a gap between positions has more than {_LONGEST} bytes.")
    gaps = np.zeros(count, np.int64)
    for place in range(int(length.max(initial=0))):
        some = length > place
        gaps[some] |= (data[first[some] + place].astype(np.int64) & _MORE - 1) << _BITS * place
    # Checked one by one, they cannot overflow when they are summed up.
    if gaps.max(initial=0) >= size or (count and int(gaps.sum()) + count > size):
        raise EdgeBcsError(f"the gaps between positions lead beyond the network's {size} weights.")
    return (np.cumsum(gaps) + np.arange(count)).astype(kind)
