"""Dense training artifacts made by ONNX Runtime's own tools, and what 1.19.2 computes from them.

    python tests/ort_training/dense_artifacts.py FOLDER

writes FOLDER/residual and FOLDER/mobile anew, each with expected.json: losses of six steps, the first
gradient and the last parameters; and with half_way, the checkpoint after three of them. Runs only where
onnxruntime-training is installed; the folder tests/ort_training/dense was made so.
"""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import edge_bcs.runtime  # noqa: F401 (before onnxruntime, which it keeps from reporting its use)
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

SHAPE = (4, 1, 9, 9)
CLASSES = 10
STEPS = 6
RATE = 0.02
NAMES = ("residual", "mobile")


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        if name == "residual":
            self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv3 = nn.Conv2d(8, 8, 1)
            self.hidden, self.head = nn.Linear(32, 16), nn.Linear(16, CLASSES)
        else:
            self.conv1 = nn.Conv2d(1, 4, 3, padding=2, dilation=2)
            self.depthwise = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
            self.conv2, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "residual":
            x = F.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)  # 9 pixels: the last is left out
            x = torch.relu(self.norm2(self.conv2(x)))
            x = x + self.conv3(x)
            return self.head(torch.relu(self.hidden(x.flatten(1))))
        x = F.avg_pool2d(F.relu6(self.conv1(x)), 3, 2, 1)
        x = F.silu(torch.sigmoid(self.depthwise(x)))
        x = torch.tanh(F.leaky_relu(self.conv2(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def batches() -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """The images and labels of the six steps."""
    random = np.random.default_rng(0)
    return [(random.random(SHAPE, np.float32), random.integers(0, CLASSES, SHAPE[0])) for _ in range(STEPS)]


def make(name: str, folder: Path) -> None:
    """Export the network with torch and let ORT's tools make the artifact."""
    from onnxruntime.training import artifacts

    torch.manual_seed(0)
    network = Net(name)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.train(),
            (torch.rand(SHAPE),),
            content,
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["output"],
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
        )
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.generate_artifacts(
        onnx.load_from_string(content.getvalue()),
        requires_grad=[key for key, _ in network.named_parameters()],
        frozen_params=[key for key, value in network.named_buffers() if value.dtype == torch.float32],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD if name == "residual" else artifacts.OptimType.AdamW,
        artifact_directory=folder,
    )
    # 1.19.2 refuses what the newest onnx package writes.
    optimizer = onnx.load(folder / "optimizer_model.onnx")
    optimizer.ir_version = 10
    onnx.save(optimizer, folder / "optimizer_model.onnx")


def expected_of(folder: Path, half_way: Path | None = None) -> dict[str, Any]:
    """What the training build computes in six steps; ``half_way`` receives the checkpoint after three."""
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(folder, copy)
        evaluation = onnx.load(copy / "eval_model.onnx")
        for node in evaluation.graph.node:  # 1.19.2 does not load its own evaluation model otherwise
            if node.op_type == "BatchNormalization":
                del node.output[1:]
        onnx.save(evaluation, copy / "eval_model.onnx")
        state = CheckpointState.load_checkpoint(copy / "checkpoint")
        module = Module(copy / "training_model.onnx", state, copy / "eval_model.onnx")
        optimizer = Optimizer(copy / "optimizer_model.onnx", module)
        optimizer.set_learning_rate(RATE)
        result: dict[str, Any] = {"loss": [], "evaluation": [], "gradient": {}, "parameters": {}}
        for x, y in batches():
            module.train()
            result["loss"].append(float(module(x, y)))
            if not result["gradient"]:
                for key, parameter in state.parameters:
                    if parameter.requires_grad:
                        result["gradient"][key] = [float(v) for v in parameter.grad.reshape(-1)]
            optimizer.step()
            module.lazy_reset_grad()
            module.eval()
            result["evaluation"].append(float(module(x, y)))
            if half_way is not None and len(result["loss"]) == STEPS // 2:
                CheckpointState.save_checkpoint(state, half_way, include_optimizer_state=True)
        for key, parameter in state.parameters:
            result["parameters"][key] = [float(v) for v in parameter.data.reshape(-1)]
        return result


if __name__ == "__main__":
    for made in NAMES:
        target = Path(sys.argv[1]) / made
        make(made, target)
        (target / "expected.json").write_text(json.dumps(expected_of(target, target / "half_way")) + "\n")
