"""What a manifest says of a part that is trained, and what it cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import write_artifact

from edge_bcs.core.errors import EdgeBcsError

TRAIN = {"part": "last:1", "layers": ["linear"], "dense": ["rest"], "kappa": 2}


def written(folder: Path, **changes: Any) -> Artifact:
    """The artifact of the helpers, of whose five connections two lie in the layer that is trained."""

    def change(description: dict[str, Any]) -> None:
        train = {**TRAIN, **changes.get("train", {})}
        description.update(version=2, train={key: value for key, value in train.items() if value is not None})
        description.update({key: value for key, value in changes.items() if key != "train"})

    def cut(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["coo.index"] = np.array([0, 9, 30, 54, 71], np.int32)
        tensors["coo.momentum"] = tensors["coo.momentum"][3:]
        tensors["dense.momentum"] = tensors["dense.momentum"][3:]

    return Artifact.read(write_artifact(folder, change, cut))


def test_momentum_is_that_of_what_is_trained(tmp_path: Path) -> None:
    artifact = written(tmp_path / "a")
    trained = artifact.trained
    assert (trained.part.text, trained.kappa, trained.dense_size) == ("last:1", 2, 6)
    state, _ = read_state(artifact)
    whole = trained.whole(state)
    assert whole["coo.momentum"].tolist() == [0, 0, 0, *state["coo.momentum"].tolist()]
    assert whole["dense.momentum"].tolist() == [0, 0, 0, *state["dense.momentum"].tolist()]
    assert all(np.array_equal(array, state[name]) for name, array in trained.of(whole).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"part": "first"}}, "field train.part cannot be right: what is trained is"),
        ({"train": {"part": "all"}}, "train.part must be a part of the network"),
        ({"train": {"part": None}}, "train.part must be text"),
        (
            {"train": {"layers": ["other"]}},
            "train.layers must be names of the manifest's layers, in their order",
        ),
        ({"train": {"layers": ["linear", "conv"]}}, "train.layers must be names"),
        ({"train": {"layers": ["linear", "linear"]}}, "train.layers must be names"),
        ({"train": {"layers": "linear"}}, "train.layers must be names"),
        ({"train": {"layers": [7]}}, "train.layers must be names"),
        ({"train": {"dense": None}}, "train.dense must be names"),
        ({"train": {"kappa": 6}}, "train.kappa must be a whole number from 0 to 5"),
        ({"train": {"kappa": -1}}, "train.kappa must be a whole number"),
        ({"train": {"layers": [], "dense": [], "kappa": 0}}, "names nothing that is trained"),
        (
            {"train": {"transposed": {"layers": ["linear"], "kappa": 2}}},
            "lists_length is 41; its layers need 26",
        ),
        ({"train": {"transposed": {"layers": ["linear"], "kappa": 9}}}, "train.transposed.kappa must be"),
        (
            {"train": {"transposed": {"layers": ["other"], "kappa": 2}}},
            "train.transposed.layers must be names",
        ),
        ({"train": {"transposed": 7}}, "train.transposed is not an object"),
        ({"version": 1}, "format version is 1, and it says of a part that is trained"),
        ({"version": 3}, "format version is 3, and its training attack pgd"),
        ({"version": 4}, "format version is 4, but it has no attack_micro_batch"),
        ({"version": 5}, "has artifact format 5 and this edge-bcs reads up to 4"),
        ({"version": True}, "unknown format version"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        written(tmp_path / "a", **change)


def test_a_format_that_promises_a_part_names_it(tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="format version is 2, and it says nothing of a part"):
        Artifact.read(write_artifact(tmp_path / "a", lambda description: description.update(version=2)))


def test_connections_do_not_leave_the_layers_that_are_trained(tmp_path: Path) -> None:
    artifact = written(tmp_path / "a")
    state, metadata = read_state(artifact)
    state["coo.index"] = np.array([0, 9, 30, 53, 71], np.int32)
    with pytest.raises(EdgeBcsError, match="1 connections in the layers that are trained"):
        write_run(tmp_path / "run", artifact, state, metadata)


def test_a_fault_names_the_parameter_that_it_is_of(tmp_path: Path) -> None:
    artifact = written(tmp_path / "a")
    for name, place, owner in (("coo.momentum", 1, "linear.weight"), ("dense.momentum", 5, "rest")):
        state, metadata = read_state(artifact)
        state[name][place] = np.nan
        with pytest.raises(EdgeBcsError, match=f"{owner} holds nan, which is not finite"):
            write_run(tmp_path / "run", artifact, state, metadata)
