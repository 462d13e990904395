"""What the operating system knows of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def resident_peak() -> int:
    """The most bytes of memory that this process has occupied.

    From the kernel's high-water mark; ``getrusage``, which is asked where there is none, would start from
    what the parent process occupied.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def private_now() -> int:
    """Bytes of memory that this process has taken and occupies now (Linux; elsewhere the most so far).

    The pages of its files, such as libraries, are not counted: when they come is the kernel's affair.
    """
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    except (OSError, ValueError):
        return resident_peak()
    import resource

    return (resident - shared) * resource.getpagesize()
