"""A hand-made artifact folder, small enough to damage by hand, and a tiny network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GRAPHS = ("training", "attack", "eval", "optimizer", "lists")
KAPPA, SIZE, DENSE, STATISTICS = (
    5,
    72,
    9,
    3,
)  # a 3×2×3×3 convolution with batch norm of 3, and a 2×9 dense layer


def manifest() -> dict[str, Any]:
    layers = [
        {"name": "conv", "shape": [3, 2, 3, 3], "offset": 0, "kernel": [3, 3], "stride": 2, "padding": 1},
        {"name": "linear", "shape": [2, 9], "offset": 54, "kernel": [1, 1], "stride": 1, "padding": 0},
    ]
    return {
        "format": "edge-bcs-artifact",
        "version": 1,
        "created_by": "edge-bcs test",
        "network": {"name": "tiny", "arguments": {}, "input_shape": [2, 6, 6], "num_classes": 2},
        "sparsity": "0.93",
        "kappa": KAPPA,
        "size": SIZE,
        "seed": 7,
        "layers": [{**layer, "density": 0.07, "algorithm": "sparse"} for layer in layers],
        "dense": [
            {"name": "bn.weight", "shape": [3], "offset": 0},
            {"name": "rest", "shape": [6], "offset": 3},
        ],
        "statistics": [{"name": "bn", "channels": 3, "offset": 0}],
        "objective": {
            "name": "at",
            "beta": 0.0,
            "epsilon": 8 / 255,
            "step_size": 2 / 255,
            "attack_steps": 10,
            "start": "uniform",
            "attack_loss": "cross_entropy",
            "two_branches": False,
        },
        "batch_norm": "frozen",
        "micro_batch": 4,
        "lanes": 4,
        "batch_size": 128,
        "hyper": {"learning_rate": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "noise": 1e-6, "epochs": 200},
        # rows: 3 + 1 and 2 + 1; columns and phases: 2·2² + 1 and 9 + 1
        "lists_length": 3 * KAPPA + 4 + 3 + 9 + 10,
        "memory": {"budget": None, "predicted_peak_bytes": 1000, "phases": {}},
    }


def state() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "coo.value": rng.normal(size=KAPPA).astype(np.float32),
        "coo.index": np.array([0, 9, 30, 53, 71], np.int32),
        "coo.momentum": rng.normal(size=KAPPA).astype(np.float32),
        "dense.value": rng.normal(size=DENSE).astype(np.float32),
        "dense.momentum": np.zeros(DENSE, np.float32),
        "batchnorm.mean": np.zeros(STATISTICS, np.float32),
        "batchnorm.variance": np.ones(STATISTICS, np.float32),
    }


def seal(folder: Path, description: dict[str, Any]) -> None:
    """Write the manifest with sizes and checksums of what lies in the folder."""
    names = [f"{graph}_model.onnx" for graph in GRAPHS] + ["state.safetensors"]
    contents = {name: (folder / name).read_bytes() for name in names}
    description["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps(description))


def tiny_network() -> Any:
    """Return a torch network for 1×8×8 images and 10 classes with 728 prunable weights."""
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(1, 8, 3, padding=1, bias=False)
            self.norm = torch.nn.BatchNorm2d(8)
            self.second = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
            self.norm2 = torch.nn.BatchNorm2d(8)
            self.linear = torch.nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.first(x)))
            x = torch.relu(self.norm2(self.second(x)))
            logits: torch.Tensor = self.linear(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
            return logits

    return Tiny()


def write_artifact(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] = lambda description: None,
    change_state: Callable[[dict[str, Any]], Any] = lambda tensors: None,
) -> Path:
    """Write the folder, with the manifest or the state changed before it is sealed."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph in GRAPHS:
        (folder / f"{graph}_model.onnx").write_bytes(f"not really the {graph} graph".encode() * 10)
    tensors = state()
    change_state(tensors)
    metadata = {"format": "edge-bcs-state", "version": "1", "step": "3", "seed": "7"}
    save_file(tensors, folder / "state.safetensors", metadata)
    description = manifest()
    change(description)
    seal(folder, description)
    return folder


STATE_FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("unsorted", lambda t: t["coo.index"].__setitem__(1, 31), "strictly ascending"),
    ("repeated", lambda t: t["coo.index"].__setitem__(1, 30), "strictly ascending"),
    ("beyond", lambda t: t["coo.index"].__setitem__(4, 72), "72 positions"),
    ("negative", lambda t: t["coo.index"].__setitem__(0, -1), "72 positions"),
    ("zero weight", lambda t: t["coo.value"].__setitem__(2, 0), "weight zero"),
    ("NaN", lambda t: t["coo.momentum"].__setitem__(2, np.nan), "coo.momentum .* not finite"),
    ("infinite", lambda t: t["dense.value"].__setitem__(2, np.inf), "dense.value .* not finite"),
    ("variance", lambda t: t["batchnorm.variance"].__setitem__(0, -1), "negative"),
    ("dtype", lambda t: t.update({"coo.index": t["coo.index"].astype(np.int64)}), "coo.index is I64"),
    ("length", lambda t: t.update({"coo.value": t["coo.value"][:4].copy()}), r"coo.value is F32\[4\]"),
    ("missing", lambda t: t.pop("dense.value"), "dense.value"),
    ("extra", lambda t: t.update(more=np.zeros(1)), "more"),
]
"""What is wrong with a state: name, change of its tensors, what the sentence says."""
