"""The networks of the paper, as plain torch modules.

Each factory takes `num_classes`, `width` (a multiplier of every hidden channel count, at least 4 channels
remain; 1.0 is the paper's network), `input_channels` and `input_size` (height = width of images, in pixels).
The module it returns carries `network = {"name": ..., "arguments": ...}`, from which `create` makes the same
module again. They are made of convolution, linear, batch norm, ReLU, addition, pooling and flatten alone:
what the compiler takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.models.resnet import ResNet, resnet18, resnet34, resnet50
from edge_bcs.models.vgg import VGG, vgg16
from edge_bcs.models.wide_resnet import WideResNet, wrn28_2, wrn28_4, wrn28_10, wrn34_10

__all__ = [
    "FACTORIES",
    "VGG",
    "ResNet",
    "WideResNet",
    "create",
    "outline",
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg16",
    "wrn28_2",
    "wrn28_4",
    "wrn28_10",
    "wrn34_10",
]

FACTORIES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (vgg16, resnet18, resnet34, resnet50, wrn28_2, wrn28_4, wrn28_10, wrn34_10)
}


_MOST_PARAMETERS = 1 << 28  # 1 GiB of float32


def create(name: str, /, **arguments: Any) -> nn.Module:
    """Return a freshly initialised network of the registry by its name, with the factory's arguments.

    Raises `EdgeBcsError`, before memory is taken, for an unknown name, an unknown argument, one of another
    type or out of range, a geometry that does not fit, or more than 2^28 parameters.
    """
    outline(name, **arguments)
    return FACTORIES[name](**arguments)


def outline(name: str, /, **arguments: Any) -> nn.Module:
    """Return what `create` does, on torch's device "meta": shapes without memory or numbers.

    Raises `EdgeBcsError` as `create` does.
    """
    factory = FACTORIES.get(name)
    if factory is None:
        raise EdgeBcsError(f"there is no network named {name!r}; choose one of {', '.join(FACTORIES)}")
    known = inspect.signature(factory).parameters
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise EdgeBcsError(f"{name} takes no argument {unknown[0]!r}; it takes {', '.join(known)}")
    with torch.device("meta"):
        network = factory(**arguments)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > _MOST_PARAMETERS:
        raise EdgeBcsError(f"{name} would have {count} parameters, and at most {_MOST_PARAMETERS} are taken")
    return network


def __dir__() -> list[str]:
    return sorted(__all__)
