"""What operators make of constants: the arithmetic on shapes that PyTorch writes into an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from .onnx_file import Array

FOLDED: dict[str, Callable[..., Any]] = {
    "Identity": lambda a, x: x,
    "Gather": lambda a, x, i: np.take(x, i, a.get("axis", 0)),
    "Concat": lambda a, *xs: np.concatenate([np.atleast_1d(x) for x in xs], a.get("axis", 0)),
    "Unsqueeze": lambda a, x, axes=None: np.expand_dims(
        x, tuple(int(i) for i in np.ravel(a.get("axes", axes)))
    ),
    "Squeeze": lambda a, x, axes=None: np.squeeze(x),
    "Cast": lambda a, x: x.astype({1: np.float32, 6: np.int64, 7: np.int64, 9: np.bool_}[a["to"]]),
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: x // y if x.dtype.kind == "i" else x / y,
    "Floor": lambda a, x: np.floor(x),
    "Sqrt": lambda a, x: np.sqrt(x),
    "Reshape": lambda a, x, shape: np.reshape(x, tuple(int(i) for i in shape)),
    "Transpose": lambda a, x: np.transpose(x, a.get("perm")),
    "ConstantOfShape": lambda a, shape: np.full(
        _bounded(shape), np.ravel(a.get("value", np.zeros(1, np.float32)))[0]
    ),
    "Slice": lambda a, x, first, last, axes=None, steps=None: _cut(x, first, last, axes, steps),
    "Shape": lambda a, x: np.array(x.shape, np.int64),
}


def _bounded(shape: Array) -> tuple[int, ...]:
    extents = tuple(int(extent) for extent in np.ravel(shape))
    if prod(extents) > 1 << 20 or min(extents, default=1) < 0:
        raise ValueError(f"a constant of the shape {list(extents)}")
    return extents


def _cut(x: Array, first: Array, last: Array, axes: Array | None, steps: Array | None) -> Array:
    slices = [slice(None)] * x.ndim
    for position, axis in enumerate(range(len(first)) if axes is None else np.ravel(axes)):
        step = None if steps is None else int(np.ravel(steps)[position])
        slices[int(axis)] = slice(int(first[position]), int(last[position]), step)
    return x[tuple(slices)]
