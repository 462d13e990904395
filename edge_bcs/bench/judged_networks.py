"""ResNet-18 and VGG-16 for 32×32 images as robustness benchmarks spell them, in torch alone.

The layers are those of `edge_bcs.models`; what differs is how they are called and how the last map is pooled.
`edge_bcs.bench.judges` writes a checkpoint by these names, and this file beside it, as it is.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

_STAGES = (64, 128, 256, 512)
_CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DENSE = 256


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut: 1×1 where the shape changes, else nothing."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            projection = nn.Conv2d(channels, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """f32 [n, 3, 32, 32] in [0, 1] -> logits f32 [n, classes]; means of 4×4 maps before the last layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STAGES[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGES[0])
        stages = []
        for before, planes in pairwise((_STAGES[0], *_STAGES)):
            first = ResidualBlock(before, planes, 1 if planes == _STAGES[0] else 2)
            stages.append(nn.Sequential(first, ResidualBlock(planes, planes, 1)))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(_STAGES[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        logits: Tensor = self.linear(nn.functional.avg_pool2d(y, 4).flatten(1))
        return logits


class VGG16(nn.Module):
    """f32 [n, 3, 32, 32] in [0, 1] -> logits f32 [n, classes]; 2×2 means before the dense layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, group in enumerate(_CONVOLUTIONS):
            layers += [nn.MaxPool2d(2)] if number else []
            for planes in group:
                layers += [nn.Conv2d(channels, planes, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(planes), nn.ReLU()]
                channels = planes
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 2 * 2, _DENSE), nn.ReLU(),
            nn.Linear(_DENSE, _DENSE), nn.ReLU(),
            nn.Linear(_DENSE, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits
