"""What `make engines` measures, and the page that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_bcs.bench import engines


def test_each_has_its_turn_in_every_round() -> None:
    calls: list[str] = []
    found = engines.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 3
    assert all(0 <= taken["least"] <= taken["median"] for taken in found.values())


def test_a_node_and_a_graph_are_timed_with_both(tiny_artifact: Callable[..., Path]) -> None:
    pytest.importorskip("onnxruntime")
    node = engines.nodes(rounds=2)
    graphs = engines.graphs(tiny_artifact(), times=2)
    assert set(graphs) == {"eval", "attack", "training"}
    for found in (node, *graphs.values()):
        assert set(found) == {"native", "onnxruntime"} and all(taken["least"] > 0 for taken in found.values())


def test_the_page() -> None:
    taken = {"native": {"least": 1e-7, "median": 2e-7}, "onnxruntime": {"least": 4e-7, "median": 5e-7}}
    row = {"network": "vgg16", "statistics": "batch", "graphs": {"eval": taken}}
    page = engines.table(
        {"date": "a day", "machine": "one", "onnxruntime": "1", "nodes": taken, "times": 3, "rows": [row]}
    )
    assert "100 ns a node by our own runner, 400 ns" in page and "75 % less" in page
    assert "| vgg16 | batch | eval | 0.00 | 0.00 | 25 % |" in page
