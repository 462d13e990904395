"""VGG-16 for 32x32 images (Simonyan & Zisserman, 2015), as in Özdenizci & Legenstein (2021).

Thirteen 3x3 convolutions, each followed by batch norm and ReLU, four 2x2 max poolings, and three dense layers
with biases. 15,302,848 prunable weights at width 1 with 10 classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edge_bcs.models.geometry import check_arguments, scaled

_POOL = 0  # marks a 2x2 max pooling in the list of output channels
_VGG16 = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL, 512, 512, 512, _POOL, 512, 512, 512)
_DENSE = 256


class VGG(nn.Module):
    """Convolutions with batch norm, then dense layers; f32 [n, C, S, S] -> logits f32 [n, classes]."""

    network: dict[str, Any]

    def __init__(self, num_classes: int, width: float, input_channels: int, input_size: int) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels, size = input_channels, input_size
        for item in _VGG16:
            if item == _POOL:
                features.append(nn.MaxPool2d(2))
                size //= 2
                continue
            out = scaled(item, width)
            features += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        hidden = scaled(_DENSE, width)
        self.features = nn.Sequential(*features)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels * size * size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, classes] of images f32 [n, C, S, S] in [0, 1]."""
        logits: Tensor = self.classifier(self.flatten(self.features(x)))
        return logits

    def initial_density(self, position: int, layers: int, name: str, connectivity: float) -> float:
        """Return the paper's initial density of prunable layer `position` of `layers` (appendix A.3)."""
        if position < 2 or position == layers - 1:
            return 0.6
        return 0.2 if position < 4 else 0.5 * connectivity


def vgg16(num_classes: int = 10, width: float = 1.0, input_channels: int = 3, input_size: int = 32) -> VGG:
    """Return VGG-16; images need at least 16x16 pixels (four poolings)."""
    check_arguments("vgg16", num_classes, width, input_channels, input_size, smallest=16)
    model = VGG(num_classes, width, input_channels, input_size)
    model.network = {
        "name": "vgg16",
        "arguments": {
            "num_classes": num_classes,
            "width": width,
            "input_channels": input_channels,
            "input_size": input_size,
        },
    }
    return model
