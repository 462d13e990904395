"""Where rows of ATen operators are registered, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

from ..activations import FUNCTIONS
from ..layers import Axis, Layer
from .call import Call, Row

_ACTIVATIONS = ", ".join(dict.fromkeys(function.title for function in FUNCTIONS.values()))
SUPPORTED = (
    "supported are Conv2d, Linear, BatchNorm1d/2d, GroupNorm, LayerNorm, a learned scale for each channel, "
    f"{_ACTIVATIONS}, sums and products of two tensors or with a number, concatenation, slices, permutations "
    "and shuffles of channels, MaxPool2d, AvgPool2d, adaptive pooling, mean over height and width, "
    "ConstantPad2d, Upsample, flatten/view/reshape to a vector, Dropout, Identity"
)

ROWS: dict[str, Row] = {}
"""Name of an operator of ATen → its row."""


def row(*operators: str) -> Callable[[Row], Row]:
    """Make a function the row of these operators."""

    def register(function: Row) -> Row:
        ROWS.update(dict.fromkeys(operators, function))
        return function

    return register


def pair(value: Any) -> tuple[int, int]:
    """Two whole numbers, where torch takes one for both."""
    first, second = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return int(first), int(second)


def extent(size: int, axis: Axis, call: Call) -> int:
    """How many windows lie on an axis of so many pixels; EdgeBcsError if there is room for none."""
    windows = axis.windows(size)
    if windows < 1:
        raise EdgeBcsError(
            f"the window of '{call.name}' ({axis.span}) is larger than its input "
            f"({size} + {axis.before} + {axis.after})"
        )
    return windows


def size_of(layer: Layer) -> str:
    """Height and width for a message."""
    return f"{layer.shape[1]}×{layer.shape[2]}"
