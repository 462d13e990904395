"""The engine over `program.bin`: our own runner, one arena, no ONNX Runtime.

The compiler gave every tensor its place, so the working set is the arena, to the byte, from the moment it is
opened; any number of these engines may be open in a process. An attack that no training of the artifact runs
may need more; pages of the arena that nothing has touched are not resident.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import BudgetExceeded
from edge_bcs.runtime.buffers import arena_for, bound_in
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.library import load
from edge_bcs.runtime.manifest import PROGRAM

from edge_bcs.core.errors import EdgeBcsError

_LONGEST_ERROR = 2000  # bytes


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    text, size, pointer = ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "edge_bcs_program_arena": (ctypes.c_int64, [text, size]),
        "edge_bcs_program_open": (
            pointer,
            [text, size, pointer, size, ctypes.c_int, ctypes.c_int, text, size],
        ),
        "edge_bcs_program_buffer": (ctypes.c_int64, [pointer, text, ctypes.POINTER(size)]),
        "edge_bcs_program_run": (ctypes.c_int, [pointer, text, text, size]),
        "edge_bcs_program_close": (None, [pointer]),
    }
    return load(signatures)


def arena_bytes(artifact: Artifact) -> int | None:
    """Bytes of the arena in which an artifact is trained; None for one without a program.

    Raises EdgeBcsError if it was altered.
    """
    if PROGRAM not in artifact.manifest["files"]:
        return None
    if artifact.placed:
        return artifact.predicted_peak_bytes
    return arena_of(artifact, artifact.read_file(PROGRAM))


def arena_of(artifact: Artifact, program: bytes) -> int:
    """Bytes of the arena in which every graph of ``program``, that of an artifact, has room.

    Raises EdgeBcsError if it is no program, or not that of the artifact's plan.
    """
    found = int(_library().edge_bcs_program_arena(program, len(program)))
    planned = max(artifact.predicted_peak_bytes, artifact.attack_bytes)
    if found >= 0 and artifact.placed and found != planned:
        raise EdgeBcsError(
            f"{artifact.path / PROGRAM} does not fit the manifest: it needs {found} bytes, and the plan has "
            f"{planned}; export the artifact again."
        )
    return max(found, 0)  # what is none is refused when it is opened


@dataclass
class Arena:
    """The working set of a program: all of it, all the time. See `engine.WorkingSet`.

    Attributes:
        current: bytes that a training takes. peak: the same, or what a larger graph took meanwhile.
    """

    cap: int | None
    current: int
    peak: int = 0

    def __post_init__(self) -> None:
        self.reset_peak()

    @property
    def exact(self) -> bool:
        """Every tensor lies in the arena."""
        return True

    @property
    def placed(self) -> int:
        """Bytes of the arena."""
        return self.current

    @property
    def placed_peak(self) -> int:
        """See `peak`."""
        return self.peak

    def reset_peak(self) -> None:
        """The peak is what a training takes."""
        self.peak = self.current


class ProgramEngine(Engine):
    """Buffers and graphs of one artifact in one arena.

    Raises EdgeBcsError for an artifact without a program or with a damaged one, BudgetExceeded if the arena
    is larger than ``cap`` bytes.
    """

    name = "native"
    budget: Arena

    def __init__(self, artifact: Artifact, cap: int | None, threads: int | None, half: bool = False) -> None:
        super().__init__(artifact, threads, half)
        self._library = _library()
        self._handle: int | None = None
        if PROGRAM not in artifact.manifest["files"]:
            raise EdgeBcsError(f"{artifact.path} has no {PROGRAM}; export it again, or use ONNX Runtime.")
        content = artifact.read_file(PROGRAM)
        whole = arena_of(artifact, content)
        needed = artifact.predicted_peak_bytes if artifact.placed else whole
        if cap is not None and needed > cap:
            raise BudgetExceeded("the arena", needed, 0, cap, needed)
        self.budget = Arena(cap, needed)
        self._arena = arena_for(whole)
        try:
            self._open(content)
            self._bind()
            self.metadata = self.load_state()
            self.open_graphs()
        except BaseException:
            self.close()
            raise

    def _open(self, content: bytes) -> None:
        said = ctypes.create_string_buffer(_LONGEST_ERROR)
        arena = self._arena.ctypes.data
        self._handle = self._library.edge_bcs_program_open(
            content, len(content), arena, self._arena.size, self.threads, self.half, said, len(said)
        )
        if not self._handle:
            reason = said.value.decode(errors="replace")
            raise EdgeBcsError(
                f"{self.artifact.path / PROGRAM} cannot be used: {reason}; export the artifact again."
            )

    def _bind(self) -> None:
        """Make every bound buffer a view of the arena."""
        file = self.artifact.path / PROGRAM
        self.arrays, self.bound_bytes = bound_in(self._arena, self.table(), self._place_of, file)

    def _place_of(self, buffer: str) -> tuple[int, int]:
        size = ctypes.c_uint64()
        address = self._library.edge_bcs_program_buffer(self._handle, buffer.encode(), ctypes.byref(size))
        return int(address), size.value

    def open_graphs(self) -> None:
        """See `Engine`."""
        self.run("lists")

    def close_graphs(self) -> None:
        """See `Engine`: there is nothing to give back before the graphs are made ready again."""
        self._require_open()

    def _require_open(self) -> None:
        if not self._handle:
            raise EdgeBcsError("this Trainer is closed.")

    def run_graph(self, graph: str) -> None:
        """See `Engine`."""
        self._require_open()
        self.require_room(graph)
        self.budget.peak = max(self.budget.peak, self.artifact.peak_of(graph))
        said = ctypes.create_string_buffer(_LONGEST_ERROR)
        if self._library.edge_bcs_program_run(self._handle, graph.encode(), said, len(said)) != 0:
            reason = said.value.decode(errors="replace")
            raise (NotFiniteError if "not finite" in reason else EdgeBcsError)(reason)

    def close(self) -> None:
        """See `Engine`."""
        with self.running:
            if self._handle:
                self._library.edge_bcs_program_close(self._handle)
                self._handle = None
