"""The compiler writes the same artifacts as before: sha256 of what it made of a few networks, kept in a file.

A change of the compiler that is meant to change an artifact says so in its commit and writes the file anew:

    python tests/exporters/test_artifact_bits.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from helpers.networks import EveryLayer

import edge_bcs
from edge_bcs import Memory, Publishing, models

RECORD = Path(__file__).with_name("artifact_bits.json")
TABLES = (
    "layers",
    "dense",
    "statistics",
    "objective",
    "hyper",
    "micro_batch",
    "lanes",
    "lists_length",
    "memory",
)
"""What of a manifest is the compiler's."""

CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    # name: (network, density, what export is asked for)
    "every layer, at, frozen": ("every layer", 0.5, {"objective": "at", "memory": Memory(micro_batch=4)}),
    "every layer, trades, batch": (
        "every layer", 0.5, {"objective": "trades", "batch_norm": "batch", "memory": Memory(micro_batch=3)},
    ),
    "vgg16, mart, frozen": ("vgg16", 0.1, {"objective": "mart", "publish": Publishing(plain_eval=True)}),
    "vgg16, mixed, dense kernels": ("vgg16", 0.9, {"objective": "mixed", "memory": Memory(micro_batch=16)}),
    "resnet18, at, batch": (
        "resnet18", 0.2, {"objective": "at", "batch_norm": "batch", "memory": Memory(micro_batch=8)},
    ),
    "resnet18, natural": ("resnet18", 0.05, {"objective": "natural", "memory": Memory(micro_batch=6)}),
    "resnet50, rst, recomputed": ("resnet50", 0.2, {"objective": "rst", "memory": 720_000}),
    "resnet18, trades, batch, recomputed": (
        "resnet18", 0.2, {"objective": "trades", "batch_norm": "batch", "memory": 400_000},
    ),
    "wrn28_2, at, bfloat16": ("wrn28_2", 0.2, {"objective": "at", "memory": Memory(500_000, store="bf16")}),
}  # fmt: skip


def export(name: str, folder: Path) -> dict[str, str]:
    """Export one case; returns what it consists of → sha256."""
    network, density, options = CASES[name]
    torch.manual_seed(0)  # of biases, which the plain evaluation model holds
    if network == "every layer":
        module, shape = EveryLayer(), (2, 13, 13)
    else:
        module, shape = getattr(models, network)(num_classes=5, width=0.0625, input_size=16), (3, 16, 16)
    sparse = edge_bcs.sparsify(module, sparsity=1 - density, seed=3, distribution="uniform")
    with mock.patch.object(
        edge_bcs, "__version__", "0.1.0"
    ):  # the plain model names the release that made it
        artifact = edge_bcs.export(
            sparse, folder, input_shape=shape, validate=False, batch_size=32, **options
        )
    files = {file: sha256(folder / file) for file in artifact.manifest["files"] if file.endswith(".onnx")}
    tables = {key: artifact.manifest[key] for key in TABLES}
    return {**files, "manifest": hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()}


def sha256(file: Path) -> str:
    """Of a graph, whatever version wrote it."""
    model = onnx.load(file)
    if not model.producer_version:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    model.producer_version = ""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_the_artifact_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    assert export(name, tmp_path / "artifact") == json.loads(RECORD.read_text())[name]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        record = {name: export(name, Path(scratch) / str(number)) for number, name in enumerate(CASES)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
