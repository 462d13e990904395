"""A network for digits of 8×8 pixels that learns inside 512 KiB."""

from __future__ import annotations

from torch import nn


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def digits() -> nn.Module:
    """Images [1, 8, 8], ten classes."""
    return nn.Sequential(
        *_convolution(1, 16),
        *_convolution(16, 32, stride=2),
        *_convolution(32, 64, stride=2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )
