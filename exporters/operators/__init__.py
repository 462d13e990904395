"""The closed set of operators of the domain ``edge_bcs``: one class each, found by its name."""

from __future__ import annotations

from . import (
    channels,
    convolution,
    elementwise,
    folding,
    images,
    lists,
    losses,
    normalisation,
    order,
    pooling,
    products,
    resampling,
    storage,
    update,
)
from .base import Operator

_FILES = (
    images, folding, convolution, pooling, elementwise, products, channels,
    resampling, normalisation, losses, order, storage, lists, update,
)  # fmt: skip

OPERATORS: dict[str, Operator] = {
    kind.__name__: kind()
    for file in _FILES
    for kind in vars(file).values()
    if isinstance(kind, type)
    and issubclass(kind, Operator)
    and kind.__module__ == file.__name__
    and not kind.__name__.startswith("_")
}
"""Operator type → its class, of every public class in the files of this package."""
