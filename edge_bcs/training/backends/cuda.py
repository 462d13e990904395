"""Work on a GPU without Python between its kernels: recorded as a CUDA graph, and replayed.

A pass over a batch of 32×32 images keeps a large GPU busy for less time than Python takes to launch its
kernels; a graph is launched at once, and its kernels are those that Python would have launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EAGER_CALLS = 2


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Recorded:
    """A function of tensors on one GPU that is launched kernel by kernel twice, recorded, and then replayed.

    The function may also read and change other tensors, in place and where they always are; it must neither
    wait for the device nor do anything else for Python to see. Its keyword arguments, and its inputs' shapes
    and layouts, are what a recording holds for.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor, **constants: Hashable) -> Tensor:
        """Return what the function returns for these inputs, a tensor of the caller's own."""
        key = (tuple((given.shape, given.stride()) for given in inputs), tuple(constants.items()))
        self._calls[key] += 1
        if self._calls[key] <= _EAGER_CALLS:
            return self._launched(inputs, constants)
        if key not in self._recordings:
            self._recordings[key] = self._recorded(inputs, constants)
        recording = self._recordings[key]
        for place, given in zip(recording.inputs, inputs, strict=True):
            place.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def _launched(self, inputs: tuple[Tensor, ...], constants: dict[str, Any]) -> Tensor:
        # Off the default stream, as CUDA wants it of what is recorded afterwards.
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            output = self._function(*inputs, **constants)
        current.wait_stream(aside)
        output.record_stream(current)
        return output

    def _recorded(self, inputs: tuple[Tensor, ...], constants: dict[str, Any]) -> _Recording:
        held = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._function(*held, **constants)
        return _Recording(graph, held, output)
