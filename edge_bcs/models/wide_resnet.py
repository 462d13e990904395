"""Wide residual networks with pre-activation (Zagoruyko & Komodakis, 2016), as in the paper.

WRN-28-2, -28-4, -28-10 and -34-10. Prunable weights at width 1 with 10 classes: 1,463,984 for WRN-28-2 and
5,841,840 for WRN-28-4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edge_bcs.models.geometry import check_arguments, scaled


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution.

    f32 [n, channels, H, W] -> f32 [n, out, H/stride, W/stride]. Where the shape changes, the shortcut is a
    1x1 convolution of the activated input.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.projects = stride != 1 or channels != out
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        if self.projects:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return conv(relu(bn(conv(relu(bn(x)))))) + shortcut."""
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = y + (self.shortcut(activated) if self.projects else x)
        return out


class WideResNet(nn.Module):
    """A stem, three groups of (depth − 4)/6 blocks, batch norm, ReLU, global pooling and a dense layer.

    Input f32 [n, C, S, S] in [0, 1], output logits f32 [n, classes].
    """

    network: dict[str, Any]

    def __init__(
        self, depth: int, widening: int, num_classes: int, width: float, input_channels: int
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(input_channels, channels, 3, padding=1, bias=False)
        groups = []
        for group in range(3):
            out = scaled((16 << group) * widening, width)
            blocks = []
            for number in range((depth - 4) // 6):
                stride = 2 if group > 0 and number == 0 else 1
                blocks.append(PreActivationBlock(channels, out, stride))
                channels = out
            groups.append(nn.Sequential(*blocks))
        self.group1, self.group2, self.group3 = groups
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, classes] of images f32 [n, C, S, S] in [0, 1]."""
        y = self.group3(self.group2(self.group1(self.conv1(x))))
        logits: Tensor = self.classifier(self.flatten(self.pool(self.relu(self.bn(y)))))
        return logits

    def initial_density(self, position: int, layers: int, name: str, connectivity: float) -> float:
        """Return the paper's initial density of prunable layer `position` of `layers` (appendix A.3)."""
        if position in (0, layers - 1):
            return 0.6
        return 0.1 if name.startswith("group1.") else 0.5 * connectivity


def _wide_resnet(name: str, depth: int, widening: int, arguments: dict[str, Any]) -> WideResNet:
    check_arguments(name, **arguments, smallest=4)
    model = WideResNet(
        depth, widening, arguments["num_classes"], arguments["width"], arguments["input_channels"]
    )
    model.network = {"name": name, "arguments": arguments}
    return model


def wrn28_2(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> WideResNet:
    """Return WRN-28-2; images need at least 4x4 pixels."""
    return _wide_resnet("wrn28_2", 28, 2, dict(locals()))


def wrn28_4(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> WideResNet:
    """Return WRN-28-4; images need at least 4x4 pixels."""
    return _wide_resnet("wrn28_4", 28, 4, dict(locals()))


def wrn28_10(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> WideResNet:
    """Return WRN-28-10; images need at least 4x4 pixels."""
    return _wide_resnet("wrn28_10", 28, 10, dict(locals()))


def wrn34_10(
    num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32
) -> WideResNet:
    """Return WRN-34-10; images need at least 4x4 pixels."""
    return _wide_resnet("wrn34_10", 34, 10, dict(locals()))
