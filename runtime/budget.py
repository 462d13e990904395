"""The byte budget: what the operator library's allocator counts, and the error when it would be exceeded.

The library registers its own allocator with ONNX Runtime's environment. It lays every tensor of an artifact's
graphs where the artifact's program has it, in one arena; a graph that needs more of it than the cap is
refused before it runs. What has no place there (graphs without a program, whatever else ONNX Runtime takes)
is counted when it is made, and a request over the cap is refused before memory is taken. One environment
serves the whole process, hence one budget serves one Trainer at a time.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from edge_bcs.runtime.checks import NotFiniteError

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.units import format_bytes

_REFUSAL = re.compile(r"asked for (\d+) bytes with (\d+) of (\d+) bytes in use")
_ARENA_REFUSAL = re.compile(r"Available memory of (\d+) is smaller than requested bytes of (\d+)")
_NODE = re.compile(r"running (\S+) node\. Name:'([^']*)'")


_LONGEST_ERROR = 2000  # bytes
_arena: int | None = None  # bytes that the process's shared arena was limited to; it can be made once


class BudgetExceeded(EdgeBcsError):  # noqa: N818 (it names what happened)
    """A request for memory was refused because it would have gone over the cap; nothing was changed.

    Attributes:
        asker: what asked, e.g. "the operator Conv 'features.3' of the training graph" or "buffer coo.value".
        asked, in_use, cap: bytes asked for, bytes in use at that moment, and the cap.
    """

    def __init__(self, asker: str, asked: int, in_use: int, cap: int, needed: int = 0) -> None:
        self.asker, self.asked, self.in_use, self.cap = asker, asked, in_use, cap
        super().__init__(
            f"memory budget exceeded: {asker} asked for {format_bytes(asked)} ({asked} bytes) with "
            f"{format_bytes(in_use)} of {format_bytes(cap)} in use; allow {max(needed, in_use + asked)} "
            "bytes or more with --memory, or export for a smaller budget."
        )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    from edge_bcs.runtime.library import load

    size, text, count = ctypes.c_int64, ctypes.c_char_p, ctypes.c_uint64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "edge_bcs_budget_begin": (ctypes.c_int64, [size]),
        "edge_bcs_budget_end": (None, []),
        "edge_bcs_budget_reserve": (ctypes.c_int, [size]),
        "edge_bcs_budget_release": (None, [size]),
        "edge_bcs_budget_place": (ctypes.c_int, [text, count, ctypes.c_void_p, count, size, text, count]),
        "edge_bcs_budget_buffer": (size, [text, ctypes.POINTER(count)]),
        "edge_bcs_budget_run": (ctypes.c_int, [text]),
        "edge_bcs_budget_current": (ctypes.c_int64, []),
        "edge_bcs_budget_peak": (ctypes.c_int64, []),
        "edge_bcs_budget_placed": (ctypes.c_int64, []),
        "edge_bcs_budget_placed_peak": (ctypes.c_int64, []),
        "edge_bcs_budget_reset_peak": (None, []),
        "edge_bcs_budget_exact": (ctypes.c_int, []),
        "edge_bcs_isa": (ctypes.c_char_p, []),
        "edge_bcs_last_refusal": (None, [ctypes.POINTER(size)] * 3),
    }
    return load(signatures)


def isa() -> str:
    """Name of the kernel variant that the library chose for this processor, e.g. "avx512" or "neon"."""
    return (_library().edge_bcs_isa() or b"").decode()


def exact() -> bool:
    """True if the library counts every tensor of ONNX Runtime (known once it is registered with a
    session)."""
    return bool(_library().edge_bcs_budget_exact())


class Budget:
    """The process's budget, owned from construction to `close` by one Trainer.

    ``cap`` is in bytes, None for counting without a limit; ``needed`` is the artifact's predicted peak, for
    the advice in errors. Raises EdgeBcsError if another Trainer owns the budget.
    """

    def __init__(self, cap: int | None, needed: int = 0) -> None:
        self.cap = cap
        self._needed = needed
        self._library = _library()
        self._reserved = 0
        self._owned = False
        self.arena: int | None = None
        if self._library.edge_bcs_budget_begin(-1 if cap is None else cap) != 0:
            raise EdgeBcsError(
                "another Trainer in this process owns the memory budget: close it first (trainer.close(), or "
                "use `with Trainer(...) as trainer`)."
            )
        self._owned = True

    def reserve(self, size: int, asker: str) -> None:
        """Count ``size`` bytes that numpy is about to own; BudgetExceeded if they do not fit."""
        if self._library.edge_bcs_budget_reserve(size) != 0:
            raise BudgetExceeded(asker, size, self.current, self.cap or 0, self._needed)
        self._reserved += size

    def place(self, program: bytes, arena: np.ndarray[Any, Any], reserved: int) -> str:
        """Lay the tensors of the graphs that run (`running`) into ``arena`` at the places of ``program``.

        Args:
            reserved: bytes of the buffers in it, counted by `reserve`.

        Returns why that is impossible, else "".
        """
        said = ctypes.create_string_buffer(_LONGEST_ERROR)
        refused = self._library.edge_bcs_budget_place(
            program, len(program), arena.ctypes.data, arena.size, reserved, said, len(said)
        )
        return said.value.decode(errors="replace") if refused else ""

    def place_of(self, buffer: str) -> tuple[int, int]:
        """(address in the arena, bytes) of a bound buffer; (-1, 0) if the program has none of that name."""
        size = ctypes.c_uint64()
        return int(self._library.edge_bcs_budget_buffer(buffer.encode(), ctypes.byref(size))), size.value

    @contextmanager
    def running(self, graph: str) -> Iterator[None]:
        """What this thread runs inside the block is ``graph`` of the program."""
        if self._library.edge_bcs_budget_run(graph.encode()) != 0:
            raise EdgeBcsError(f"the program has no {graph} graph; export the artifact again.")
        try:
            yield
        finally:
            self._library.edge_bcs_budget_run(None)

    def close(self) -> None:
        """Give back what was reserved and let another Trainer own the budget. Safe to call twice."""
        if self._owned:
            self._owned = False
            self._library.edge_bcs_budget_release(self._reserved)
            self._library.edge_bcs_budget_end()

    @property
    def current(self) -> int:
        """Bytes in use now."""
        return int(self._library.edge_bcs_budget_current())

    @property
    def peak(self) -> int:
        """The most bytes in use at once since construction or `reset_peak`."""
        return int(self._library.edge_bcs_budget_peak())

    @property
    def placed(self) -> int:
        """Bytes of memory that is taken: the arena, or, where tensors have no places, the blocks that they
        lie in, with headers and the holes between them."""
        return int(self._library.edge_bcs_budget_placed())

    @property
    def placed_peak(self) -> int:
        """The most of them since construction or `reset_peak`."""
        return int(self._library.edge_bcs_budget_placed_peak())

    def reset_peak(self) -> None:
        """Start measuring the peak again from what is in use now."""
        self._library.edge_bcs_budget_reset_peak()

    @property
    def exact(self) -> bool:
        """See the function `exact`."""
        return exact()

    def owns_allocations(self) -> bool:
        """Whether ONNX Runtime, once the library is registered with it, takes its memory from the library."""
        import onnxruntime
        from edge_bcs.runtime.library import register

        register(onnxruntime.SessionOptions())
        return self.exact

    def limit_arena(self, bound: int) -> None:
        """Where the library cannot own ONNX Runtime's allocations (before 1.23), limit its arena instead.

        The arena gets what ``bound`` bytes of bound buffers leave of the cap. A process makes its shared
        arena once: where it has another limit already, ``arena`` stays None and only the buffers are counted.
        """
        global _arena
        if self.cap is None or self.cap <= bound:
            return  # nothing to limit, or the buffers will be refused
        if self.owns_allocations():
            return
        import onnxruntime

        limit = self.cap - bound
        if _arena is None:
            from onnxruntime.capi import _pybind_state

            memory = _pybind_state.OrtMemoryInfo(
                "Cpu", _pybind_state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, _pybind_state.OrtMemType.DEFAULT
            )
            # The limit, memory extended as asked for, and the default sizes of chunks.
            settings = _pybind_state.OrtArenaCfg(limit, 1, -1, -1)
            onnxruntime.create_and_register_allocator(memory, settings)
            _arena = limit
        self.arena = limit if limit == _arena else None

    def warn_unless_exact(self) -> None:
        """Say once how far the cap holds, where ONNX Runtime does not let it be exact."""
        if self.cap is not None and not self.exact:
            import onnxruntime

            covers = (
                "memory cap is kept by ONNX Runtime's arena, in whole chunks"
                if self.arena is not None
                else "memory cap covers the bound buffers only"
            )
            warnings.warn(
                f"onnxruntime {onnxruntime.__version__} does not let the operator library own its "
                f"allocations, so the {covers}; from 1.23 on it is exact.",
                RuntimeWarning,
                stacklevel=3,
            )

    def explain(self, error: Exception, phase: str) -> EdgeBcsError:
        """Turn an ONNX Runtime exception of the graph ``phase`` into one sentence: BudgetExceeded if it was
        that."""
        text = str(error)
        node = _NODE.search(text)
        where = f"the operator {node[1]} '{node[2]}' of the {phase} graph" if node else f"the {phase} graph"
        refusal = _REFUSAL.search(text)
        if refusal:
            asked, in_use, cap = (int(number) for number in refusal.groups())
            return BudgetExceeded(where, asked, in_use, cap, self._needed)
        refusal = _ARENA_REFUSAL.search(text)
        if refusal and self.arena is not None and self.cap is not None:
            left, asked = int(refusal[1]), int(refusal[2])
            return BudgetExceeded(where, asked, self.cap - left, self.cap, self._needed)
        reason = text.rsplit("Status Message:", 1)[-1].strip().splitlines()
        kind = NotFiniteError if "not finite" in text else EdgeBcsError
        return kind(f"{where} refused its input: {reason[0] if reason else type(error).__name__}")
