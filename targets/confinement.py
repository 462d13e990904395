"""Runs a program as if the machine had no more memory than a board leaves to one application.

Where the system can, private writable memory is limited (RLIMIT_DATA, on Linux), so that a request
beyond the board's memory fails as it would there. That limit counts address space, whether touched or
not, so it is stricter than the board; it leaves out the pages of libraries, so the peak of the resident
memory, which has them, is compared with the same limit afterwards. Control groups would do both at once,
but need rights that belong to whoever runs the machine, and RLIMIT_AS counts what is merely mapped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Confinement:
    """How a program is confined.

    Attributes:
        description: the means, for people.
        prefix: words to put before the program's own.
    """

    description: str
    prefix: tuple[str, ...] = ()


def confinement(limit: int | None) -> Confinement:
    """The confinement to ``limit`` bytes; None confines nothing."""
    if limit is None:
        return Confinement("not limited: no board was named")
    if sys.platform == "linux":
        return Confinement(
            "private writable memory limited to the board's usable memory (RLIMIT_DATA), and the peak of "
            "resident memory compared with it",
            ("sh", "-c", f'ulimit -d {limit // 1024} && exec "$0" "$@"'),
        )
    return Confinement("not limited on this system: the peak of resident memory is compared with the board's")
