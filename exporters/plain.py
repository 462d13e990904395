"""A layer in ONNX's own operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

X = None
"""The layer's input, as an operand."""


@dataclass(frozen=True)
class Plain:
    """A node of ONNX's own.

    Attributes:
        operator: its type. attributes: of the node.
        constants: constants behind its inputs (float32 unless int64; a `Parameter`; None for an input that is
            left out).
        operands: its inputs, if they are not those of the layer: numbers, X, or other expressions.
    """

    operator: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[Plain | float | None, ...] = ()
