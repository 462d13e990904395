"""Defects put into the planner on purpose: the independent checker of schedules notices each of them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.exporters import compiler
from edge_bcs.exporters.compiler import build
from edge_bcs.exporters.graphs import training_graph
from edge_bcs.exporters.memory import planner, sketch
from edge_bcs.exporters.memory import replay as plan
from edge_bcs.exporters.memory.choice import Choice, Job
from edge_bcs.exporters.memory.planner import Planner
from edge_bcs.exporters.network import Network, network_of
from edge_bcs.exporters.nodes import Node, TensorType
from edge_bcs.exporters.operators.base import Types
from edge_bcs.exporters.operators.convolution import Conv, ConvGrad
from edge_bcs.targets import layout
from edge_bcs.targets.plans import HOLES, Allocation
from helpers import schedule_checker
from helpers.networks import tiny
from helpers.schedule_checker import Checker

from edge_bcs.core.objectives import objective_named


def test_the_checker_shares_no_code_with_the_planner() -> None:
    tree = ast.parse(Path(schedule_checker.__file__).read_text())
    imported = {
        name.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names
    }
    imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "itertools", "math", "onnx", "typing"}


@pytest.fixture(scope="module")
def squeezed() -> Choice:
    """What the planner makes of the network below when memory is all that counts."""
    return replace(
        Planner(small()).smallest(Job(objective_named("trades"), 6.0, 32), 4).choice, sparse=frozenset()
    )


def small() -> Network:
    return network_of(tiny("resnet18", density=0.7), (3, 16, 16))


def checked(choice: Choice | None) -> tuple[list[str], bool]:
    """(faults of the training schedule, whether the peaks agree)."""
    asked, job = Planner(small()), Job(objective_named("trades"), 6.0)
    compiled = build(asked, job, choice or asked.unlimited(job, 4))
    memory = compiled.memory.to_json(None)
    training = memory["phases"]["training"]
    checker = Checker(compiled.graphs["training"].to_onnx(), training["tensors"])
    return checker.faults, checker.peak + memory["bound_bytes"] == training["peak_bytes"]


def test_without_a_defect_nothing_is_found(squeezed: Choice) -> None:
    assert squeezed.storage.recomputed
    assert checked(squeezed) == checked(None) == ([], True)


def freed_early(right: Callable[..., Any]) -> Callable[..., Any]:
    def replay(*arguments: Any) -> plan.Replay:
        made = right(*arguments)
        if not made.allocations:
            return made
        victim = max(made.allocations, key=lambda life: life.death - life.birth)
        made.allocations[made.allocations.index(victim)] = Allocation(
            victim.name, victim.bytes, victim.category, victim.birth, victim.death - 1, victim.type
        )
        return made

    return replay


def forgotten(right: Callable[..., Any]) -> Callable[..., Any]:
    def replay(*arguments: Any) -> plan.Replay:
        made = right(*arguments)
        if made.allocations:
            made.allocations.pop(len(made.allocations) // 2)
        return made

    return replay


@pytest.mark.parametrize(
    ("defect", "fault"),
    [(freed_early, "after it was freed"), (forgotten, "exists and is not planned")],
)
def test_a_replay_that_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, squeezed: Choice, defect: Callable[..., Any], fault: str
) -> None:
    monkeypatch.setattr(planner, "replay_of", defect(plan.replay_of))
    # A tensor that was forgotten has no address, either: the plan alone is looked at here.
    monkeypatch.setattr(compiler, "place", lambda *_: None)
    for choice in (squeezed, None):
        assert any(fault in sentence for sentence in checked(choice)[0])


def test_rules_that_are_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch, squeezed: Choice) -> None:
    with monkeypatch.context() as patch:  # two tensors where only one is: dx overlaps the sums it adds to
        overlapping = replace(ConvGrad.outputs[0], shares="coo_grad")
        patch.setattr(ConvGrad, "outputs", (overlapping, *ConvGrad.outputs[1:]))
        assert checked(squeezed)[0]
    with monkeypatch.context() as patch:  # work memory that nobody counts
        patch.setattr(Conv, "work_bytes", lambda *_: 0)
        assert any("work exists and is not planned" in sentence for sentence in checked(squeezed)[0])
    with monkeypatch.context() as patch:  # a stack that lacks a pixel
        right = Conv.output_types

        def output_types(self: Conv, node: Node, types: Types) -> list[TensorType]:
            (dtype, (blocks, pixels, lanes)), *others = ((t.dtype, t.dims) for t in right(self, node, types))
            return [TensorType(dtype, (blocks, pixels - 1, lanes)), *(TensorType(*other) for other in others)]

        patch.setattr(Conv, "output_types", output_types)
        assert any("is planned as" in sentence for sentence in checked(squeezed)[0])


def test_reading_what_is_not_there_is_noticed() -> None:
    network = network_of(tiny("vgg16"), (3, 16, 16))
    graph = training_graph(network, 2, objective_named("at"))
    tensors = [
        [x.name, x.bytes, x.category, x.birth, x.death]
        for x in plan.replay_of(graph, network.connections).allocations
    ]
    model = graph.to_onnx()
    assert Checker(model, tensors).faults == []
    nodes = list(model.graph.node)
    position = next(i for i, node in enumerate(nodes) if node.op_type == "ConvGrad")
    nodes[position], nodes[position + 1] = nodes[position + 1], nodes[position]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert any("which nothing has written" in sentence for sentence in Checker(model, tensors).faults)


def test_a_sketch_that_frees_early_contradicts_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sketch.Pass.summed

    def early(walk: sketch.Pass) -> sketch.Rewritten:
        walk.last = {allocation: step - 1 for allocation, step in walk.last.items()}
        return right(walk)

    monkeypatch.setattr(sketch.Pass, "summed", early)
    asked, job = Planner(network_of(tiny("resnet18"), (3, 16, 16))), Job(objective_named("at"), 0.0, 32)
    counted = asked.space(job, 4).smallest()[0]
    training = asked.memory(job, counted.choice).phases["training"]
    alive = [step.total() - step[HOLES] for step in training.live()]
    assert counted.totals["training"].max() < asked.space(job, 4).bound_bytes + max(alive)


def test_an_overlap_in_the_map_is_an_overlap() -> None:
    """The addresses of the report: were two tensors to share a byte, the sum of the live ones would exceed
    the block."""
    tensors = [Allocation("a", 64, "x", 0, 2), Allocation("b", 32, "x", 1, 3), Allocation("c", 64, "x", 3, 4)]
    placed = layout.assign(tensors)
    live = sorted(
        (address, address + tensor.bytes)
        for address, tensor in zip(placed.addresses, tensors, strict=True)
        if tensor.birth <= 1 <= tensor.death
    )
    assert live == [(0, 64), (64, 96)]
