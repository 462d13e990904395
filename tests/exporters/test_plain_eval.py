"""eval_model.plain.onnx: ONNX's own operators, no library, the sparse model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from edge_bcs.exporters import export
from edge_bcs.exporters.network import network_of
from edge_bcs.exporters.plain_eval import plain_evaluation_model
from edge_bcs.runtime import Trainer
from helpers.networks import NETWORKS, EveryLayer, Residual, double, relative, sparse_of, tiny

from edge_bcs import Attack, Memory, Publishing
from edge_bcs.cli import main
from edge_bcs.method.sparse_model import SparseModel


def logits(model: onnx.ModelProto | str, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In a session that has never heard of the operator library."""
    content = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(["logits"], {"input": images})[0]
    return result


def check(sparse: SparseModel, shape: tuple[int, int, int]) -> onnx.ModelProto:
    model = plain_evaluation_model(network_of(sparse, shape).graph, sparse.network)
    assert {item.domain for item in model.opset_import} == {""}
    for count in (1, 5):  # the batch is free
        images = np.random.default_rng(count).random((count, *shape), np.float32)
        expected = double(sparse, False)(torch.tensor(images, dtype=torch.float64)).detach().numpy()
        assert relative(logits(model, images), expected) < 1e-5
    return model


@pytest.mark.parametrize("name", [*NETWORKS, "wrn34_10"])
def test_every_network_has_torchs_logits(name: str) -> None:
    check(tiny(name, width=0.0125 if name.endswith("_10") else 0.0625), (3, 16, 16))


def test_every_layer_has_torchs_logits() -> None:
    check(sparse_of(EveryLayer()), (2, 13, 13))


@pytest.mark.parametrize("variant", range(6))
def test_every_join_has_torchs_logits(variant: int) -> None:
    check(sparse_of(Residual(variant)), (3, 3, 3))


def test_batch_norms_behind_convolutions_are_folded() -> None:
    kinds = [node.op_type for node in check(tiny("vgg16"), (3, 16, 16)).graph.node]
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds
    # Pre-activation networks have batch norms with no convolution of their own before them.
    kinds = [node.op_type for node in check(tiny("wrn28_2"), (3, 16, 16)).graph.node]
    assert kinds.count("BatchNormalization") < 25


def test_the_artifacts_plain_model_is_its_sparse_model(tmp_path: Path) -> None:
    sparse = tiny("resnet18")
    shape = (3, 16, 16)
    export(
        sparse,
        tmp_path / "artifact",
        input_shape=shape,
        memory=Memory(micro_batch=4),
        publish=Publishing(plain_eval=True),
    )
    images = np.random.default_rng(0).random((6, *shape), np.float32)
    with Trainer(tmp_path / "artifact") as trainer:  # the checksum of the new file is verified too
        expected = trainer.logits(images)
    assert relative(logits(str(tmp_path / "artifact" / "eval_model.plain.onnx"), images), expected) < 1e-5


def test_a_network_trained_on_the_board_comes_out_plain(tmp_path: Path) -> None:
    sparse = tiny("vgg16", size=32, classes=10)
    images = np.random.default_rng(0).random((4, 3, 32, 32), np.float32)
    export(
        sparse,
        tmp_path / "artifact",
        memory=Memory(micro_batch=4),
        attack=Attack(steps=1),
        batch_norm="batch",
        validate=False,
    )
    with Trainer(tmp_path / "artifact") as trainer:
        trainer.step(images, np.arange(4))
        trainer.save(tmp_path / "run")
        expected = trainer.logits(images)
    arguments = [
        "export",
        "--checkpoint",
        str(tmp_path / "run"),
        "--plain-eval",
        "-o",
        str(tmp_path / "plain"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = logits(str(tmp_path / "plain" / "eval_model.plain.onnx"), images)
    assert relative(found, expected) < 1e-5
