"""The runner and files that nobody wrote: refused with a sentence, never followed."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime.library import library_path
from helpers.program_reader import read_program

Make = Callable[..., Path]


def opened(content: bytes, arena: int) -> str:
    """Opens and runs a program; "" if that went well, else what the library says."""
    library = ctypes.CDLL(str(library_path()))
    size, text = ctypes.c_uint64, ctypes.c_char_p
    library.edge_bcs_program_open.restype = ctypes.c_void_p
    library.edge_bcs_program_open.argtypes = [text, size, ctypes.c_void_p, size, ctypes.c_int, text, size]
    library.edge_bcs_program_run.argtypes = [ctypes.c_void_p, text, text, size]
    library.edge_bcs_program_close.argtypes = [ctypes.c_void_p]
    memory = np.zeros(arena + 64, np.uint8)
    first = memory.ctypes.data + -memory.ctypes.data % 64
    said = ctypes.create_string_buffer(500)
    handle = library.edge_bcs_program_open(content, len(content), first, arena, 2, said, len(said))
    if not handle:
        assert said.value
        return said.value.decode(errors="replace")
    found = ""
    for graph in (b"lists", b"eval", b"attack", b"training", b"optimizer"):
        if library.edge_bcs_program_run(handle, graph, said, len(said)) != 0:
            found = said.value.decode(errors="replace")
            assert found
    library.edge_bcs_program_close(handle)
    return found


@pytest.fixture(scope="module")
def program(tiny_artifact: Make) -> bytes:
    return (tiny_artifact(objective="trades", batch_norm="batch") / "program.bin").read_bytes()


def test_a_file_that_ends_early_is_refused(program: bytes) -> None:
    arena = read_program(program).arena
    for length in [*range(0, 64), *range(64, len(program) - 1, max(1, len(program) // 100))]:
        assert opened(program[:length], arena)


def test_an_arena_that_is_too_small_is_refused(program: bytes) -> None:
    arena = read_program(program).arena
    assert f"the arena has {arena - 1} bytes, and the program needs {arena}" in opened(program, arena - 1)


@pytest.mark.parametrize("seed", range(3))
def test_changed_bytes_are_refused_or_harmless(program: bytes, seed: int) -> None:
    """That no byte outside the arena is read or written is for the sanitizers to say."""
    rng = random.Random(seed)
    arena = read_program(program).arena
    refused = 0
    for _ in range(150):
        changed = bytearray(program)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(changed))
            changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, changed[place] ^ (1 << rng.randrange(8))])
        refused += bool(opened(bytes(changed), arena))
    assert refused > 20


def test_a_program_of_another_time_says_so(program: bytes) -> None:
    changed = bytearray(program)
    root = int.from_bytes(program[:4], "little")
    fields = root - int.from_bytes(program[root : root + 4], "little", signed=True)
    version = root + int.from_bytes(program[fields + 4 : fields + 6], "little")
    changed[version] = 9
    said = opened(bytes(changed), read_program(program).arena)
    assert "the program has version 9, and this library reads version 1" in said
