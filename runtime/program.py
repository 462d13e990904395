"""The engine over `program.bin`: our own runner, one arena, no ONNX Runtime.

The compiler gave every tensor its place, so the working set is the arena, to the byte, from the moment it is
opened; any number of these engines may be open in a process.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import BudgetExceeded
from edge_bcs.runtime.buffers import allocate, bytes_of
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
        "edge_bcs_program_open": (pointer, [text, size, pointer, size, ctypes.c_int, text, size]),
        "edge_bcs_program_buffer": (ctypes.c_int64, [pointer, text, ctypes.POINTER(size)]),
        "edge_bcs_program_run": (ctypes.c_int, [pointer, text, text, size]),
        "edge_bcs_program_close": (None, [pointer]),
    }
    return load(signatures)


def arena_bytes(artifact: Artifact) -> int | None:
    """Bytes of the arena in which the native engine trains an artifact; None for one without a program.

    Raises EdgeBcsError if it was altered.
    """
    if PROGRAM not in artifact.manifest["files"]:
        return None
    content = artifact.read_file(PROGRAM)
    return max(0, _arena_of(content))


def _arena_of(content: bytes) -> int:
    """Bytes of the arena that a program asks for; −1 if it is none."""
    return int(_library().edge_bcs_program_arena(content, len(content)))


@dataclass(frozen=True)
class Arena:
    """The working set of a program: all of it, all the time. See `engine.WorkingSet`."""

    cap: int | None
    current: int

    @property
    def exact(self) -> bool:
        """Every tensor lies in the arena."""
        return True

    @property
    def peak(self) -> int:
        """Bytes of the arena."""
        return self.current

    @property
    def placed(self) -> int:
        """Bytes of the arena."""
        return self.current

    @property
    def placed_peak(self) -> int:
        """Bytes of the arena."""
        return self.current

    def reset_peak(self) -> None:
        """The peak is what it is."""


class ProgramEngine(Engine):
    """Buffers and graphs of one artifact in one arena.

    Raises EdgeBcsError for an artifact without a program or with a damaged one, BudgetExceeded if the arena
    is larger than ``cap`` bytes.
    """

    name = "native"

    def __init__(self, artifact: Artifact, cap: int | None, threads: int | None) -> None:
        super().__init__(artifact, threads)
        self._library = _library()
        self._handle: int | None = None
        if PROGRAM not in artifact.manifest["files"]:
            raise EdgeBcsError(f"{artifact.path} has no {PROGRAM}; export it again, or use ONNX Runtime.")
        content = artifact.read_file(PROGRAM)
        needed = _arena_of(content)
        if cap is not None and needed > cap:
            raise BudgetExceeded("the arena", needed, 0, cap, needed)
        self.budget = Arena(cap, max(needed, 0))
        try:
            self._arena = allocate("uint8", (max(needed, 0),))
        except (MemoryError, ValueError):
            raise EdgeBcsError(
                f"this machine does not have the {needed} bytes of memory for the arena."
            ) from None
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
            content, len(content), arena, self._arena.size, self.threads, said, len(said)
        )
        if not self._handle:
            reason = said.value.decode(errors="replace")
            raise EdgeBcsError(
                f"{self.artifact.path / PROGRAM} cannot be used: {reason}; export the artifact again."
            )

    def _bind(self) -> None:
        """Make every bound buffer a view of the arena."""
        for name, (dtype, shape) in self.table().items():
            size, found = bytes_of(dtype, shape), ctypes.c_uint64()
            address = self._library.edge_bcs_program_buffer(self._handle, name.encode(), ctypes.byref(found))
            if address < 0 or found.value != size:
                raise EdgeBcsError(
                    f"{self.artifact.path / PROGRAM} does not fit the manifest: the buffer {name} should "
                    f"have {size} bytes; export the artifact again."
                )
            self.arrays[name] = self._arena[address : address + size].view(dtype).reshape(shape)
            self.bound_bytes += size

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
