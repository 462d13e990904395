"""Arithmetic and checks that the network families share."""

from __future__ import annotations

from edge_bcs.core.errors import EdgeBcsError

_MOST = {"num_classes": 1 << 20, "input_channels": 1 << 16, "input_size": 1 << 16}
_WIDEST = 1 << 10


def scaled(channels: int, width: float) -> int:
    """Return `channels` times the width multiplier, rounded, and at least 4."""
    return max(4, round(channels * width))


def check_arguments(
    name: str, num_classes: int, width: float, input_channels: int, input_size: int, smallest: int
) -> None:
    """Raise `EdgeBcsError` unless the arguments, which a file may have named, describe a network."""
    given = {"num_classes": num_classes, "input_channels": input_channels, "input_size": input_size}
    for argument, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value > _MOST[argument]:
            raise EdgeBcsError(
                f"{argument} of {name} must be a whole number of at most {_MOST[argument]}, "
                f"not {str(value)[:60]}"
            )
    if isinstance(width, bool) or not isinstance(width, int | float) or not width <= _WIDEST:
        raise EdgeBcsError(
            f"the width multiplier of {name} must be a number of at most {_WIDEST}, not {str(width)[:60]}"
        )
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
