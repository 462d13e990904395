"""Training in part: which parameters of a network learn, and where their momentum and gradients lie.

Values, positions and statistics of a network are always whole. Momentum and gradients exist for what is
trained alone: `coo.momentum` has a number for each connection of the trained kernels, in the order of the
connections, and `dense.momentum` one for each number of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.segments import Segment

Array = np.ndarray[Any, Any]
_CHOICES = "all, head, last:N (the last N layers with weights), norm or bias"
_LAST = "last:"


@dataclass(frozen=True)
class Part:
    """Which part of a network is trained, as users name it.

    Attributes:
        text: "all"; "head", the last layer with weights; "last:N", the last N of them, with the biases and
            the norms from the first of these on; "norm", the scales and shifts of norms; "bias", the biases
            of layers and the shifts of norms.
        layers: N of "last:N", 1 of "head", else 0.
    """

    text: str
    layers: int = 0

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part of that name; EdgeBcsError if there is none."""
        if text in ("all", "norm", "bias"):
            return cls(text)
        if text == "head":
            return cls(text, 1)
        if isinstance(text, str) and text.startswith(_LAST):
            digits = text.removeprefix(_LAST)
            if digits.isascii() and digits.isdigit() and len(digits) <= 9 and int(digits) > 0:
                return cls(f"{_LAST}{int(digits)}", int(digits))
        raise EdgeBcsError(f"what is trained is {_CHOICES}, not {str(text)[:60]!r}")

    @property
    def everything(self) -> bool:
        """Whether all of the network is trained."""
        return self.text == "all"


ALL = Part("all")


@dataclass(frozen=True)
class Trained:
    """What of a network is trained.

    Attributes:
        part: as the user named it.
        kernels: the trained ones among the kernels with connections, by their place among the N positions.
        dense: the trained ones among the other parameters, by their place in `dense.value`.
        kappa: connections of ``kernels``, which never change in number.
    """

    part: Part
    kernels: tuple[Segment, ...]
    dense: tuple[Segment, ...]
    kappa: int

    @property
    def dense_size(self) -> int:
        """Numbers of ``dense``."""
        return sum(parameter.size for parameter in self.dense)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Trained parameter → where its numbers begin in `dense.momentum`."""
        found, end = {}, 0
        for parameter in self.dense:
            found[parameter.name] = end
            end += parameter.size
        return found

    def norms(self, names: Iterable[str]) -> frozenset[str]:
        """Those of the batch norms ``names`` that are trained."""
        dense = {parameter.name for parameter in self.dense}
        return frozenset(name for name in names if not dense.isdisjoint((f"{name}.weight", f"{name}.bias")))

    def batch_norms(self, names: Collection[str]) -> frozenset[str]:
        """Those of the batch norms ``names`` that can have the statistics of a batch: the others keep theirs.

        Raises:
            EdgeBcsError: a part is trained, and none is in it.
        """
        if self.part.everything:
            return frozenset(names)
        moving = self.norms(names)
        if not moving:
            raise EdgeBcsError(
                f"--train {self.part.text} trains no batch norm, and the others keep their running "
                "statistics: take --batch-norm frozen"
            )
        return moving

    def described(self) -> dict[str, Any]:
        """Its part of a manifest, where not all is trained."""
        return {
            "part": self.part.text,
            "layers": [kernel.name for kernel in self.kernels],
            "dense": [parameter.name for parameter in self.dense],
            "kappa": self.kappa,
        }

    def connections(self, index: Array) -> Array:
        """Whether the connection at each of the positions ``index``, ascending, is trained: bool[κ]."""
        trained = np.zeros(len(index), bool)
        for kernel in self.kernels:
            bounds = np.array([kernel.offset, kernel.offset + kernel.size], index.dtype)
            first, last = np.searchsorted(index, bounds)
            trained[first:last] = True
        return trained

    def numbers(self, size: int) -> Array:
        """Whether each of the ``size`` numbers of `dense.value` is trained: bool[D]."""
        trained = np.zeros(size, bool)
        for parameter in self.dense:
            trained[parameter.span] = True
        return trained

    def of(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """``state``, whole, with the momentum of what is trained alone."""
        if self.part.everything:
            return dict(state)
        coo, dense = self._masks(state)
        return {
            **state,
            "coo.momentum": state["coo.momentum"][coo],
            "dense.momentum": state["dense.momentum"][dense],
        }

    def whole(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """``state``, with the momentum of what is trained alone, made whole: the others have none, 0."""
        if self.part.everything:
            return dict(state)
        filled = dict(state)
        for name, mask in zip(("coo.momentum", "dense.momentum"), self._masks(state), strict=True):
            filled[name] = np.zeros(len(mask), np.float32)
            filled[name][mask] = state[name]
        return filled

    def _masks(self, state: Mapping[str, Array]) -> tuple[Array, Array]:
        return self.connections(state["coo.index"]), self.numbers(len(state["dense.value"]))


def merged(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """(begin, end) of runs of ``segments``, which ascend; those that touch are one."""
    runs: list[tuple[int, int]] = []
    for segment in segments:
        begin, end = segment.offset, segment.offset + segment.size
        if runs and runs[-1][1] == begin:
            begin = runs.pop()[0]
        runs.append((begin, end))
    return runs
