"""The planner's word against a checker that shares none of its code, over networks, objectives and
statistics."""

from __future__ import annotations

import copy
import json
from typing import Any

import onnx
import pytest
from edge_bcs.exporters.compiler import compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.network import network_of
from edge_bcs.targets.plans import plan_of
from helpers.networks import EveryLayer, sparse_of, tiny
from helpers.schedule_checker import Checker

from edge_bcs.core.objectives import objective_named

PHASES = ("training", "attack", "eval", "optimizer", "lists")


def compiled(
    name: str, objective: str = "at", batch_statistics: bool = False, micro_batch: int = 4
) -> tuple[dict[str, onnx.ModelProto], dict[str, Any]]:
    """(phase → graph file, the manifest's memory object) of a small network."""
    sparse = sparse_of(EveryLayer()) if name == "every layer" else tiny(name)
    shape = (2, 13, 13) if name == "every layer" else (3, 16, 16)
    result = compile_network(
        network_of(sparse, shape, batch_statistics), Job(objective_named(objective), 6.0), micro_batch
    )
    return {phase: graph.to_onnx() for phase, graph in result.graphs.items()}, result.memory.to_json(None)


def check(models: dict[str, onnx.ModelProto], memory: dict[str, Any]) -> int:
    """The working set as the checker finds it; fails on any fault."""
    peaks = []
    for phase in PHASES:
        plan = memory["phases"][phase]
        checker = Checker(models[phase], plan["tensors"])
        assert not checker.faults, (phase, checker.faults)
        assert plan["nodes"] == [node.name for node in models[phase].graph.node]
        assert plan["peak_bytes"] == memory["bound_bytes"] + checker.peak, phase
        peaks.append(checker.peak)
    return sum(-(-size // 64) * 64 for size in memory["bound"].values()) + max(peaks)


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart"])
@pytest.mark.parametrize("name", ["vgg16", "resnet18", "wrn28_2", "every layer"])
def test_the_plan_is_what_the_graphs_need(name: str, objective: str, batch_statistics: bool) -> None:
    models, memory = compiled(name, objective, batch_statistics)
    assert check(models, memory) == memory["predicted_peak_bytes"]


@pytest.mark.parametrize("micro_batch", [1, 3, 16, 24])
def test_every_way_of_filling_vectors(micro_batch: int) -> None:
    models, memory = compiled("resnet18", "trades", micro_batch=micro_batch)
    assert check(models, memory) == memory["predicted_peak_bytes"]


def test_what_is_written_is_what_is_read() -> None:
    network = network_of(sparse_of(EveryLayer()), (2, 13, 13), True)
    memory = compile_network(network, Job(objective_named("trades"), 6.0), 4).memory
    assert plan_of(json.loads(json.dumps(memory.to_json(None)))) == memory


def test_the_checker_is_not_fooled() -> None:
    models, memory = compiled("vgg16")
    good = memory["phases"]["training"]["tensors"]
    victim = max(range(len(good)), key=lambda position: good[position][4] - good[position][3])

    def faults(change: Any) -> str:
        tensors = copy.deepcopy(good)
        change(tensors)
        return " ".join(Checker(models["training"], tensors).faults)

    assert faults(lambda tensors: None) == ""
    assert "after it was freed" in faults(lambda tensors: tensors[victim].__setitem__(4, good[victim][4] - 1))
    assert "before its memory exists" in faults(
        lambda tensors: tensors[victim].__setitem__(3, good[victim][3] + 1)
    )
    assert "is planned as" in faults(lambda tensors: tensors[victim].__setitem__(1, good[victim][1] - 4))
    assert "exists and is not planned" in faults(lambda tensors: tensors.pop(victim))
    together = (i for i, t in enumerate(good) if t[3] <= good[victim][4] and good[victim][3] <= t[4])
    other = next(i for i in together if i != victim)
    assert "lie at one place at one time" in faults(
        lambda tensors: tensors[other].__setitem__(6, good[victim][6])
    )


def test_reading_what_was_overwritten_is_a_fault() -> None:
    models, memory = compiled("vgg16")
    model = models["training"]
    chained = [node for node in model.graph.node if node.op_type == "ConvGrad"]
    assert chained[1].input[6] == chained[0].output[1]
    chained[1].input[6] = chained[0].input[6]  # adds to the sums before the previous layer's, now overwritten
    faults = " ".join(Checker(model, memory["phases"]["training"]["tensors"]).faults)
    assert "overwritten in place" in faults


def test_arithmetic_of_a_layer_by_hand() -> None:
    models, memory = compiled("vgg16", micro_batch=4)
    plan = memory["phases"]["eval"]
    first = next(node for node in models["eval"].graph.node if node.op_type == "Conv")
    # Width 1/16 of VGG-16 has 4 channels: 3 → 4, 3×3, on 16×16 images; half of its 108 weights are active,
    # enough for a dense kernel, which unpacks all of them and reads them again.
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in first.attribute}
    assert (attributes["algorithm"], attributes["out_channels"]) == (b"dense", 4)
    position, weights, active = plan["nodes"].index(first.name), 108, 54
    assert plan["flops"][position] == 2 * weights * (16 * 16) * 4
    # Moved: both stacks with their halos of one pixel, scale and shift aside, and the connections.
    stacks = 4 * 4 * sum(1 * 17 + 1 + channels * 17 * 17 for channels in (3, 4))
    assert abs(plan["bytes"][position] - stacks - 8 * active - 8 * weights) <= 8 * 40
