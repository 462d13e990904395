"""What the operating system knows of this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resident:
    """Bytes of memory that a process occupies.

    Attributes:
        own: pages that it has filled itself. files: pages of files, such as the code of libraries.
    """

    own: int
    files: int

    @property
    def total(self) -> int:
        """Both."""
        return self.own + self.files


def resident_now() -> Resident | None:
    """What this process occupies now; None where the system does not tell (it takes Linux)."""
    # The first is exact but younger than some boards' kernels (4.14).
    for file, whole, part in (("smaps_rollup", "Rss:", "Anonymous:"), ("status", "VmRSS:", "RssAnon:")):
        try:
            lines = [line.split() for line in Path("/proc/self", file).read_text().splitlines()]
            sizes = {words[0]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
            return Resident(sizes[part], sizes[whole] - sizes[part])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return None


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
