"""The bound buffers: everything that lives as long as a Trainer, in one table that the planner shares."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Protocol

import numpy as np

from edge_bcs.core.part import Trained
from edge_bcs.core.state import state_layout

Shape = tuple[int, ...]
_ALIGNMENT = 64


class Network(Protocol):
    """What the buffers depend on of a network that is compiled, or of an artifact."""

    @property
    def kappa(self) -> int:
        """κ, the number of connections."""

    @property
    def lists_length(self) -> int:
        """Elements of ``coo.lists``."""

    @property
    def dense_size(self) -> int:
        """The number of all other parameters."""

    @property
    def statistics_size(self) -> int:
        """Channels of all batch norms."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    @property
    def num_classes(self) -> int:
        """Length of the logits."""

    @property
    def trained(self) -> Trained:
        """What of it is trained."""

    @property
    def batch_statistics(self) -> bool:
        """Whether training normalises by the micro-batch."""


def bound_buffers(network: Network, micro_batch: int, two_branches: bool) -> dict[str, tuple[str, Shape]]:
    """Name → (dtype, shape) of every buffer that the runtime binds to the graphs, whatever the phase.

    The sum of their bytes is the part of the working set that never changes. With batch statistics a copy of
    the running averages is kept, so that a step that fails half-way leaves no trace. What is not trained has
    neither momentum nor gradients.
    """
    images = (micro_batch, *network.input_shape)
    trained = network.trained.kappa, network.trained.dense_size
    state = state_layout(network.kappa, network.dense_size, network.statistics_size, trained)
    table: dict[str, tuple[str, Shape]] = {name: (kind, (length,)) for name, (kind, length) in state.items()}
    table |= {
        "coo.value_grad.accumulation.buffer": ("float32", (trained[0],)),
        "coo.lists": ("int32", (network.lists_length,)),
        "dense.value_grad.accumulation.buffer": ("float32", (trained[1],)),
        "input": ("float32", images),
        "adversarial": ("float32", images),
        "labels": ("int64", (micro_batch,)),
        "sample_weight": ("float32", (micro_batch,)),
        "target": ("float32", (micro_batch, network.num_classes)),
        "logits": ("float32", (micro_batch, network.num_classes)),
        "loss": ("float32", ()),
        "correct": ("float32", (2 if two_branches else 1,)),
        "coo.value_grad.accumulation.out": ("bool", (1,)),
        "dense.value_grad.accumulation.out": ("bool", (1,)),
        "lazy_reset_grad": ("bool", (1,)),
        "step_size": ("float32", (1,)),
        "epsilon": ("float32", (1,)),
        "hyper": ("float32", (4,)),
        "counter": ("int64", (2,)),
    }
    if network.batch_statistics:
        table["rollback.mean"] = table["batchnorm.mean"]
        table["rollback.variance"] = table["batchnorm.variance"]
    return table


def buffer_behind(graph: str, name: str, buffers: Container[str], training_input: str) -> str:
    """Name of the buffer that a graph's input or output is bound to; it may not be one of ``buffers``.

    Args:
        graph: "training", "attack", "eval", "optimizer" or "lists".
        training_input: the buffer whose images the training graph reads as its `input`.
    """
    if name.endswith(".out") and name not in buffers:
        name = name.removesuffix(".out")  # updated in place: the input's own memory
    return training_input if graph == "training" and name == "input" else name


def bytes_of(dtype: str, shape: Shape) -> int:
    """Bytes of one buffer."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def allocate(dtype: str, shape: Shape) -> np.ndarray[Any, Any]:
    """Return a zeroed array that begins on a 64-byte boundary, as the kernels like it."""
    size = bytes_of(dtype, shape)
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
