"""The state of a sparse network: seven tensors under seven names, the same in memory, in an artifact, in a
run on the board and in a checkpoint, and what keeps seven tensors from being one.

| name | what |
| --- | --- |
| `coo.value`, `coo.index`, `coo.momentum` | κ connections: weight, position (ascending), momentum |
| `dense.value`, `dense.momentum` | all other parameters, one after the other, and their momentum |
| `batchnorm.mean`, `batchnorm.variance` | the running statistics of all batch norms |

Where a network is trained in part (`edge_bcs.core.part`), momentum is that of what is trained alone.

A file of them is a safetensors file whose metadata says at least `format`, `version`, `step` and `seed`;
`edge_bcs.core.tensor_file` reads and writes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_bcs.core.part import Trained

Array = np.ndarray[Any, Any]

FORMAT = "edge-bcs-state"
VERSION = "1"
TYPES = {
    "coo.value": "float32",
    "coo.index": "int32",
    "coo.momentum": "float32",
    "dense.value": "float32",
    "dense.momentum": "float32",
    "batchnorm.mean": "float32",
    "batchnorm.variance": "float32",
}
"""Name → element type, in the order of the state."""
STATE_NAMES = tuple(TYPES)
NEWBORN = np.float32(1e-12)
"""Magnitude of the weight that a connection is born with; its momentum is 0."""


def state_layout(
    kappa: int, dense_size: int, statistics_size: int, trained: tuple[int, int] | None = None
) -> dict[str, tuple[str, int]]:
    """Name → (element type, length) of a network's state, in order.

    Args:
        kappa: connections. dense_size: other parameters. statistics_size: channels of all batch norms.
        trained: how many connections and other parameters have momentum; default: all.
    """
    lengths = {"coo": kappa, "dense": dense_size, "batchnorm": statistics_size}
    moving = dict(zip(("coo", "dense"), (kappa, dense_size) if trained is None else trained, strict=True))

    def length(name: str) -> int:
        group, _, kind = name.partition(".")
        return moving[group] if kind == "momentum" else lengths[group]

    return {name: (kind, length(name)) for name, kind in TYPES.items()}


def is_state(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a file are those of a state of this version."""
    return metadata.get("format") == FORMAT and metadata.get("version") == VERSION


@dataclass(frozen=True)
class Parts:
    """Which part of a network a number of its state belongs to.

    Attributes:
        size: N, the positions that a connection may have.
        kernels, dense, statistics: (name, first number) of each kernel among the N positions, of each
            parameter in `dense.value` and of each batch norm in `batchnorm.mean`, in order.
        trained: what has momentum and gradients; None: everything.
    """

    size: int
    kernels: Sequence[tuple[str, int]]
    dense: Sequence[tuple[str, int]]
    statistics: Sequence[tuple[str, int]]
    trained: Trained | None = None

    def owner(self, tensor: str, place: int, index: Array) -> str:
        """The kernel, parameter or batch norm that element ``place`` of a tensor such as "coo.value" belongs
        to; ``index`` is `coo.index`. A gradient lies as its momentum does."""
        kind = tensor.partition(".")[0]
        table = {"coo": self.kernels, "dense": self.dense, "batchnorm": self.statistics}[kind]
        if self.trained is not None and tensor.endswith(".momentum"):
            place = self._whole_place(self.trained, kind, place, index)
        number = int(index[place]) if kind == "coo" else place
        name = table[bisect_right([first for _, first in table], number) - 1][0]
        return name if name.isprintable() else repr(name)

    @staticmethod
    def _whole_place(trained: Trained, kind: str, place: int, index: Array) -> int:
        """Where a number that is trained, the ``place``-th of them, lies among all of its kind."""
        if kind == "coo":
            return int(np.flatnonzero(trained.connections(index))[place])
        for parameter in reversed(trained.dense):
            begin = trained.places[parameter.name]
            if place >= begin:
                return parameter.offset + place - begin
        raise AssertionError(f"no parameter is trained at {place}")


def state_fault(state: Mapping[str, Array], parts: Parts) -> str | None:
    """Say why ``state`` is not one, naming tensor and part ("batchnorm.variance of bn1 holds inf, …").

    None if it is one: `coo.index` strictly ascending in [0, N), with as many connections in trained layers as
    ever, every number finite, no connection of weight zero, no negative variance.
    """
    index = state["coo.index"]
    if not len(index) or index[0] < 0 or index[-1] >= parts.size or not np.all(index[1:] > index[:-1]):
        return f"coo.index is not strictly ascending within the network's {parts.size} positions"
    if parts.trained is not None:
        found = int(parts.trained.connections(index).sum())
        if found != parts.trained.kappa:
            return (
                f"coo.index has {found} connections in the layers that are trained, which have "
                f"{parts.trained.kappa}"
            )

    def first(name: str, wrong: Array, what: str) -> str:
        place = int(np.argmax(wrong))
        return f"{name} of {parts.owner(name, place, index)} holds {state[name][place]:g}, {what}"

    for name, array in state.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return first(name, ~np.isfinite(array), "which is not finite")
    if not np.all(state["coo.value"]):
        return first("coo.value", state["coo.value"] == 0, "a connection of weight zero")
    if np.any(state["batchnorm.variance"] < 0):
        return first("batchnorm.variance", state["batchnorm.variance"] < 0, "which is negative")
    return None
