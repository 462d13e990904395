"""`program.bin`: the graphs as they are, and every tensor at a place of its own."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edge_bcs.exporters.compiler import build, compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.memory.planner import Planner
from edge_bcs.exporters.network import network_of
from edge_bcs.runtime import Artifact, Trainer
from edge_bcs.runtime.program import arena_bytes
from edge_bcs.targets.layout import assign, layout_of
from edge_bcs.targets.plans import HOLES, Allocation, plan_of
from helpers.artifacts import tiny_network
from helpers.networks import EveryLayer, tiny
from helpers.program_reader import Program, faults, read_program

import edge_bcs
from edge_bcs import EdgeBcsError, Memory, models
from edge_bcs.core.objectives import objective_named

Make = Callable[..., Path]


def program_of(folder: Path) -> Program:
    return read_program((folder / "program.bin").read_bytes())


@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_it_has_the_graphs_of_the_onnx_files(tiny_artifact: Make, objective: str, batch_norm: str) -> None:
    folder = tiny_artifact(objective=objective, batch_norm=batch_norm)
    graphs = {graph.name: graph for graph in program_of(folder).graphs}
    assert set(graphs) == {"training", "attack", "eval", "optimizer", "lists"}
    for name, graph in graphs.items():
        model = onnx.load(folder / f"{name}_model.onnx")
        assert [node.name for node in graph.nodes] == [node.name for node in model.graph.node]
        for found, node in zip(graph.nodes, model.graph.node, strict=True):
            assert found.operator == node.op_type
            for places, names in ((found.inputs, node.input), (found.outputs, node.output)):
                assert ["" if p < 0 else graph.tensors[p].name for p in places] == list(names)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            expected = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
            assert found.attributes == expected


def test_nothing_lies_where_something_else_is_needed(tmp_path: Path) -> None:
    sparse = edge_bcs.sparsify(EveryLayer(), 0.5, 0)
    for number, (objective, batch_norm) in enumerate(
        [("at", "frozen"), ("trades", "batch"), ("mart", "frozen")]
    ):
        folder = tmp_path / str(number)
        memory = Memory(micro_batch=3)
        shape = (2, 16, 16)
        edge_bcs.export(
            sparse, folder, objective, shape, batch_norm=batch_norm, memory=memory, validate=False
        )
        assert faults(program_of(folder)) == []


def test_the_checker_finds_what_is_wrong(tiny_artifact: Make) -> None:
    """Each tensor of the training graph that is moved onto its neighbour is told of."""
    program = program_of(tiny_artifact())
    bound_end = max(buffer.end for buffer in program.buffers)
    graph = program.graphs[0]
    found = 0
    for place, tensor in enumerate(graph.tensors):
        if tensor.address < bound_end:
            continue
        for other in graph.tensors:
            if other.address < bound_end or other.address == tensor.address:
                continue
            moved = [*graph.tensors]
            moved[place] = replace(tensor, address=other.address)
            found += bool(faults(replace(program, graphs=[replace(graph, tensors=moved)])))
    assert found > len(graph.tensors)


@pytest.mark.parametrize("memory", [None, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_the_arena_is_what_lives_at_once_and_few_holes(tmp_path: Path, memory: int | None) -> None:
    sparse = edge_bcs.sparsify(models.resnet50(num_classes=10, width=0.125), 0.8, 0)
    artifact = edge_bcs.export(sparse, tmp_path / "a", "trades", memory=memory, validate=False)
    plan = plan_of(artifact.manifest["memory"])
    assert program_of(artifact.path).arena == artifact.predicted_peak_bytes == plan.peak_bytes
    # Each of the bound buffers, and each tensor alive at the peak, is rounded up to 64 bytes.
    alive = [step.total() - step[HOLES] for phase in plan.phases.values() for step in phase.live()]
    assert plan.peak_bytes <= 1.03 * (sum(plan.bound.values()) + max(alive)) + 64 * 100


def test_the_map_shows_the_addresses_of_the_program(tiny_artifact: Make) -> None:
    folder = tiny_artifact()
    program = program_of(folder)
    plan = plan_of(Artifact.read(folder).manifest["memory"])
    bound_end = max(-(-buffer.end // 64) * 64 for buffer in program.buffers)
    for graph in program.graphs:
        layout = layout_of(plan.phases[graph.name])
        shown = {t.name: bound_end + a for t, a in zip(layout.tensors, layout.addresses, strict=True)}
        placed = {tensor.name: tensor.address for tensor in graph.tensors}
        assert {name: address for name, address in shown.items() if name in placed} == {
            name: placed[name] for name in shown if name in placed
        }


def test_lives_like_brackets_leave_no_hole() -> None:
    """A forward pass keeps tensors that a backward pass reads in reverse, with large ones in passing."""
    kept = [Allocation(f"k{i}", 64 * (i + 1), "kept", i, 19 - i) for i in range(10)]
    passing = [Allocation(f"p{i}", 640, "passing", i, i) for i in range(20)]
    layout = assign([*kept, *passing])
    assert layout.extent == layout.live == sum(64 * (i + 1) for i in range(10)) + 640


@pytest.mark.parametrize("seed", range(5))
def test_no_placement_overlaps(seed: int) -> None:
    rng = random.Random(seed)
    tensors = []
    for number in range(60):
        birth = rng.randrange(40)
        tensors.append(Allocation(str(number), rng.randrange(1, 999), "a", birth, rng.randrange(birth, 40)))
    layout = assign(tensors)
    assert all(address % 64 == 0 for address in layout.addresses)
    for step in range(40):
        lives = sorted(
            (address, address + tensor.bytes)
            for address, tensor in zip(layout.addresses, tensors, strict=True)
            if tensor.birth <= step <= tensor.death
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(lives))


@pytest.mark.skipif(shutil.which("flatc") is None, reason="flatc is not installed")
def test_flatc_reads_it(tiny_artifact: Make, tmp_path: Path) -> None:
    schema = Path(__file__).parents[2] / "runtime" / "native" / "runner" / "program.fbs"
    command = ["flatc", "--json", "--strict-json", "--raw-binary", "-o", str(tmp_path), str(schema), "--"]
    folder = tiny_artifact()
    subprocess.run([*command, str(folder / "program.bin")], check=True)
    found: dict[str, Any] = json.loads((tmp_path / "program.json").read_text())
    program = program_of(folder)
    assert found["arena_bytes"] == program.arena
    assert [graph["name"] for graph in found["graphs"]] == [graph.name for graph in program.graphs]
    for graph, read in zip(found["graphs"], program.graphs, strict=True):
        assert [t.get("address", 0) for t in graph["tensors"]] == [t.address for t in read.tensors]
        assert [node["operator"] for node in graph["nodes"]] == [node.operator for node in read.nodes]


def test_a_budget_holds_with_what_lies_between_tensors(tmp_path: Path) -> None:
    """Plans that fit by count alone are passed over where another one fits as it is placed."""
    network = network_of(tiny("vgg16"), (3, 16, 16), False)
    job, planner, passed_over = Job(objective_named("at")), Planner(network), 0
    smallest = planner.smallest(job).peak_bytes
    for budget in (smallest, 3 * smallest // 2, 5 * smallest // 2):
        compiled = compile_network(network, job, budget=budget)
        assert compiled.memory.peak_bytes == compiled.program.arena_bytes <= budget
        figures = planner.fastest_counted(job, budget)
        assert figures is not None
        passed_over += build(planner, job, figures.choice).program.arena_bytes > budget
    assert passed_over
    with pytest.raises(EdgeBcsError, match=f"smallest feasible budget is {smallest} bytes"):
        compile_network(network, job, budget=smallest - 1)


def test_the_native_engine_trains_inside_the_budget(tmp_path: Path) -> None:
    sparse = edge_bcs.sparsify(tiny_network(), 0.5, seed=0, distribution="uniform")
    budget = 24_768  # the smallest arena; what is alive at once in the fastest plan by count is less
    artifact = edge_bcs.export(sparse, tmp_path / "a", "at", (1, 8, 8), memory=budget, validate=False)
    with Trainer(artifact.path, engine="native") as trainer:
        trainer.step(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
        assert artifact.predicted_peak_bytes == trainer.peak_bytes == arena_bytes(artifact) <= budget
