"""The last layer of a network, made anew for other classes: everything before it keeps what it has learnt.

Its weights are normal with a standard deviation of 0.1/√fan-in, its bias is 0: the logits are a tenth as
large as the features that it reads, so that the loss begins near log(classes), and what flows back into the
layers before it is small.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError

_SCALE = 0.1
_STEP = 2  # of the WEIGHT stream, of which new networks take 0 and 1
_COUNTS = ("num_classes", "n_classes")
"""What networks call the number of their classes, where they keep it."""


@dataclass(frozen=True)
class NewHead:
    """A last layer that was made anew: its name, and its outputs before and now."""

    layer: str
    before: int
    classes: int

    def __str__(self) -> str:
        """Say so."""
        name = f", {self.layer}" if self.layer else ""
        before = f"{self.before} → " if self.before != self.classes else ""
        return f"the last layer{name} ({before}{self.classes} outputs), is new"


@dataclass(frozen=True)
class Head:
    """What a network is told to have: its last layer by name, and how many outputs."""

    layer: str
    classes: int


def head_of(network: nn.Module) -> Head | None:
    """Return the last layer of which somebody said how many outputs it has; None where nobody did."""
    found = getattr(network, "edge_bcs_head", None)
    return found if isinstance(found, Head) else None


def outputs(network: nn.Module, layer: str) -> int:
    """Return how many outputs a layer has; EdgeBcsError if no convolution or linear layer has that name."""
    return int(_kernel(network, layer).weight.shape[0])


def renew(network: nn.Module, layer: str, classes: int, seed: int = 0) -> NewHead:
    """Make a layer of `network` anew, in place, with so many outputs.

    Args:
        network: the network. layer: its last layer, by name. classes: at least 1. seed: of its weights.
    """
    before = reshape(network, layer, classes)
    module = _kernel(network, layer)
    shape = tuple(module.weight.shape)
    fan_in = math.prod(shape[1:])
    numbers = random.normal(math.prod(shape), seed=seed, step=_STEP, purpose=random.WEIGHT)
    scale = np.float32(_SCALE / math.sqrt(fan_in))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(numbers * scale).view(shape))
        if module.bias is not None:
            module.bias.zero_()
    module.edge_bcs_drawn = _checksum(module)  # type: ignore[assignment]
    return NewHead(layer, before, classes)


def reshape(network: nn.Module, layer: str, classes: int) -> int:
    """Give a layer so many outputs, in place, and return how many it had; its weights are zero then."""
    module = _kernel(network, layer)
    before = outputs(network, layer)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise EdgeBcsError(f"the last layer, {layer}, has groups of channels: it cannot be made anew")
    for name in ("weight", "bias"):
        old = getattr(module, name)
        if old is not None:
            new = nn.Parameter(old.new_zeros(classes, *old.shape[1:]), requires_grad=old.requires_grad)
            setattr(module, name, new)
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", classes)
    for place in _around(layer):
        part = network.get_submodule(place)
        for name in _COUNTS:
            if getattr(part, name, None) == before:
                setattr(part, name, classes)
    known = getattr(network, "network", None)  # of the networks of edge-bcs: what makes them
    if isinstance(known, dict) and isinstance(known.get("arguments"), dict):
        arguments = {**known["arguments"], "num_classes": classes}
        network.network = {**known, "arguments": arguments}  # type: ignore[assignment]
    network.edge_bcs_head = Head(layer, classes)  # type: ignore[assignment]
    return before


def remember(network: nn.Module, layer: str) -> None:
    """Note that `layer` is the last one and has as many outputs as were asked for."""
    network.edge_bcs_head = Head(layer, outputs(network, layer))  # type: ignore[assignment]


def is_new(module: nn.Module) -> bool:
    """Whether a layer was made anew, and its weights are still those that were drawn."""
    drawn = getattr(module, "edge_bcs_drawn", None)
    if drawn is None or not isinstance(module, nn.Conv2d | nn.Linear):
        return False
    return bool(drawn == _checksum(module))


def _checksum(module: nn.Conv2d | nn.Linear) -> int:
    return zlib.crc32(module.weight.detach().cpu().contiguous().numpy().tobytes())


def _around(layer: str) -> list[str]:
    """The names of the modules in which a layer lies, the network itself first."""
    parts = layer.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _kernel(network: nn.Module, layer: str) -> nn.Conv2d | nn.Linear:
    module = dict(network.named_modules()).get(layer)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise EdgeBcsError(f"the network has no convolution or linear layer {layer[:200]!r}")
    return module
