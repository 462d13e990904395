"""What keeps seven tensors from being the state of a network, in words; the same on host and board."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Parts:
    """Which part of a network a number of its state belongs to.

    Attributes:
        size: N, the positions that a connection may have.
        kernels, dense, statistics: (name, first number) of each kernel among the N positions, of each
            parameter in `dense.value` and of each batch norm in `batchnorm.mean`, in order.
    """

    size: int
    kernels: Sequence[tuple[str, int]]
    dense: Sequence[tuple[str, int]]
    statistics: Sequence[tuple[str, int]]

    def owner(self, tensor: str, place: int, index: Array) -> str:
        """The kernel, parameter or batch norm that element ``place`` of a tensor such as "coo.value" belongs
        to; ``index`` is `coo.index`."""
        kind = tensor.partition(".")[0]
        table = {"coo": self.kernels, "dense": self.dense, "batchnorm": self.statistics}[kind]
        number = int(index[place]) if kind == "coo" else place
        name = table[bisect_right([first for _, first in table], number) - 1][0]
        return name if name.isprintable() else repr(name)


def state_fault(tensors: Mapping[str, Array], parts: Parts) -> str | None:
    """Say why ``tensors`` are not a state, naming tensor and part ("batchnorm.variance of bn1 holds inf, …").

    None if they are one: `coo.index` strictly ascending in [0, N), every number finite, no connection of
    weight zero, no negative variance.
    """
    index = tensors["coo.index"]
    if not len(index) or index[0] < 0 or index[-1] >= parts.size or not np.all(index[1:] > index[:-1]):
        return f"coo.index is not strictly ascending within the network's {parts.size} positions"

    def first(name: str, wrong: Array, what: str) -> str:
        place = int(np.argmax(wrong))
        return f"{name} of {parts.owner(name, place, index)} holds {tensors[name][place]:g}, {what}"

    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return first(name, ~np.isfinite(array), "which is not finite")
    if not np.all(tensors["coo.value"]):
        return first("coo.value", tensors["coo.value"] == 0, "a connection of weight zero")
    if np.any(tensors["batchnorm.variance"] < 0):
        return first("batchnorm.variance", tensors["batchnorm.variance"] < 0, "which is negative")
    return None
