"""The roof: what this machine's cores and memory reach at most, measured by the operator library itself."""

from __future__ import annotations

import ctypes
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

STACK_BYTES = 8 << 20
"""The bandwidth that decides is that to what holds the activations of a micro-batch."""
MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Roof:
    """Measured peaks of all threads together.

    Attributes:
        processor, threads, isa: what was measured.
        core_arithmetic: float32 operations a second of each core.
        stack_bandwidth, memory_bandwidth: bytes a second, read and written, of copies within 8 MiB and within
            256 MiB a core.
        date: when, in UTC.
    """

    processor: str
    threads: int
    isa: str
    core_arithmetic: tuple[float, ...]
    stack_bandwidth: float
    memory_bandwidth: float
    date: str

    @property
    def arithmetic(self) -> float:
        """Float32 operations a second of all cores."""
        return sum(self.core_arithmetic)

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many operations and bytes: the larger of arithmetic and traffic."""
        return max(flops / self.arithmetic, moved / self.stack_bandwidth)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return asdict(self) | {"arithmetic": self.arithmetic}


def measure(threads: int, seconds: float = 0.5) -> Roof:
    """Measure the machine with so many threads at once, for `seconds` a figure."""
    from edge_bcs.runtime import budget

    arithmetic, bandwidth = probes()
    with ThreadPoolExecutor(threads) as pool:
        cores = list(pool.map(lambda _: float(arithmetic(seconds)), range(threads)))
        rates = [
            sum(pool.map(lambda _, size=size: float(bandwidth(seconds, size, 1)), range(threads)))
            for size in (STACK_BYTES, MEMORY_BYTES)
        ]
    return Roof(
        processor=processor_name(),
        threads=threads,
        isa=budget.isa(),
        core_arithmetic=tuple(sorted(cores, reverse=True)),
        stack_bandwidth=rates[0],
        memory_bandwidth=rates[1],
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def probes() -> tuple[Any, Any]:
    """The operator library's functions that keep a core busy: arithmetic(seconds), operations a second, and
    bandwidth(seconds, bytes, threads), bytes a second."""
    from edge_bcs.runtime.library import library_path

    library = ctypes.CDLL(str(library_path()))
    arithmetic, bandwidth = library.edge_bcs_peak_arithmetic, library.edge_bcs_peak_bandwidth
    arithmetic.restype = bandwidth.restype = ctypes.c_double
    arithmetic.argtypes = [ctypes.c_double]
    bandwidth.argtypes = [ctypes.c_double, ctypes.c_int64, ctypes.c_int]
    return arithmetic, bandwidth


def processor_name() -> str:
    """What the system calls its processor."""
    from edge_bcs.runtime.machine import Machine

    return Machine().processor() or platform.processor() or platform.machine()
