"""Artifacts: read as written, refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers.artifacts import STATE_FAULTS, manifest, seal, state, write_artifact

from edge_bcs.core.errors import EdgeBcsError


def test_an_artifact_is_read_as_written(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    assert (artifact.kappa, artifact.size, artifact.dense_size, artifact.statistics_size) == (5, 72, 9, 3)
    assert artifact.input_shape == (2, 6, 6) and artifact.layers[0].shape == (3, 2, 3, 3)
    assert artifact.objective.attack.epsilon == 8 / 255 and artifact.budget is None
    tensors, metadata = read_state(artifact)
    assert metadata["step"] == "3"
    for name, array in state().items():
        np.testing.assert_array_equal(tensors[name], array)


def set_field(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            description = description[int(parent) if parent.isdigit() else parent]
        if value is KeyError:
            del description[last]
        else:
            description[last] = value

    return change


FIELD_FAULTS = [
    ("version", 5, "upgrade edge-bcs"),
    ("version", "1", "unknown format version"),
    ("format", "onnx", "does not describe"),
    ("network", [], "network is not an object"),
    ("network.input_shape", [2, 6], "network.input_shape"),
    ("network.input_shape", [2, -6, 6], "network.input_shape"),
    ("network.num_classes", 1, "num_classes"),
    ("kappa", 0, "kappa"),
    ("kappa", 73, "above the network's size"),
    ("kappa", True, "kappa"),
    ("kappa", KeyError, "kappa must be .* not 'missing'"),
    ("size", 73, "layers hold 72"),
    ("seed", -1, "seed"),
    ("layers", {}, "layers must be a list"),
    ("layers.1.offset", 53, "starts at 53 instead of 54"),
    ("layers.0.stride", 0, "stride"),
    ("layers.0.strides", [1, 0], "strides"),
    ("layers.0.pads", [0, 1], "pads"),
    ("layers.0.groups", 0, "groups"),
    ("layers.0.density", 1.5, "density"),
    ("layers.0.algorithm", "magic", "sparse or dense"),
    ("lists_length", 42, "its layers need 41"),
    ("dense.1.offset", 4, "gap or overlap at 3"),
    ("statistics.0.channels", "3", "channels"),
    ("objective.epsilon", float("nan"), "epsilon"),
    ("objective.start", "zero", "uniform or gaussian"),
    ("objective.two_branches", 1, "true or false"),
    ("objective.name", "pgd", "objective.name must be natural or at or .* not 'pgd'"),
    ("objective.start", "gaussian", 'objective at has start "gaussian" instead of "uniform"'),
    ("objective.attack_loss", "kl", 'objective at has attack_loss "kl" instead of "cross_entropy"'),
    ("objective.two_branches", True, "objective at has two_branches true instead of false"),
    ("batch_norm", "none", "frozen or batch"),
    ("micro_batch", 1 << 20, "micro_batch"),
    ("hyper.noise", -1, "hyper.noise"),
    ("memory.predicted_peak_bytes", None, "predicted_peak_bytes"),
    ("memory.budget", 0, "memory.budget"),
]


@pytest.mark.parametrize(("path", "value", "message"), FIELD_FAULTS)
def test_every_field_is_checked(tmp_path: Path, path: str, value: object, message: str) -> None:
    write_artifact(tmp_path / "a", change=set_field(path, value))
    with pytest.raises(EdgeBcsError, match=message) as caught:
        Artifact.read(tmp_path / "a")
    assert "\n" not in str(caught.value)


def name_it_twice(file: Path) -> None:
    """Other readers would take the first of the two formats."""
    file.write_text(file.read_text().replace("{", '{"format": "another",', 1))


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


FILE_FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", lambda f: shutil.rmtree(f), "does not exist"),
    ("a file", lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file"),
    ("no manifest", lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    ("half a manifest", lambda f: os.truncate(f / "manifest.json", 300), "not valid JSON"),
    ("a deep manifest", lambda f: (f / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
    ("a manifest with a name twice", lambda f: name_it_twice(f / "manifest.json"), "not valid JSON"),
    ("no graph", lambda f: (f / "attack_model.onnx").unlink(), "lacks attack_model.onnx"),
    ("half a graph", lambda f: os.truncate(f / "eval_model.onnx", 30), "truncated: 30 bytes"),
    ("a changed graph", lambda f: flip_last_byte(f / "eval_model.onnx"), "sha256"),
    ("a changed state", lambda f: flip_last_byte(f / "state.safetensors"), "sha256"),
    ("a longer graph", lambda f: (f / "lists_model.onnx").open("ab").write(b"x"), "altered"),
]


@pytest.mark.parametrize(
    ("damage", "message"), [fault[1:] for fault in FILE_FAULTS], ids=[f[0] for f in FILE_FAULTS]
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = write_artifact(tmp_path / "a")
    damage(folder)
    with pytest.raises(EdgeBcsError, match=message) as caught:
        Artifact.read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..\\x", ""])
def test_files_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_artifact(tmp_path / "a")
    description = json.loads((folder / "manifest.json").read_text())
    description["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    (folder / "manifest.json").write_text(json.dumps(description))
    with pytest.raises(EdgeBcsError, match="does not lie in"):
        Artifact.read(folder)


@pytest.mark.parametrize(
    ("change", "message"), [fault[1:] for fault in STATE_FAULTS], ids=[f[0] for f in STATE_FAULTS]
)
def test_states_that_break_an_invariant(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a", change_state=change))
    with pytest.raises(EdgeBcsError, match=message):
        read_state(artifact)


def test_a_sealed_file_that_is_no_safetensors(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "a")
    (folder / "state.safetensors").write_bytes(b"\xff" * 100)
    seal(folder, manifest())
    with pytest.raises(EdgeBcsError, match="no intact state"):
        read_state(Artifact.read(folder))
