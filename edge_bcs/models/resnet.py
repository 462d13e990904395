"""ResNet-18, -34 and -50 with the 3x3 CIFAR stem (He et al., 2016), as in Özdenizci & Legenstein (2021).

Prunable weights at width 1 with 10 classes: 11,164,352, 21,265,088 and 23,467,712.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edge_bcs.models.geometry import check_arguments, scaled


def _projection(channels: int, out: int, stride: int) -> nn.Module:
    """Return the shortcut where the shape changes: a 1x1 convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; f32 [n, channels, H, W] -> f32 [n, planes, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.projects = stride != 1 or channels != planes
        if self.projects:
            self.shortcut = _projection(channels, planes, stride)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)) + (self.shortcut(x) if self.projects else x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut.

    f32 [n, channels, H, W] -> f32 [n, 4·planes, H/stride, W/stride].
    """

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.projects = stride != 1 or channels != out
        if self.projects:
            self.shortcut = _projection(channels, out, stride)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(bn(conv3(relu(bn(conv2(relu(bn(conv1(x)))))))) + shortcut(x))."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        out: Tensor = self.relu3(self.bn3(self.conv3(y)) + (self.shortcut(x) if self.projects else x))
        return out


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and a dense layer.

    Input f32 [n, C, S, S] in [0, 1], output logits f32 [n, classes].
    """

    network: dict[str, Any]

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        width: float,
        input_channels: int,
    ) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.conv1 = nn.Conv2d(input_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        stages = []
        for stage, count in enumerate(blocks):
            planes = scaled(64 << stage, width)
            stage_blocks = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                stage_blocks.append(block(channels, planes, stride))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*stage_blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, classes] of images f32 [n, C, S, S] in [0, 1]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.stage4(self.stage3(self.stage2(self.stage1(y))))
        logits: Tensor = self.classifier(self.flatten(self.pool(y)))
        return logits

    def initial_density(self, position: int, layers: int, name: str, connectivity: float) -> float:
        """Return the paper's initial density of prunable layer `position` of `layers` (appendix A.3)."""
        if position in (0, layers - 1):
            return 0.6
        return 0.2 if name.startswith("stage1.") else 0.5 * connectivity


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, int, int, int],
    arguments: dict[str, Any],
) -> ResNet:
    check_arguments(name, **arguments, smallest=4)
    model = ResNet(block, blocks, arguments["num_classes"], arguments["width"], arguments["input_channels"])
    model.network = {"name": name, "arguments": arguments}
    return model


def resnet18(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> ResNet:
    """Return ResNet-18; images need at least 4x4 pixels."""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), dict(locals()))


def resnet34(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> ResNet:
    """Return ResNet-34; images need at least 4x4 pixels."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), dict(locals()))


def resnet50(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> ResNet:
    """Return ResNet-50; images need at least 4x4 pixels."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), dict(locals()))
