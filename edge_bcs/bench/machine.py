"""The roof: what this machine's cores and memory reach at most, measured by the operator library itself."""

from __future__ import annotations

import ctypes
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from edge_bcs.exporters.cost_model import VECTOR

STACK_BYTES = 8 << 20
"""The bandwidth that decides is that to what holds the activations of a micro-batch."""
MEMORY_BYTES = 256 << 20
WORKING_SETS = (16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, STACK_BYTES)
"""Bytes a core from which loads are measured: from within a first-level cache to beyond the second level."""


@dataclass(frozen=True)
class Roof:
    """Measured peaks of all threads together.

    Attributes:
        processor, threads, isa: what was measured.
        core_arithmetic: float32 operations a second of each core.
        stack_bandwidth, memory_bandwidth: bytes a second, read and written, of copies within 8 MiB and within
            256 MiB a core.
        vector_loads: working set of a core in bytes, ascending → vectors a second that all cores load from
            such sets, each for one multiply-add, in the order in which a sparse kernel needs them.
        date: when, in UTC.
    """

    processor: str
    threads: int
    isa: str
    core_arithmetic: tuple[float, ...]
    stack_bandwidth: float
    memory_bandwidth: float
    vector_loads: tuple[tuple[int, float], ...]
    date: str

    @property
    def arithmetic(self) -> float:
        """Float32 operations a second of all cores."""
        return sum(self.core_arithmetic)

    @property
    def vector(self) -> int:
        """Floats of a vector."""
        return VECTOR[self.isa]

    def loads(self, working_set: float) -> float:
        """Vectors a second that all cores load from ``working_set`` bytes each.

        Between two sets that were measured the rate is on the line through both, over the logarithm of the
        size: a part of the loads meets the nearer cache by chance.
        """
        sizes, rates = zip(*self.vector_loads, strict=True)
        return float(np.interp(math.log(max(working_set, 1.0)), np.log(sizes), rates))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return asdict(self) | {"arithmetic": self.arithmetic}


def measure(threads: int, seconds: float = 0.5) -> Roof:
    """Measure the machine with so many threads at once, for `seconds` a figure."""
    from edge_bcs.runtime import budget

    arithmetic, bandwidth, loads = probes()
    with ThreadPoolExecutor(threads) as pool:
        cores = list(pool.map(lambda _: float(arithmetic(seconds)), range(threads)))
        rates = [
            sum(pool.map(lambda _, size=size: float(bandwidth(seconds, size, 1)), range(threads)))
            for size in (STACK_BYTES, MEMORY_BYTES)
        ]
        fed = [
            sum(pool.map(lambda _, size=size: float(loads(seconds, size)), range(threads)))
            for size in WORKING_SETS
        ]
    return Roof(
        processor=processor_name(),
        threads=threads,
        isa=budget.isa(),
        core_arithmetic=tuple(sorted(cores, reverse=True)),
        stack_bandwidth=rates[0],
        memory_bandwidth=rates[1],
        vector_loads=tuple(zip(WORKING_SETS, fed, strict=True)),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def probes() -> tuple[Any, Any, Any]:
    """The operator library's functions that keep a core busy: arithmetic(seconds), operations a second;
    bandwidth(seconds, bytes, copy), bytes a second; loads(seconds, bytes), vectors a second."""
    from edge_bcs.runtime.library import library_path

    library = ctypes.CDLL(str(library_path()))
    arithmetic, bandwidth = library.edge_bcs_peak_arithmetic, library.edge_bcs_peak_bandwidth
    loads = library.edge_bcs_peak_loads
    arithmetic.restype = bandwidth.restype = loads.restype = ctypes.c_double
    arithmetic.argtypes = [ctypes.c_double]
    bandwidth.argtypes = [ctypes.c_double, ctypes.c_int64, ctypes.c_int]
    loads.argtypes = [ctypes.c_double, ctypes.c_int64]
    return arithmetic, bandwidth, loads


def processor_name() -> str:
    """What the system calls its processor."""
    from edge_bcs.runtime.machine import Machine

    return Machine().processor() or platform.processor() or platform.machine()
