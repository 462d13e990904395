"""The roof: what this machine's cores and memory reach at most, measured by the operator library itself."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from edge_bcs.targets.cost_model import VECTOR

STACK_BYTES = 8 << 20
"""The bandwidth that decides is that to what holds the activations of a micro-batch."""
MEMORY_BYTES = 256 << 20
COPIED = (512 << 10, 2 << 20, STACK_BYTES, 32 << 20, MEMORY_BYTES)
LOADED = (16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, STACK_BYTES)
"""Bytes a core in which copies and loads are measured: from a first- or second-level cache to beyond them."""


@dataclass(frozen=True)
class Roof:
    """Measured peaks of all threads together.

    Attributes:
        processor, threads, isa: what was measured.
        core_arithmetic: float32 operations a second of each core.
        copies: working set of a core in bytes, ascending → bytes a second, read and written, that all cores
            copy within such sets.
        vector_loads: working set of a core in bytes, ascending → vectors a second that all cores load from
            such sets, each for one multiply-add, in the order in which a sparse kernel needs them.
        date: when, in UTC.
    """

    processor: str
    threads: int
    isa: str
    core_arithmetic: tuple[float, ...]
    copies: tuple[tuple[int, float], ...]
    vector_loads: tuple[tuple[int, float], ...]
    date: str

    @property
    def arithmetic(self) -> float:
        """Float32 operations a second of all cores."""
        return sum(self.core_arithmetic)

    @property
    def stack_bandwidth(self) -> float:
        """Bytes a second of copies within 8 MiB a core."""
        return self.bandwidth(STACK_BYTES)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second of copies within 256 MiB a core, beyond all caches."""
        return self.bandwidth(MEMORY_BYTES)

    @property
    def vector(self) -> int:
        """Floats of a vector."""
        return VECTOR[self.isa]

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second, read and written, that all cores copy within ``working_set`` bytes each."""
        return _between(self.copies, working_set)

    def loads(self, working_set: float) -> float:
        """Vectors a second that all cores load from ``working_set`` bytes each."""
        return _between(self.vector_loads, working_set)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        names = ("arithmetic", "stack_bandwidth", "memory_bandwidth")
        return asdict(self) | {name: getattr(self, name) for name in names}


def _between(rates: Sequence[tuple[int, float]], size: float) -> float:
    """The rate at ``size`` bytes, on the line through its neighbours over the logarithm of the size.

    Near the size of a cache a part of the accesses still meets it.
    """
    sizes, measured = zip(*rates, strict=True)
    return float(np.interp(math.log(max(size, 1.0)), np.log(sizes), measured))


def measure(threads: int, seconds: float = 0.5) -> Roof:
    """Measure the machine with so many threads at once, for `seconds` a figure."""
    from edge_bcs.runtime import budget

    arithmetic, copies, loads = probes()
    with ThreadPoolExecutor(threads) as pool:
        cores = list(pool.map(lambda _: float(arithmetic(seconds)), range(threads)))
        loaded = [
            (size, sum(pool.map(lambda _, s=size: float(loads(seconds, s)), range(threads))))
            for size in LOADED
        ]
    copied = [(size, copies(seconds, size, threads)) for size in COPIED]
    return Roof(
        processor=processor_name(),
        threads=threads,
        isa=budget.isa(),
        core_arithmetic=tuple(sorted(cores, reverse=True)),
        copies=tuple(copied),
        vector_loads=tuple(loaded),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def memory_bandwidth(threads: int, seconds: float = 0.2) -> float:
    """`Roof.memory_bandwidth` as it is now: neighbours on the same memory change it from minute to minute."""
    _, copies, _ = probes()
    return float(copies(seconds, MEMORY_BYTES, threads))


def probes() -> tuple[Any, Any, Any]:
    """The operator library's functions that keep a core busy: arithmetic(seconds), operations a second;
    copies(seconds, bytes, threads), bytes read and written a second by that many threads together;
    loads(seconds, bytes), vectors a second."""
    from edge_bcs.runtime.library import library_path

    library = ctypes.CDLL(str(library_path()))
    arithmetic, bandwidth, loads = (
        getattr(library, f"edge_bcs_peak_{what}") for what in ("arithmetic", "bandwidth", "loads")
    )
    arithmetic.restype = bandwidth.restype = loads.restype = ctypes.c_double
    arithmetic.argtypes = [ctypes.c_double]
    bandwidth.argtypes = [ctypes.c_double, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    loads.argtypes = [ctypes.c_double, ctypes.c_int64]
    return arithmetic, lambda seconds, size, threads: float(bandwidth(seconds, size, 1, threads)), loads


def processor_name() -> str:
    """What the system calls its processor."""
    from edge_bcs.core.machine import ThisMachine

    return ThisMachine().processor() or platform.processor() or platform.machine()
