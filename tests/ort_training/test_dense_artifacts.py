"""What test_ort_artifact.py expects is what the training build computes, and it reads what we write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime.training.api", reason="see make test-ort-training")

from dense_artifacts import NAMES, RATE, STEPS, batches, expected_of, make
from edge_bcs.runtime.ort.artifact import OrtArtifact
from edge_bcs.runtime.ort.checkpoint import read_ort_checkpoint
from onnxruntime.training.api import CheckpointState, Module, Optimizer

from edge_bcs.core.errors import EdgeBcsError

DENSE = Path(__file__).parent / "dense"


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_numbers_are_the_training_builds(name: str) -> None:
    stored = json.loads((DENSE / name / "expected.json").read_text())
    found = expected_of(DENSE / name)
    assert found["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    assert found["evaluation"] == pytest.approx(stored["evaluation"], rel=1e-5)
    for key, values in stored["parameters"].items():
        assert np.allclose(found["parameters"][key], values, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_the_tools_still_make_such_an_artifact(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / name)
    for file in ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"):
        made, stored = (folder / name / file for folder in (tmp_path, DENSE))
        assert abs(made.stat().st_size - stored.stat().st_size) < 64, file


@pytest.mark.parametrize("name", NAMES)
def test_both_readers_read_one_checkpoint(name: str, tmp_path: Path) -> None:
    ours = read_ort_checkpoint(DENSE / name / "checkpoint")
    theirs = CheckpointState.load_checkpoint(DENSE / name / "checkpoint")
    assert {key for key, parameter in theirs.parameters if parameter.requires_grad} == set(ours.trainable)
    for key, parameter in theirs.parameters:
        assert np.array_equal(parameter.data, ours.parameters[key]), key
    changed = replace(
        ours,
        trainable={key: array * 2 + 1 for key, array in ours.trainable.items()},
        frozen={key: array * 3 for key, array in ours.frozen.items()},
    )
    (tmp_path / "changed").write_bytes(changed.serialize())
    for key, parameter in CheckpointState.load_checkpoint(tmp_path / "changed").parameters:
        assert np.array_equal(parameter.data, changed.parameters[key]), key
        assert parameter.requires_grad == (key in ours.trainable)


@pytest.mark.parametrize("name", NAMES)
def test_the_training_build_goes_on_from_what_we_write(name: str, tmp_path: Path) -> None:
    """half_way, which it wrote, read and written again: the next steps are those of an unbroken training."""
    expected = json.loads((DENSE / name / "expected.json").read_text())["loss"][STEPS // 2 :]
    held = read_ort_checkpoint(DENSE / name / "half_way")
    assert held.optimizer is not None and held.optimizer.step == STEPS // 2
    (tmp_path / "ours").write_bytes(held.serialize())
    state = CheckpointState.load_checkpoint(tmp_path / "ours")
    module = Module(DENSE / name / "training_model.onnx", state)
    optimizer = Optimizer(DENSE / name / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(RATE)
    losses = []
    for x, y in batches()[STEPS // 2 :]:
        module.train()
        losses.append(float(module(x, y)))
        optimizer.step()
        module.lazy_reset_grad()
    assert losses == pytest.approx(expected, rel=1e-6)


def test_properties_are_read(tmp_path: Path) -> None:
    state = CheckpointState.load_checkpoint(DENSE / "mobile" / "checkpoint")
    state.properties["epoch"], state.properties["rate"], state.properties["who"] = -3, 0.5, "Jürgen"
    CheckpointState.save_checkpoint(state, tmp_path / "file")
    held = read_ort_checkpoint(tmp_path / "file")
    assert held.properties == {"epoch": -3, "rate": 0.5, "who": "Jürgen"}
    (tmp_path / "again").write_bytes(held.serialize())
    again = CheckpointState.load_checkpoint(tmp_path / "again").properties
    assert (again["epoch"], again["rate"], again["who"]) == (-3, 0.5, "Jürgen")


def test_a_training_build_is_told_to_run_its_artifacts_itself() -> None:
    with pytest.raises(EdgeBcsError, match="is a training build, which runs its artifacts itself"):
        OrtArtifact(DENSE / "mobile")
