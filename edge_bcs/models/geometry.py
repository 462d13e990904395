"""Arithmetic and checks that the network families share."""

from __future__ import annotations

from edge_bcs.errors import EdgeBcsError


def scaled(channels: int, width: float) -> int:
    """Return `channels` times the width multiplier, rounded, and at least 4."""
    return max(4, round(channels * width))


def check_arguments(
    name: str, num_classes: int, width: float, input_channels: int, input_size: int, smallest: int
) -> None:
    """Raise `EdgeBcsError` unless the arguments describe a network that can be built."""
    if num_classes < 2:
        raise EdgeBcsError(f"{name} needs at least 2 classes, not {num_classes}")
    if not width > 0:
        raise EdgeBcsError(f"the width multiplier of {name} must be positive, not {width}")
    if input_channels < 1:
        raise EdgeBcsError(f"{name} needs at least 1 input channel, not {input_channels}")
    if input_size < smallest:
        raise EdgeBcsError(
            f"{name} needs images of at least {smallest}x{smallest} pixels, not {input_size}x{input_size}"
        )
