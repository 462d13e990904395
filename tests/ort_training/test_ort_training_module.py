"""Our artifact in ONNX Runtime's own training API: CheckpointState, Module, and back to torch.

Runs in the environment of `make test-ort-training`, the only one with a training build. What the stock
runtime must give is computed here too: the Trainer works with this onnxruntime as well, through
InferenceSession alone.
"""

# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "onnxruntime.training.api", reason="needs onnxruntime-training, see make test-ort-training"
)

import onnxruntime
import torch
from edge_bcs.runtime import library
from edge_bcs.runtime.ort.training import OrtTrainer
from edge_bcs.runtime.trainer import Trainer
from helpers.artifacts import tiny_network
from onnxruntime.training.api import CheckpointState, Module

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset

Make = Callable[..., Path]
Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    library.register(made)
    return made


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart"])
def test_training_in_module_is_training_in_sessions(
    tiny_artifact: Make, batch: Batch, objective: str, batch_norm: str
) -> None:
    """Ten images in micro-batches of four, so gradients accumulate and a micro-batch has empty places."""
    artifact = tiny_artifact(objective=objective, batch_norm=batch_norm)
    with Trainer(artifact) as trainer:
        expected = [trainer.step(*batch) for _ in range(3)]
        logits, state = trainer.logits(batch[0]), trainer.state()
    with OrtTrainer(artifact) as trainer:
        assert [trainer.step(*batch) for _ in range(3)] == expected
        assert np.array_equal(trainer.logits(batch[0]), logits)
        for name, array in trainer.state().items():
            assert np.array_equal(array, state[name]), name
    assert expected[0]["loss"] != expected[2]["loss"]


def test_a_saved_checkpoint_comes_back_as_a_torch_module(
    tiny_artifact: Make, batch: Batch, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "trained.checkpoint"
    with OrtTrainer(tiny_artifact()) as trainer:
        for _ in range(2):
            trainer.step(*batch)
        trainer.save_checkpoint(file)
        logits, state = trainer.logits(batch[0]), trainer.state()
    sparse = edge_bcs.load(file, model=tiny_network())
    assert sparse.step == 2
    for name, array in sparse.state().items():
        assert np.array_equal(array, state[name]), name
    with torch.no_grad():
        assert np.allclose(sparse(torch.tensor(batch[0])).numpy(), logits, atol=1e-5)


def test_going_on_from_a_checkpoint_and_from_a_run(tiny_artifact: Make, batch: Batch, tmp_path: Path) -> None:
    artifact = tiny_artifact()
    with OrtTrainer(artifact) as trainer:
        trainer.step(*batch)
        trainer.save_checkpoint(tmp_path / "file")
        trainer.save(tmp_path / "run")
        expected = trainer.step(*batch)
        state = trainer.state()
    for trainer in (
        lambda: OrtTrainer(artifact, checkpoint=tmp_path / "file"),
        lambda: OrtTrainer(tmp_path / "run"),
        lambda: OrtTrainer.resume(tmp_path / "run"),
        lambda: Trainer(tmp_path / "run"),  # a run is a run, whichever way it was trained
    ):
        with trainer() as opened:
            assert opened.steps == 1
            assert opened.step(*batch) == expected
            assert all(np.array_equal(array, state[name]) for name, array in opened.state().items())


def test_a_whole_training_learns(tiny_artifact: Make) -> None:
    labels = np.arange(64) % 2
    images = np.random.default_rng(0).random((64, 1, 8, 8), np.float32) * 0.5
    images[labels == 1, :, :4] += 0.5
    data = ArrayDataset(images, labels)
    with OrtTrainer(tiny_artifact(batch_norm="batch")) as trainer:
        before = trainer.evaluate(data, 0)["accuracy"]
        trainer.fit(data, epochs=6, learning_rate=0.05, augment=False, progress=False)
        after = trainer.evaluate(data, 5)
    assert before < 0.7
    assert after["accuracy"] > 0.9
    assert after["robust_accuracy"] > 0.8


def test_the_files_are_ordinary_to_the_training_api(
    tiny_artifact: Make, batch: Batch, tmp_path: Path
) -> None:
    """No adapter: what a user of onnxruntime.training writes by hand."""
    artifact = tiny_artifact(objective="natural")
    state = CheckpointState.load_checkpoint(artifact / "checkpoint")
    trainable = {name for name, parameter in state.parameters if parameter.requires_grad}
    assert trainable == {"coo.value", "dense.value"}
    module = Module(
        artifact / "training_model.onnx", state, artifact / "eval_model.onnx", session_options=options()
    )
    assert module.input_names() == ["input", "labels", "sample_weight"]
    assert module.output_names()[0] == "loss"
    x, y = batch[0][:4], batch[1][:4]
    weight = np.full(4, 0.25, np.float32)
    loss, _ = module(x, y, weight)
    once = state.parameters["coo.value"].grad.copy()
    module(x, y, weight)
    assert np.allclose(state.parameters["coo.value"].grad, 2 * once, rtol=1e-5, atol=1e-7)
    module.lazy_reset_grad()
    module(x, y, weight)
    assert np.array_equal(state.parameters["coo.value"].grad, once)
    # A step by hand lowers the loss: the gradient is one.
    value = state.parameters["coo.value"].data - np.float32(0.05) * once
    state.parameters["coo.value"] = value
    assert module(x, y, weight)[0] < loss
    module.eval()
    logits = module(x)
    assert logits.shape == (4, 10)
    CheckpointState.save_checkpoint(state, tmp_path / "saved")
    assert np.array_equal(edge_bcs.load(tmp_path / "saved", model=tiny_network()).state()["coo.value"], value)


def test_an_artifact_from_elsewhere_says_what_to_do(tiny_artifact: Make, tmp_path: Path) -> None:
    import json
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(tiny_artifact(), copied)
    (copied / "checkpoint").unlink()
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"]["checkpoint"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EdgeBcsError, match="no checkpoint of ONNX Runtime"):
        OrtTrainer(copied)
    with OrtTrainer(tiny_artifact()) as trainer:
        trainer.save_checkpoint(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[: len(content) // 2])
    with pytest.raises(EdgeBcsError, match="truncated or altered"):
        OrtTrainer(tiny_artifact(), checkpoint=tmp_path / "file")
    with pytest.raises(EdgeBcsError, match="truncated or altered"):
        edge_bcs.load(tmp_path / "file", model=tiny_network())


def test_another_networks_checkpoint_is_refused(tiny_artifact: Make, tmp_path: Path) -> None:
    from edge_bcs.exporters import export

    from edge_bcs.method.connectivity import sparsify

    other = sparsify(tiny_network(), 0.9, seed=0, distribution="uniform")
    export(
        other,
        tmp_path / "other",
        input_shape=(1, 8, 8),
        memory=edge_bcs.Memory(micro_batch=4),
        validate=False,
    )
    with pytest.raises(EdgeBcsError, match=r"belongs to another network: coo\.value"):
        OrtTrainer(tiny_artifact(), checkpoint=tmp_path / "other" / "checkpoint")
