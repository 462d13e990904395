"""The bound buffers: everything that lives as long as a Trainer, in one table that the planner shares."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.part import Trained
from edge_bcs.core.state import state_layout

Shape = tuple[int, ...]
ALIGNMENT = 64
"""Bytes, of which every address in an arena is a multiple."""


IMAGES = ("input", "adversarial", "labels", "sample_weight")
"""Buffers of images, of which the training graph takes a micro-batch at the front."""


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


def bound_buffers(network: Network, images: int, two_branches: bool) -> dict[str, tuple[str, Shape]]:
    """Name → (dtype, shape) of every buffer that the runtime binds to the graphs, whatever the phase.

    The sum of their bytes is the part of the working set that never changes. With batch statistics a copy of
    the running averages is kept, so that a step that fails half-way leaves no trace. What is not trained has
    neither momentum nor gradients. Of the ``images`` that the buffers hold, the training graph takes those in
    front.
    """
    pixels = (images, *network.input_shape)
    trained = network.trained.kappa, network.trained.dense_size
    state = state_layout(network.kappa, network.dense_size, network.statistics_size, trained)
    table: dict[str, tuple[str, Shape]] = {name: (kind, (length,)) for name, (kind, length) in state.items()}
    table |= {
        "coo.value_grad.accumulation.buffer": ("float32", (trained[0],)),
        "coo.lists": ("int32", (network.lists_length,)),
        "dense.value_grad.accumulation.buffer": ("float32", (trained[1],)),
        "input": ("float32", pixels),
        "adversarial": ("float32", pixels),
        "labels": ("int64", (images,)),
        "sample_weight": ("float32", (images,)),
        "target": ("float32", (images, network.num_classes)),
        "logits": ("float32", (images, network.num_classes)),
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


def aligned(size: int) -> int:
    """``size`` bytes rounded up to whole units of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bytes_of(dtype: str, shape: Shape) -> int:
    """Bytes of one buffer."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def arena_for(size: int) -> np.ndarray[Any, Any]:
    """``size`` zero bytes for an arena; EdgeBcsError if this machine does not have them."""
    try:
        return allocate("uint8", (max(size, 0),))
    except (MemoryError, ValueError):  # numpy's, for more than there is or than can be addressed
        raise EdgeBcsError(f"this machine does not have the {size} bytes of memory for the arena.") from None


def bound_in(
    arena: np.ndarray[Any, Any],
    table: Mapping[str, tuple[str, Shape]],
    place_of: Callable[[str], tuple[int, int]],
    program: Path,
) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """(every buffer of ``table`` as a view of ``arena``, bytes of all of them, one behind the other).

    Args:
        place_of: buffer → (address, bytes) by the program, (-1, 0) for an unknown one.
        program: the file, for the message.

    Raises:
        EdgeBcsError: the program has another buffer there.
    """
    arrays, total = {}, 0
    for name, (dtype, shape) in table.items():
        size = bytes_of(dtype, shape)
        address, found = place_of(name)
        if address < 0 or found != size:
            raise EdgeBcsError(
                f"{program} does not fit the manifest: the buffer {name} should have {size} bytes; export "
                "the artifact again."
            )
        arrays[name] = arena[address : address + size].view(dtype).reshape(shape)
        total += aligned(size)
    return arrays, total


def allocate(dtype: str, shape: Shape) -> np.ndarray[Any, Any]:
    """Return a zeroed array that begins on a 64-byte boundary, as the kernels like it."""
    size = bytes_of(dtype, shape)
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
