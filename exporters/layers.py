"""The layer graph: what a captured network computes, one dataclass a layer, with the shape of every output.

Shapes are those of one sample: ``(C, H, W)`` for a feature map and ``(F,)`` for a vector. The order of
``LayerGraph.layers`` is the order in which the network computed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from edge_bcs.core.errors import EdgeBcsError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: ``name`` is unique and also names its output; ``inputs`` are names of earlier layers.

    ``computed_by`` names the operator that computes such a layer where nothing is fused ("" for none).
    """

    computed_by: ClassVar[str] = ""
    name: str
    inputs: tuple[str, ...]
    shape: Shape

    @property
    def operator(self) -> str:
        """The operator that computes this layer where nothing is fused."""
        return self.computed_by

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(channels, height, width) of the output; a vector has height and width 1."""
        return (
            (self.shape[0], 1, 1) if len(self.shape) == 1 else (self.shape[0], self.shape[1], self.shape[2])
        )


@dataclass(frozen=True)
class Input(Layer):
    """The image, scale·x + shift where its pixels are normalised: a number a channel, or none."""

    computed_by = "PackInput"
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()


@dataclass(frozen=True)
class Convolution(Layer):
    """A convolution without groups or dilation; a linear layer is a 1×1 convolution of a 1×1 map.

    ``module`` is the qualified name of the torch module, ``kernel`` is (height, width).
    """

    computed_by = "Conv"
    module: str
    kernel: tuple[int, int]
    stride: int
    padding: int
    bias: bool


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Batch normalisation with a learned scale and shift and running statistics."""

    computed_by = "BatchNorm"
    module: str
    epsilon: float
    momentum: float


@dataclass(frozen=True)
class ReLU(Layer):
    """max(0, x)."""

    computed_by = "Affine"


@dataclass(frozen=True)
class Elementwise(Layer):
    """A function of each element by itself: the operator ``kind``, with ``attributes`` of its own."""

    kind: str
    attributes: Mapping[str, float] = field(default_factory=dict)

    @property
    def operator(self) -> str:
        """The operator of that name."""
        return self.kind


@dataclass(frozen=True)
class Add(Layer):
    """Sum of two tensors of one shape."""

    computed_by = "Add"


@dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum over square windows; padded pixels never win."""

    computed_by = "MaxPool"
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class AveragePool(Layer):
    """Mean over square windows without padding; global pooling is ``kernel`` = height = width."""

    computed_by = "AveragePool"
    kernel: int
    stride: int


@dataclass(frozen=True)
class Flatten(Layer):
    """(C, H, W) → (C·H·W,)."""


@dataclass
class LayerGraph:
    """The layers of a network in order of computation; ``output`` names the one that holds the logits.

    ``ending`` is "softmax" or "log_softmax" if that is what the network does to its logits, and ``left_out``
    says in clauses what of its answer is not among the layers.
    """

    layers: list[Layer] = field(default_factory=list)
    output: str = ""
    ending: str = ""
    left_out: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def epsilon(self) -> float:
        """That of every batch norm; EdgeBcsError if they differ."""
        found = {layer.epsilon for layer in self.layers if isinstance(layer, BatchNorm)}
        if len(found) > 1:
            raise EdgeBcsError(f"the batch norms have different eps {sorted(found)}; give all the same")
        return found.pop() if found else 1e-5

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return prod(self[self.output].shape)

    def consumers(self) -> dict[str, list[Layer]]:
        """For each layer the layers that read it, in order; a layer that reads it twice is listed twice."""
        readers: dict[str, list[Layer]] = {layer.name: [] for layer in self.layers}
        for layer in self.layers:
            for name in layer.inputs:
                readers[name].append(layer)
        return readers


def shown(shape: Shape) -> str:
    """A shape for a message: (8, 4, 4)."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
