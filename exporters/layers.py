"""The layer graph: what a captured network computes, one dataclass a layer, with the shape of every output.

Shapes are those of one sample: ``(C, H, W)`` for a feature map and ``(F,)`` for a vector. The order of
``LayerGraph.layers`` is the order in which the network computed them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, Literal

from edge_bcs.core.errors import EdgeBcsError

Shape = tuple[int, ...]


MOST_POSITIONS, MOST_STRIDE, MOST_PADDING = 255, 64, 255
"""What the kernels reach."""


@dataclass(frozen=True)
class Axis:
    """Windows along one axis: window w begins at pixel w·stride − before, and its ``kernel`` positions are
    ``dilation`` pixels apart; ``after`` zeros follow the last pixel.
    """

    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """Pixels from the first position of a window to the last, both counted."""
        return (self.kernel - 1) * self.dilation + 1

    def windows(self, size: int, ceil: bool = False) -> int:
        """How many windows there are over ``size`` pixels, below 1 where none fits; with ``ceil`` also one
        that begins on the padded pixels and ends beyond."""
        room = size + self.before + self.after - self.span
        count = (room + (self.stride - 1) * ceil) // self.stride + 1
        return count - (ceil and (count - 1) * self.stride >= size + self.before)

    def halo(self, size: int, windows: int) -> int:
        """Pixels that ``windows`` windows reach beyond ``size`` pixels, on the side where it is more."""
        return max(self.before, (windows - 1) * self.stride + self.span - self.before - size)

    def gradient_halo(self, size: int, windows: int) -> int:
        """Windows beyond the ``windows`` that there are, on the side where it is more, in which a pixel would
        lie if there were more: the gradient of the ``size`` pixels reads as many zeros.
        """
        halo = 0
        for position in range(self.kernel):
            first, phase = divmod(position * self.dilation - self.before, self.stride)
            pixels = -(-(size - phase) // self.stride)  # that meet windows at this position
            if pixels > 0:
                halo = max(halo, first, pixels - 1 - first - (windows - 1))
        return halo


@dataclass(frozen=True)
class Window:
    """Windows of a map, an `Axis` for each direction."""

    down: Axis
    across: Axis

    @classmethod
    def of(
        cls, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
    ) -> Window:
        """From two numbers each, and pads (top, left, bottom, right)."""
        return cls(*(Axis(kernel[i], strides[i], pads[i], pads[i + 2], dilations[i]) for i in (0, 1)))

    def check(self, name: str) -> None:
        """Refuse what the kernels do not reach, for the layer ``name``.

        Raises:
            EdgeBcsError: it says which limit.
        """
        down, across = self.down, self.across
        if down.kernel * across.kernel > MOST_POSITIONS:
            raise EdgeBcsError(
                f"convolution '{name}' has a kernel of {down.kernel}×{across.kernel}; "
                f"at most {MOST_POSITIONS} weights a channel are supported"
            )
        found = {
            "stride": (max(down.stride, across.stride), MOST_STRIDE),
            "padding": (max(down.before, down.after, across.before, across.after), MOST_PADDING),
            "window, with its dilation,": (max(down.span, across.span), MOST_PADDING + 1),
        }
        for what, (number, most) in found.items():
            if number > most:
                raise EdgeBcsError(
                    f"convolution '{name}' has a {what} of {number}; at most {most} is supported"
                )

    @property
    def phases(self) -> int:
        """Interleaved images into which the strides cut the map."""
        return self.down.stride * self.across.stride


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

    def after(self, mean: Sequence[float], std: Sequence[float]) -> Input:
        """The same for an image of which (x − mean) / std, a number a channel, is taken first."""
        own = self.scale or (1.0,) * len(std), self.shift or (0.0,) * len(std)
        scale = tuple(a / deviation for a, deviation in zip(own[0], std, strict=True))
        shift = tuple(b - a * middle for a, b, middle in zip(scale, own[1], mean, strict=True))
        return replace(self, scale=scale, shift=shift)


@dataclass(frozen=True)
class Convolution(Layer):
    """A convolution; a linear layer is a 1×1 convolution of a 1×1 map.

    Attributes:
        module: qualified name of the torch module.
        kernel, strides, dilations: of (height, width). pads: (top, left, bottom, right), zeros.
        groups: of channels, each of which meets its own alone.
        bias: whether it has one.
        weights: where they are: among the connections, or in ``dense.value`` (`network` decides).
    """

    module: str
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    weights: Literal["connections", "dense"] = "connections"

    @property
    def operator(self) -> str:
        """By where the weights are."""
        return "Conv" if self.weights == "connections" else "DenseConv"

    @property
    def window(self) -> Window:
        """Where its windows lie."""
        return Window.of(self.kernel, self.strides, self.pads, self.dilations)


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Batch normalisation with a learned scale and shift and running statistics."""

    computed_by = "BatchNorm"
    module: str
    epsilon: float
    momentum: float


@dataclass(frozen=True)
class Activation(Layer):
    """A function of each number by itself: ``kind`` of `activations.FUNCTIONS`, with its attributes."""

    computed_by = "Activate"
    kind: str
    attributes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Add(Layer):
    """Sum of two tensors of one shape."""

    computed_by = "Add"


@dataclass(frozen=True)
class GroupNorm(Layer):
    """Normalisation of each image by itself: by the statistics of each of ``groups`` of channels or, with
    ``per_pixel``, by those of the channels of each pixel (layer norm). ``module`` has a weight and a bias for
    each channel; it is "" where there is neither."""

    computed_by = "GroupNorm"
    module: str = ""
    groups: int = 1
    epsilon: float = 1e-5
    per_pixel: bool = False

    @property
    def operator(self) -> str:
        """By whose statistics."""
        return "LayerNorm" if self.per_pixel else "GroupNorm"


@dataclass(frozen=True)
class Scale(Layer):
    """A learned number for each channel, ``parameter`` by its qualified name, times the channel."""

    computed_by = "Affine"
    parameter: str = ""


@dataclass(frozen=True)
class Multiply(Layer):
    """Product of two tensors of one shape or, with ``each_channel``, of a map and a number for each of its
    channels, (C, 1, 1), which comes second."""

    computed_by = "Multiply"
    each_channel: bool = False

    @property
    def operator(self) -> str:
        """By what is multiplied."""
        return "Gate" if self.each_channel else "Multiply"


@dataclass(frozen=True)
class Rescale(Layer):
    """factor·x + offset, two constants."""

    computed_by = "Rescale"
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Concat(Layer):
    """The channels of all inputs, one input behind the other."""

    computed_by = "Channels"


@dataclass(frozen=True)
class Channels(Layer):
    """Channel i is channel source[i] of the inputs, whose channels lie one input behind the other, or zeros
    for −1: slices, chunks, shuffles."""

    computed_by = "Channels"
    source: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pool(Layer):
    """Windows of ``kernel`` every ``strides`` on a map of ``source`` pixels (all: height, width).

    ``pads`` are (top, left, bottom, right). The shape says how many windows there are (`Axis.windows` counts
    them): the last may reach beyond the padded map.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    source: tuple[int, int]
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def beyond(self) -> tuple[int, int]:
        """Rows and columns by which the last windows reach beyond the padded map."""
        down, across = (
            (count - 1) * stride + kernel - size - before - after
            for count, stride, kernel, size, before, after in zip(
                self.shape[1:],
                self.strides,
                self.kernel,
                self.source,
                self.pads[:2],
                self.pads[2:],
                strict=True,
            )
        )
        return max(0, down), max(0, across)


@dataclass(frozen=True)
class MaxPool(Pool):
    """Maximum over windows; padded pixels never win."""

    computed_by = "MaxPool"


@dataclass(frozen=True)
class AveragePool(Pool):
    """Mean over windows; global pooling is ``kernel`` = ``source``.

    ``count_include_pad`` says whether pads count as zeros; what lies beyond them never counts. With
    ``adaptive`` the windows share the map out among the pixels of the output, and ``kernel`` is the largest.
    """

    computed_by = "AveragePool"
    count_include_pad: bool = True
    adaptive: bool = False


@dataclass(frozen=True)
class Pad(Layer):
    """The map with (top, left, bottom, right) pixels of ``value`` around it; negative ones are cut off."""

    computed_by = "Pad"
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    value: float = 0.0


@dataclass(frozen=True)
class Upsample(Layer):
    """The map of ``source`` (height, width) pixels in the size of the shape, as torch's interpolate does it.

    With ``linear`` between the two nearest pixels of each axis, else the nearest. ``scales`` are the
    distances in the map of neighbours in the result, (0, 0) where they follow from the sizes.
    """

    computed_by = "Upsample"
    source: tuple[int, int] = (0, 0)
    linear: bool = False
    align_corners: bool = False
    scales: tuple[float, float] = (0.0, 0.0)


def shares(size: int, count: int) -> list[tuple[int, int]]:
    """(begin, end) of each window of an adaptive pooling, along one axis."""
    return [(o * size // count, -((o + 1) * size // -count)) for o in range(count)]


@dataclass(frozen=True)
class Flatten(Layer):
    """The same numbers in another shape: (C, H, W) → (C·H·W,), or (C,) → (C, 1, 1)."""


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
