"""The runner and files that nobody wrote: refused with a sentence, never followed."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.exporters.compiler import compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.network import network_of
from edge_bcs.exporters.program import Placed, PlacedNode, Program
from edge_bcs.runtime.library import library_path
from helpers.networks import EveryLayer
from helpers.program_reader import read_program

import edge_bcs
from edge_bcs.core.objectives import objective_named

Make = Callable[..., Path]


def opened(content: bytes, arena: int) -> str:
    """Opens and runs a program; "" if that went well, else what the library says, a line a graph."""
    library = ctypes.CDLL(str(library_path()))
    size, text = ctypes.c_uint64, ctypes.c_char_p
    library.edge_bcs_program_open.restype = ctypes.c_void_p
    library.edge_bcs_program_open.argtypes = [
        text,
        size,
        ctypes.c_void_p,
        size,
        ctypes.c_int,
        ctypes.c_int,
        text,
        size,
    ]
    library.edge_bcs_program_run.argtypes = [ctypes.c_void_p, text, text, size]
    library.edge_bcs_program_close.argtypes = [ctypes.c_void_p]
    memory = np.zeros(arena + 64, np.uint8)
    first = memory.ctypes.data + -memory.ctypes.data % 64
    said = ctypes.create_string_buffer(500)
    handle = library.edge_bcs_program_open(content, len(content), first, arena, 2, 0, said, len(said))
    if not handle:
        assert said.value
        return said.value.decode(errors="replace")
    found = []
    for graph in (b"lists", b"eval", b"attack", b"training", b"optimizer"):
        if library.edge_bcs_program_run(handle, graph, said, len(said)) != 0:
            assert said.value
            found.append(said.value.decode(errors="replace"))
    library.edge_bcs_program_close(handle)
    return "\n".join(found)


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


# One rule broken at a time, in a program that is right but for that


@pytest.fixture(scope="module")
def right() -> Program:
    network = network_of(edge_bcs.sparsify(EveryLayer(), 0.5, 0), (2, 13, 13))
    return compile_network(network, Job(objective_named("at")), micro_batch=2).program


def with_tensor(program: Program, place: int, **changes: object) -> bytes:
    graph = program.graphs[0]
    tensors = [*graph.tensors]
    tensors[place] = replace(tensors[place], **changes)  # type: ignore[arg-type]
    return replace(program, graphs=(replace(graph, tensors=tuple(tensors)), *program.graphs[1:])).dump()


def with_node(program: Program, step: int, **changes: object) -> bytes:
    graph = program.graphs[0]
    nodes = [*graph.nodes]
    nodes[step] = replace(nodes[step], **changes)  # type: ignore[arg-type]
    return replace(program, graphs=(replace(graph, nodes=tuple(nodes)), *program.graphs[1:])).dump()


def passing(program: Program) -> tuple[int, PlacedNode, Placed, Placed]:
    """A node of the first graph that reads and writes memory of its own: (step, node, input, output)."""
    graph, end = program.graphs[0], max(b.address + b.type.bytes for b in program.buffers)
    for step, node in enumerate(graph.nodes):
        read, written = graph.tensors[node.inputs[0]], graph.tensors[node.outputs[0]]
        if min(read.address, written.address) >= end and read.address != written.address:
            return step, node, read, written
    raise AssertionError("there is none")


def test_a_right_program_is_opened(right: Program) -> None:
    assert "the file" not in opened(right.dump(), right.arena_bytes)


def test_a_tensor_outside_of_the_arena(right: Program) -> None:
    _, node, _, _ = passing(right)
    for address in (right.arena_bytes // 64 * 64, 1 << 40, 1 << 63):
        said = opened(with_tensor(right, node.outputs[0], address=address), right.arena_bytes)
        assert "does not lie in the arena" in said


def test_a_tensor_that_begins_between_lines(right: Program) -> None:
    _, node, _, written = passing(right)
    said = opened(with_tensor(right, node.outputs[0], address=written.address + 4), right.arena_bytes)
    assert "does not lie in the arena" in said


def test_a_tensor_across_a_buffer(right: Program) -> None:
    _, node, _, _ = passing(right)
    lists = next(b for b in right.buffers if b.name == "coo.lists")
    said = opened(with_tensor(right, node.outputs[0], address=lists.address), right.arena_bytes)
    assert "lies across a buffer" in said


def test_an_operator_that_writes_where_it_reads(right: Program) -> None:
    _, node, read, _ = passing(right)
    said = opened(with_tensor(right, node.outputs[0], address=read.address), right.arena_bytes)
    assert "writes where it reads" in said


def test_two_outputs_at_one_place(right: Program) -> None:
    step, node = next(
        (i, n) for i, n in enumerate(right.graphs[0].nodes) if sum(place >= 0 for place in n.outputs) > 1
    )
    outputs = [place for place in node.outputs if place >= 0]
    first = right.graphs[0].tensors[outputs[0]]
    said = opened(with_tensor(right, outputs[1], address=first.address), right.arena_bytes)
    assert f"node {node.node.name} writes" in said and step >= 0


def test_work_memory_across_tensors_or_outside(right: Program) -> None:
    step, _, read, written = passing(right)
    for tensor in (read, written):
        said = opened(with_node(right, step, work_address=tensor.address, work_bytes=64), right.arena_bytes)
        assert "work memory" in said and "lies across its tensors" in said
    for address in (0, right.arena_bytes // 64 * 64):
        said = opened(with_node(right, step, work_address=address, work_bytes=4096), right.arena_bytes)
        assert "work memory" in said and "does not lie in the arena" in said


def test_a_node_that_names_what_is_not_there(right: Program) -> None:
    step, node, _, _ = passing(right)
    for place in (len(right.graphs[0].tensors), 1 << 30, -2):
        said = opened(with_node(right, step, inputs=(place, *node.inputs[1:])), right.arena_bytes)
        assert "names a tensor that is not there" in said


def test_more_tensors_than_ports(right: Program) -> None:
    step, node, _, _ = passing(right)
    said = opened(with_node(right, step, inputs=node.inputs + (-1,) * 40), right.arena_bytes)
    assert "has more tensors than" in said


def test_a_tensor_of_another_type(right: Program) -> None:
    _, node, _, written = passing(right)
    other = replace(written.type, dtype="i32")
    said = opened(with_tensor(right, node.outputs[0], type=other), right.arena_bytes)
    assert "is given a tensor of another type" in said


def test_dimensions_that_are_not_the_operators(right: Program) -> None:
    """Found when it runs: the operator says what it writes."""
    _, node, _, written = passing(right)
    other = replace(written.type, dims=(1, *written.type.dims))
    said = opened(with_tensor(right, node.outputs[0], type=other), right.arena_bytes)
    assert any("of the training graph" in line and "dimensions" in line for line in said.splitlines())


def test_buffers_that_overlap(right: Program) -> None:
    first, second, *others = right.buffers
    changed = replace(right, buffers=(first, replace(second, address=first.address), *others))
    assert "lies across the one before it" in opened(changed.dump(), right.arena_bytes)


def test_an_operator_that_nobody_knows(right: Program) -> None:
    step, node, _, _ = passing(right)
    said = opened(with_node(right, step, node=replace(node.node, operator="Mine")), right.arena_bytes)
    assert "the operator Mine is not known" in said


def test_what_waits_for_itself_is_no_fault() -> None:
    """A tensor that is computed a second time may be its own token, which nobody reads."""
    network = network_of(edge_bcs.sparsify(EveryLayer(), 0.5, 0), (2, 13, 13))
    right = compile_network(network, Job(objective_named("trades")), micro_batch=2).program
    nodes = right.graphs[0].nodes
    step, node = next((step, node) for step, node in enumerate(nodes) if node.node.operator == "After")
    itself = with_node(right, step, inputs=(node.inputs[0], node.inputs[0]))
    assert "writes where it reads" not in opened(itself, right.arena_bytes)
