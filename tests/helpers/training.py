"""A tiny network, digits and short options for tests that train on the host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs import Attack, Compute
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.data import ArrayDataset, open_data

SHORT: dict[str, Any] = {
    "batch_size": 16,
    "attack": Attack(steps=1),
    "progress": False,
    "compute": Compute(device="cpu"),
}


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )


def digits(count: int) -> ArrayDataset:
    data = open_data("digits", shape=(1, 8, 8))
    return ArrayDataset(*data.read(data.order(0, 0)[:count]), classes=data.classes)


@contextmanager
def cut_off(owner: Any, name: str, stop: int) -> Iterator[None]:
    """A block that is interrupted, as by Ctrl-C, when ``owner.name`` is called more than ``stop`` times."""
    call, calls = getattr(owner, name), []

    def stopping(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return call(*given, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stopping)
        yield


def same(first: edge_bcs.SparseModel, second: edge_bcs.SparseModel) -> bool:
    other = second.state()
    return all(np.array_equal(buffer, other[name]) for name, buffer in first.state().items())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def check_same(whole: Path, cut: Path) -> None:
    """Both folders hold the same, but for the time that it took."""
    for name in ("checkpoint", "last"):
        one, other = (read_checkpoint(folder / f"{name}.safetensors") for folder in (whole, cut))
        assert one.metadata == other.metadata
        assert all(np.array_equal(buffer, other.tensors[key]) for key, buffer in one.tensors.items())
    steps = [
        [{**line, "milliseconds": 0} for line in lines(folder, "metrics.jsonl")] for folder in (whole, cut)
    ]
    assert steps[0] == steps[1]
    assert (whole / "epochs.jsonl").read_text() == (cut / "epochs.jsonl").read_text()
