"""How the compiler says that a convolution is to be computed, and what follows from it: by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edge_bcs.exporters.artifact import export
from edge_bcs.exporters.nodes import Node, TensorType
from edge_bcs.exporters.operators import OPERATORS
from edge_bcs.exporters.operators.base import stack_type
from edge_bcs.exporters.operators.convolution import algorithm
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import sha256_of
from edge_bcs.targets.simulator import simulate

import edge_bcs

LAYER: dict[str, Any] = {
    "in_channels": 8,
    "in_height": 8,
    "in_width": 8,
    "out_channels": 9,
    "out_height": 8,
    "out_width": 8,
    "kernel": [3, 3],
    "strides": [1, 1],
    "pads": [1, 1, 1, 1],
    "dilations": [1, 1],
    "groups": 1,
    "lanes": 16,
}


def test_a_dense_layer_with_a_channel_a_group_goes_plane_by_plane() -> None:
    layer = LAYER | {"groups": 8, "out_channels": 16}
    assert {algorithm("dense", layer, side) for side in ("out_", "in_", "")} == {"depthwise"}
    assert algorithm("depthwise", layer, "in_") == "depthwise"
    assert algorithm("sparse", layer, "out_") == "sparse"
    assert algorithm("dense", LAYER | {"in_channels": 1, "out_channels": 1}, "out_") == "dense"


@pytest.mark.parametrize(
    ("changes", "forwards", "to_input"),
    [
        ({}, "winograd", "winograd"),
        ({"kernel": [1, 3], "lanes": 32}, "winograd", "winograd"),
        ({"in_height": 1, "out_height": 1}, "winograd", "winograd"),  # rows are what counts
        ({"kernel": [3, 1]}, "dense", "dense"),
        ({"kernel": [3, 5]}, "dense", "dense"),
        ({"strides": [2, 2], "in_width": 16}, "dense", "dense"),
        ({"strides": [2, 1], "in_height": 16}, "dense", "dense"),
        ({"dilations": [1, 2]}, "dense", "dense"),
        ({"in_channels": 16, "out_channels": 16, "groups": 2}, "winograd", "winograd"),
        ({"in_channels": 16, "out_channels": 16, "groups": 4}, "dense", "dense"),
        ({"lanes": 8}, "dense", "dense"),
        ({"lanes": 24}, "dense", "dense"),
        ({"in_channels": 7}, "dense", "dense"),
        ({"out_channels": 7}, "dense", "dense"),
        ({"in_width": 4, "out_width": 4}, "dense", "dense"),
        ({"in_width": 10, "pads": [0] * 4}, "winograd", "dense"),
        ({"out_width": 10, "pads": [2] * 4}, "dense", "winograd"),
    ],
)
def test_which_walks_take_winograds_products(changes: dict[str, Any], forwards: str, to_input: str) -> None:
    attributes = LAYER | changes
    assert algorithm("dense", attributes, "out_") == algorithm("winograd", attributes, "out_") == forwards
    assert algorithm("dense", attributes, "in_") == algorithm("winograd", attributes, "in_") == to_input
    assert algorithm("winograd", attributes, "") == "dense"
    assert {algorithm("sparse", attributes, side) for side in ("out_", "in_", "")} == {"sparse"}
    # And where ONNX Runtime makes the gradient's node, from the attributes in the file.
    layer = attributes | {
        "in_halo": 1,
        "out_halo": 1,
    }
    for kernel, expected in (("dense", to_input), ("winograd", to_input), ("sparse", "sparse")):
        completed = OPERATORS["ConvGrad"].complete(layer | {"algorithm": kernel}, "")
        assert completed.attributes["algorithm"] == expected


def test_work_and_walks_follow_from_the_attribute_alone() -> None:
    types = {"stack": TensorType("f32", (2, 1, 1))}
    weights = 8 * 9 * 9
    for kernel, entries, floats, to_values in (
        ("sparse", 5, 0, "sparse_gradient"),
        ("dense", weights, weights, "dense_gradient"),
        ("winograd", weights, weights // 3 * 4, "dense_gradient"),
    ):
        for operator, kernels in (
            ("Conv", [kernel]),
            ("ConvInputGrad", [kernel]),
            ("ConvGrad", [kernel, to_values]),
        ):
            # Lanes and widths that nothing suits: it is not asked for again.
            node = Node(operator, ["stack"], ["result"], LAYER | {"lanes": 1, "algorithm": kernel}, "it")
            rule = OPERATORS[operator]
            assert rule.work_bytes(node, types) == 4 * floats
            walks = rule.walks(node, types, lambda _: 5)
            assert [walk.kernel for walk in walks] == kernels
            assert {(walk.entries, walk.rows, walk.floats) for walk in walks} == {(entries, 16, 8)}
            without = rule.without_work(node)
            assert (without is None) == (kernel == "sparse")
            assert without is None or without.attributes["algorithm"] == "sparse"


def padded() -> edge_bcs.SparseModel:
    """Rows of 8, 10, 8 and 8 pixels, and a first layer whose input has too few planes."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=2), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=0), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(12 * 64, 3),
    )  # fmt: skip
    return edge_bcs.sparsify(network, sparsity=0.1, seed=0, distribution="uniform")


def written(folder: Path, graph: str, operator: str) -> list[str]:
    """The attribute of a graph's nodes of this type, in the order of the layers."""
    nodes = [
        node for node in onnx.load(folder / f"{graph}_model.onnx").graph.node if node.op_type == operator
    ]
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
    attributes.sort(key=lambda a: a["layer_offset"])
    return [a["algorithm"].decode() for a in attributes]


def test_each_operator_of_a_graph_says_how_its_own_walk_is_computed(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective": "at",
        "memory": edge_bcs.Memory(micro_batch=16),
        "validate": False,
    }
    export(padded(), tmp_path / "a", input_shape=(3, 8, 8), **options)
    forwards = ["dense", "dense", "winograd", "winograd", "dense"]
    to_input = ["dense", "winograd", "dense", "winograd", "dense"]
    for graph in ("training", "attack", "eval"):
        assert written(tmp_path / "a", graph, "Conv") == forwards
    assert written(tmp_path / "a", "attack", "ConvInputGrad") == to_input
    assert written(tmp_path / "a", "training", "ConvGrad") == to_input
    export(
        padded(),
        tmp_path / "b",
        input_shape=(3, 8, 8),
        **options | {"memory": edge_bcs.Memory(micro_batch=8)},
    )
    assert set(written(tmp_path / "b", "training", "Conv")) == {"dense"}


def test_an_artifact_that_says_dense_everywhere_runs_in_what_it_predicts(tmp_path: Path) -> None:
    """As the compiler wrote it before it said "winograd": with the room for it, but without the word."""
    folder = tmp_path / "a"
    options: dict[str, Any] = {
        "objective": "at",
        "memory": edge_bcs.Memory(micro_batch=16),
        "batch_size": 16,
        "validate": False,
    }
    export(padded(), folder, input_shape=(3, 8, 8), **options)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in ("training_model.onnx", "attack_model.onnx", "eval_model.onnx"):
        model = onnx.load(folder / file)
        for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
            if attribute.s == b"winograd":
                attribute.s = b"dense"
        onnx.save(model, folder / file)
        manifest["files"][file] = {
            "sha256": sha256_of(folder / file),
            "bytes": (folder / file).stat().st_size,
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    predicted = manifest["memory"]["predicted_peak_bytes"]
    images = np.random.default_rng(0).random((16, 3, 8, 8), np.float32)
    with Trainer(folder, memory=predicted) as trainer:
        assert np.isfinite(trainer.step(images, np.arange(16) % 3)["loss"])
        assert trainer.memory()["peak_bytes"] < predicted
    found = simulate(folder, seconds=0.1)
    assert found.measured_peak_bytes is not None and found.measured_peak_bytes < predicted
    assert not found.exceeded


def test_a_stack_that_the_kernels_do_not_reach_is_refused_in_one_sentence() -> None:
    assert stack_type(2, 96, 512, 512, 1, 16).dims[1] > 96 * 512 * 512
    with pytest.raises(edge_bcs.EdgeBcsError, match=r"16 images side by side .* at most 13$"):
        stack_type(2, 300, 512, 512, 1, 16)
    with pytest.raises(edge_bcs.EdgeBcsError, match=r"take smaller images$"):
        stack_type(1, 5000, 512, 512, 0, 1)
