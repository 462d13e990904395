"""A network with every kind of parameter, for tests of training in part."""

from __future__ import annotations

import torch
from torch import nn

from edge_bcs.method.sparse_model import SparseModel
from helpers.networks import Dense, sparse_of

SHAPE = (3, 8, 8)
PARTS = ("head", "last:2", "last:4", "norm", "bias")


class Mobile(nn.Module):
    """An inverted residual with a dense depthwise kernel and a gate, then a norm by groups; 3×8×8 images.

    Layers with weights in the order of computation: stem, expand, depthwise, squeeze, excite, project, widen,
    head. `head` is numbered first.
    """

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(10, classes)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12), nn.Hardswish())
        self.depthwise = Dense(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False))
        self.after = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(4, 12, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.widen = nn.Conv2d(6, 10, 3, bias=False)
        self.grouped = nn.GroupNorm(2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.after(self.depthwise(self.expand(x)))
        x = x + self.project(y * self.excite(self.squeeze(y)))
        x = torch.relu(self.grouped(self.widen(x))).mean((2, 3))
        logits: torch.Tensor = self.head(x)
        return logits


def mobile(density: float = 0.4, seed: int = 3) -> SparseModel:
    """`Mobile` with random connections, scales, shifts and statistics."""
    torch.manual_seed(seed)
    return sparse_of(Mobile(), density, seed)
