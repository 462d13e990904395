"""What the tensors are that a network computes while it is traced: layers, constants, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import Input, Layer

BATCH = 8191
"""Images in the outline: a prime that is no network's number of channels, pixels or classes."""


@dataclass(frozen=True)
class Place:
    """Where an operator was called: the qualified name of the module, its class, and the user's line."""

    module: str = ""
    kind: str = ""
    leaf: bool = False
    line: str = ""

    def names(self, operator: str) -> str:
        """The operator and its place, for the beginning of a sentence."""
        if self.leaf:
            return f"module '{self.module}' ({self.kind})"
        inside = f" in module '{self.module}' ({self.kind})" if self.module else ""
        return f"the function '{operator}'{inside}{f' ({self.line})' if self.line else ''}"


@dataclass(frozen=True)
class Constant:
    """A tensor that the network holds, by its qualified name, or "" for one that has none.

    ``computed_from`` names the parameters and buffers from which it was computed, if it was; ``operator`` is
    the last one that did so.
    """

    name: str
    computed_from: tuple[str, ...] = ()
    operator: str = ""


@dataclass(frozen=True)
class Refused:
    """A tensor that is no layer's output, and the sentence that says why."""

    sentence: str


@dataclass(frozen=True)
class Ending:
    """An operator that is left out where it is the network's last: the layer before it."""

    layer: Layer
    operator: str
    refusal: str


@dataclass(frozen=True, eq=False)
class Shaped:
    """Numbers of ``layer`` in another shape or order, which what follows may undo (see `views`).

    Attributes:
        numbers: i64, which they are, of two images: the first has 0 to n − 1, the next n to 2·n − 1.
        shape: of the outline, with ``BATCH`` images. refusal: the sentence for all else.
    """

    layer: Layer
    numbers: Tensor
    shape: torch.Size
    refusal: str


@dataclass(frozen=True)
class Pixels:
    """The image ``layer``, scale·x + shift: a number a channel."""

    layer: Input
    scale: tuple[float, ...]
    shift: tuple[float, ...]


Found = Layer | Constant | Refused | Ending | Shaped | Pixels


def batched(shape: torch.Size) -> str:
    """A shape for a message, in which the batch is called so."""
    axes = [
        "batch" if n == BATCH else f"{n // BATCH}·batch" if n and n % BATCH == 0 else str(n) for n in shape
    ]
    return f"({', '.join(axes)})"


def said_by(error: BaseException) -> str:
    """What an exception says, in one line, with the batch called so."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(rf"\b{BATCH}\b", "batch", words)
