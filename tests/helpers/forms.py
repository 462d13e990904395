"""One network written in several forms, and what the tests of the front end share beside it."""

# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from edge_bcs.exporters.layers import Layer, LayerGraph
from torch import Tensor, nn

SHAPE = (3, 8, 8)


def summary(graph: LayerGraph) -> list[Layer]:
    """The layers, named by their position: what a network computes, and not how it calls it."""
    numbers = {layer.name: str(number) for number, layer in enumerate(graph.layers)}
    return [
        replace(layer, name=numbers[layer.name], inputs=tuple(numbers[name] for name in layer.inputs))
        for layer in graph.layers
    ]


class Modules(nn.Module):
    """Every kind of layer as modules; the others below compute the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.relu = nn.ReLU()
        self.leaky = nn.LeakyReLU(0.2)
        self.max = nn.MaxPool2d(3, 1, 1)
        self.average = nn.AvgPool2d(2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        y = self.leaky(y + self.max(y))
        return self.head(self.drop(torch.flatten(self.pool(self.average(y)), 1)))  # type: ignore[no-any-return]


class Functions(Modules):
    def forward(self, image: Tensor) -> Tensor:
        y = F.conv2d(image, self.conv.weight, self.conv.bias, stride=2, padding=(1, 1))
        n = self.norm
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.3, n.eps)
        y = F.relu(y)
        y = F.leaky_relu(torch.add(y, F.max_pool2d(y, 3, stride=1, padding=1)), 0.2)
        y = F.avg_pool2d(y, (2, 2))
        y = F.adaptive_avg_pool2d(y, (1, 1)).flatten(1)
        y = F.dropout(y, 0.5, self.training)
        return F.linear(y, self.head.weight, self.head.bias)


class Methods(Modules):
    """In place and as methods, the vector made with the sizes of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x.contiguous(memory_format=torch.channels_last))).relu_()
        z = self.max(y)
        z = y + z
        z = F.leaky_relu_(z, 0.2)
        z = F.adaptive_avg_pool2d(self.average(z), 1).view(x.shape[0], -1).detach().clone()
        return self.head(F.dropout(z.to(torch.float32), 0.5, self.training))  # type: ignore[no-any-return]


class Mean(Modules):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        z = y.add(self.max(y))
        z = self.average(self.leaky(z))
        return self.head(z.mean(dim=(-1, -2), keepdim=True).squeeze(-1).squeeze(-1))  # type: ignore[no-any-return]


class Inside(nn.Module):
    """The network two modules deep."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.outer = nn.ModuleList([nn.Sequential(nn.Identity(), module)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.outer:
            x = part(x)
        return x


# Refusals


class Around(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.alpha = nn.Parameter(torch.ones(1))
        self.kernel = nn.Parameter(torch.zeros(4, 4, 1, 1))
        self.register_buffer("steps", torch.zeros(1))
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x)).flatten(1)
