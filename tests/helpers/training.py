"""A tiny network, digits and short options for tests that train on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import edge_bcs
from edge_bcs import Attack, Compute
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


def same(first: edge_bcs.SparseModel, second: edge_bcs.SparseModel) -> bool:
    other = second.state()
    return all(np.array_equal(buffer, other[name]) for name, buffer in first.state().items())
