"""`make fleet-learning`: how images are dealt, ways of merging, rounds that go on, and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import KAPPA, SIZE, write_artifact
from helpers.artifacts import state as hand_made

import edge_bcs
from edge_bcs.bench import fleet_learning, fleet_learning_page
from edge_bcs.bench.fleet_learning import METHODS, Images, Run, Settings
from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.fleet.merging import merge

Make = Callable[..., Path]
State = dict[str, Any]


def test_every_image_goes_to_one_board() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 3000)
    evenly = fleet_learning.dealt(labels, 7, None, 0)
    by_class = fleet_learning.dealt(labels, 7, 0.3, 0)
    for parts in (evenly, by_class):
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(3000))
        assert min(map(len, parts)) >= fleet_learning.FEWEST
    assert {len(part) for part in evenly} <= {428, 429}

    def largest(parts: list[Any]) -> float:
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert largest(by_class) > 2 * largest(evenly)


def holding(index: list[int], value: list[float]) -> State:
    state = {name: array.copy() for name, array in hand_made().items()}
    state["coo.index"][...], state["coo.value"][...] = index, value
    return state


def test_three_rules_on_two_boards(tmp_path: Path) -> None:
    """κ is 5. Both hold 1 and 4; with weights 3 and 1, 1 has the mean 2, and 4 has -1. Of one board alone are
    6 (weight 3: 2, over both 1.5), 8 (1.5; 1.125), 10 (0.1; 0.075) and 20 (weight 1: 8; 2), 30 (3; 0.75) and
    40 (0.2; 0.05)."""
    artifact = Artifact.read(write_artifact(tmp_path / "artifact"))
    assert (artifact.kappa, artifact.size) == (KAPPA, SIZE) == (5, 72)
    states = [
        holding([1, 4, 6, 8, 10], [2.0, -1.0, 2.0, 1.5, 0.1]),
        holding([1, 4, 20, 30, 40], [2.0, -1.0, 8.0, 3.0, 0.2]),
    ]

    def become(method: str) -> dict[int, float]:
        merged = fleet_learning.together(states, [3.0, 1.0], artifact, method)
        assert not merged["coo.momentum"].any()
        pairs = zip(merged["coo.index"].tolist(), merged["coo.value"].tolist(), strict=True)
        return {index: pytest.approx(value) for index, value in pairs}

    assert become("ours") == become("seeds") == {1: 2.0, 4: -1.0, 6: 2.0, 8: 1.5, 20: 8.0}
    assert become("feddst") == {1: 2.0, 6: 2.0, 8: 1.5, 20: 8.0, 30: 3.0}
    assert become("dense") == {1: 2.0, 4: -1.0, 6: 1.5, 8: 1.125, 20: 2.0}
    merged = fleet_learning.together(states, [3.0, 1.0], artifact, "ours")
    assert fleet_learning.masks(states, merged, SIZE) == {"overlap": 2 / 5, "alone": 3 / 5}
    # What `edge-bcs merge` makes of the same states.
    for number, state in enumerate(states):
        told = {"step": "5", "seed": "7", "images": str((3, 1)[number])}
        write_run(tmp_path / f"run-{number}", artifact, state, told)
    merge([tmp_path / "run-0", tmp_path / "run-1"], tmp_path / "merged")
    theirs = read_state(Artifact.read(tmp_path / "merged"))[0]
    assert all(np.array_equal(theirs[name], array) for name, array in merged.items())


@pytest.fixture
def images() -> Images:
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(96))
    boards = [ArrayDataset(x[n::3], y[n::3], tuple("0123456789")) for n in range(2)]
    held_out = ArrayDataset(x[2::3], y[2::3], tuple("0123456789"))
    return Images(boards, held_out, held_out)


SMALL = Settings(
    boards=2, rounds=2, batch_size=4, measured_steps=1, alone=2, often=1, learning_rate=0.3, weight_decay=0.02
)


def test_rounds_go_on_where_they_were_cut_off(
    tiny_artifact: Make, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.read(tiny_artifact(attack_steps=1))
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        runs = [(Run(SMALL, method, artifact, tmp_path / f"{method}.npz"), images)]
        fleet_learning.in_turn(runs, lambda: None)
        rows[method] = fleet_learning.kept(tmp_path / f"{method}.npz")[0]
        assert [one["round"] for one in rows[method]["rounds"]] == [1, 2]
        assert len(rows[method]["test"]) == (2 if method == "alone" else 1)
    masks = {method: row["rounds"][0]["overlap"] for method, row in rows.items() if method != "alone"}
    assert masks["seeds"] < masks["ours"] == masks["feddst"] == masks["dense"]
    ours = rows["ours"]["rounds"]
    assert all(0 < one["sent"] < 2 * 4 * artifact.size for one in ours)
    # Cut off in its second round, it ends with the same bits.
    cut = Run(SMALL, "ours", artifact, tmp_path / "cut.npz")
    assert cut.go_on(images)

    def ends(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fleet_learning, "together", ends)
        cut.go_on(images)
    again = Run(SMALL, "ours", artifact, tmp_path / "cut.npz")
    assert len(again.rounds) == 1
    fleet_learning.in_turn([(again, images)], lambda: None)

    def measured(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: one[name] for name in one if name != "processor_seconds"} for one in rounds]

    assert measured(again.rounds) == measured(ours)
    with np.load(tmp_path / "cut.npz") as one, np.load(tmp_path / "ours.npz") as other:
        assert np.array_equal(one["0/coo.value"], other["0/coo.value"])


def test_runs_take_turns() -> None:
    done: list[str] = []

    class Counted:
        settings = SMALL

        def __init__(self, method: str, rounds: int) -> None:
            self.method, self.rounds, self._ends = method, [{"round": 1}] * rounds, 3

        def go_on(self, images: Images) -> bool:
            if len(self.rounds) == self._ends:
                return False
            self.rounds = [*self.rounds, {"round": len(self.rounds) + 1}]
            done.append(self.method)
            return True

    runs: Any = [(Counted("a", 2), None), (Counted("b", 0), None), (Counted("c", 1), None)]
    fleet_learning.in_turn(runs, lambda: None)
    assert done == ["b", "b", "c", "a", "b", "c"]


def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    rounds = [
        {"round": n, "loss": 2.0, "accuracy": 0.25, "robust_accuracy": 0.125, "overlap": 0.5, "alone": 0.25,
         "sent": 2000, "received": 3000}
        for n in (1, 2)
    ]  # fmt: skip
    settings = dataclasses.asdict(SMALL)
    test = [{"accuracy": 0.5, "robust_accuracy": 0.25, "samples": 8000}]
    rows: list[dict[str, Any]] = [
        {"method": "ours", "settings": settings, "rounds": rounds, "test": test},
        {"method": "feddst", "settings": settings, "rounds": rounds[:1], "test": None},
    ]
    planned = [(2, "iid", "ours"), (2, "iid", "feddst"), (2, "iid", "alone")]
    fleet_learning_page.write_page(tmp_path, rows, planned)
    page = (tmp_path / "README.md").read_text()
    assert "| 2 | evenly | merged (ours) | 2 | 50.0 % | 25.0 % | 50.0 % | 25.0 % |" in page
    assert "| 2 | evenly | FedDST's rule | 1 of 2 | | | 50.0 % | 25.0 % |" in page
    assert "2 boards, evenly: each board alone (mean); 2 boards, evenly: FedDST's rule." in page
    assert "| 2 | evenly | merged (ours) | 1,000 bytes | 0.0 MB |" in page
    assert (tmp_path / "rounds.png").stat().st_size > 1000


def test_all_runs_begin_with_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is exported anew; what torch draws (biases) must not differ either."""
    begun: list[Any] = []
    monkeypatch.setattr(edge_bcs, "export", lambda sparse, *words, **how: begun.append(sparse.state_dict()))
    monkeypatch.setattr(Artifact, "read", lambda folder: None)
    for folder in ("a", "b"):
        fleet_learning.exported(SMALL, tuple("0123456789"), tmp_path / folder)
    one, other = begun
    assert all(bool((one[name] == other[name]).all()) for name in one)
