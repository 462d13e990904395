"""What tests/test_ort_artifact.py expects is what the training build computes, and it reads what we write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime.training.api", reason="see make test-ort-training")

from dense_artifacts import NAMES, expected_of, make
from edge_bcs.runtime.ort_artifact import OrtArtifact
from edge_bcs.runtime.ort_checkpoint import read_ort_checkpoint
from onnxruntime.training.api import CheckpointState

from edge_bcs.errors import EdgeBcsError

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
    changed = {key: array * 2 + 1 for key, array in ours.parameters.items()}
    (tmp_path / "changed").write_bytes(ours.with_parameters(changed))
    for key, parameter in CheckpointState.load_checkpoint(tmp_path / "changed").parameters:
        assert np.array_equal(parameter.data, changed[key]), key


def test_properties_are_read(tmp_path: Path) -> None:
    state = CheckpointState.load_checkpoint(DENSE / "mobile" / "checkpoint")
    state.properties["epoch"], state.properties["rate"], state.properties["who"] = -3, 0.5, "Jürgen"
    CheckpointState.save_checkpoint(state, tmp_path / "file")
    assert read_ort_checkpoint(tmp_path / "file").properties == {"epoch": -3, "rate": 0.5, "who": "Jürgen"}


def test_a_training_build_is_told_to_run_its_artifacts_itself() -> None:
    with pytest.raises(EdgeBcsError, match="is a training build, which runs its artifacts itself"):
        OrtArtifact(DENSE / "mobile")
