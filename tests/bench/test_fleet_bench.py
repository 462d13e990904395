"""What `make fleet` measures, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import parts_of
from helpers.artifacts import KAPPA, SIZE, write_artifact

from edge_bcs.bench import fleet
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.state import state_fault
from edge_bcs.fleet import merge

RESULTS = Path(__file__).resolve().parents[2] / "results" / "fleet"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact.read(write_artifact(tmp_path / "artifact"))


@pytest.mark.parametrize("kind", fleet.KINDS)
def test_what_is_drawn_is_a_state(artifact: Artifact, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "MOVED", 0.4)
    states = [fleet.drawn(artifact, kind, seed) for seed in range(6)]
    assert [state_fault(state, parts_of(artifact)) for state in states] == [None] * 6
    if kind == "near":  # two of five moved
        begins = set(fleet.beginning(KAPPA, SIZE)[0].tolist())
        assert all(len(begins & set(state["coo.index"].tolist())) == KAPPA - 2 for state in states)


def test_a_merger_in_a_process_of_its_own(artifact: Artifact, tmp_path: Path) -> None:
    runs = fleet.write_fleet(tmp_path, artifact, "near", 3)
    one = fleet.measured(runs, tmp_path / "three", "median")
    assert (one["runs"], one["robust"]) == (3, "median") and one["peak_bytes"] > one["before_bytes"] > 0
    with pytest.raises(EdgeBcsError, match=r"a merger failed: .*already holds a manifest"):
        fleet.measured(runs, tmp_path / "three")


def test_trees(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "measured", lambda runs, output: merge(runs, output))
    result = fleet.measure(artifact, tmp_path, runs=4, most=0, repetitions=1)
    assert result["scale"] == [] and [tree["kind"] for tree in result["trees"]] == list(fleet.KINDS)
    assert all(0 <= tree["positions_in_common"] <= 1 for tree in result["trees"])


def test_how_far_two_states_lie_apart() -> None:
    flat = {"coo.index": np.array([1, 2, 5]), "coo.value": np.array([3.0, 4.0, 0.0])}
    tree = {"coo.index": np.array([1, 2, 7]), "coo.value": np.array([3.0, 1.0, 4.0])}
    assert fleet.difference(flat, tree) == pytest.approx(
        {"positions_in_common": 2 / 3, "difference": 1.0, "difference_in_common": 0.6}
    )


def test_positions_as_distances(artifact: Artifact) -> None:
    """0, 9, 30, 53, 71: distances of less than 128, a byte each."""
    state = fleet.drawn(artifact, "near", 0)
    state["coo.index"][...] = [0, 9, 30, 53, 71]
    sizes = fleet.wire(artifact, state)
    assert (sizes["values"], sizes["indices"], sizes["indices_delta_coded"]) == (20, 20, 5)


def test_the_page_is_that_of_the_figures() -> None:
    result = json.loads((RESULTS / "fleet.json").read_text())
    assert (RESULTS / "README.md").read_text() == fleet.readme(result)
    thousand = [one for one in result["scale"] if one["runs"] == 1000]
    assert len(thousand) == 4 and all(one["peak_bytes"] <= 400e6 for one in thousand)
