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


def waited_for_cores() -> float:
    """Seconds that this process's threads could have run and waited for a core so far, all together.

    Other work on the machine shows in it, and nothing else does: a thread that has nothing to do sleeps. 0.0
    where the system does not tell (it takes Linux's scheduler statistics); threads that have ended are not
    counted.
    """
    waited = 0
    for thread in Path("/proc/self/task").glob("*"):
        try:
            waited += int((thread / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
    return 1e-9 * waited
