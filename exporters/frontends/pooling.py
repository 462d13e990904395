"""Rows of pooling operators: windows, adaptive and global ones, maxima and means."""

from __future__ import annotations

from math import prod
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

from ..layers import AveragePool, Axis, Flatten, Layer, MaxPool, shares
from .call import Call
from .rows import pair, row, size_of


@row("max_pool2d")
def _max_pool(call: Call) -> Layer:
    source = call.map("self", "max pooling")
    if pair(call.arguments["dilation"]) != (1, 1):
        raise EdgeBcsError(f"max pooling '{call.name}' has dilation; only dilation=1 is supported")
    kernel, strides, pads, counts = _pool_windows(call, source)
    return _maximum(call, source, counts, kernel, strides, pads)


@row("max_pool2d_with_indices")
def _max_pool_with_indices(call: Call) -> Any:
    return [_max_pool(call), None]


@row("adaptive_max_pool2d")
def _adaptive_max_pool(call: Call) -> Any:
    source = call.map("self", "max pooling")
    counts = pair(call.arguments["output_size"])
    kernel = _equal_shares(source, counts)
    if kernel is None:
        raise EdgeBcsError(
            f"max pooling '{call.name}' cannot bring {size_of(source)} to {counts[0]}×{counts[1]} with "
            "windows of one size"
        )
    return [_maximum(call, source, counts, kernel, kernel), None]


@row("amax")
def _maximum_of_all(call: Call) -> Layer:
    source = call.map("self", "maximum")
    kernel, keep = _over_pixels(call, source, "maximum")
    counts = tuple(size // k for size, k in zip(source.shape[1:], kernel, strict=True))
    pooled = _maximum(call, source, (counts[0], counts[1]), kernel, kernel)
    return pooled if keep else _vector(call, pooled)


def _maximum(
    call: Call,
    source: Layer,
    counts: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Layer:
    channels, height, width = source.shape
    if prod(kernel) > 255:
        raise EdgeBcsError(
            f"max pooling '{call.name}' has a window of {kernel[0]}×{kernel[1]}; at most 255 pixels (such as "
            "15×15) are supported"
        )
    shape = (channels, *counts)
    return call.add(MaxPool(call.name, (source.name,), shape, kernel, strides, (height, width), pads))


@row("avg_pool2d")
def _average_pool(call: Call) -> Layer:
    source = call.map("self", "average pooling")
    given = call.arguments
    if given["divisor_override"]:
        raise EdgeBcsError(f"average pooling '{call.name}' has a divisor_override, which is not supported")
    kernel, strides, pads, counts = _pool_windows(call, source)
    channels, height, width = source.shape
    shape, size = (channels, *counts), (height, width)
    around = bool(given["count_include_pad"])
    return call.add(AveragePool(call.name, (source.name,), shape, kernel, strides, size, pads, around))


@row("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_pool(call: Call) -> Layer:
    source = call.map("self", "average pooling")
    counts = pair(call.arguments["output_size"])
    channels, height, width = source.shape
    shape, size = (channels, *counts), (height, width)
    kernel = _equal_shares(source, counts)
    if kernel is not None:
        return call.add(AveragePool(call.name, (source.name,), shape, kernel, kernel, size))
    down, across = (
        max(end - begin for begin, end in shares(*sizes)) for sizes in zip(size, counts, strict=True)
    )
    return call.add(
        AveragePool(call.name, (source.name,), shape, (down, across), (down, across), size, adaptive=True)
    )


@row("mean")
def _mean(call: Call) -> Layer:
    source = call.map("self", "mean")
    kernel, keep = _over_pixels(call, source, "mean")
    channels, height, width = source.shape
    shape = (channels, height // kernel[0], width // kernel[1])
    name = call.name if keep else f"{call.name}_pool"
    pooled = call.add(AveragePool(name, (source.name,), shape, kernel, kernel, (height, width)))
    return pooled if keep else _vector(call, pooled)


def _pool_windows(
    call: Call, source: Layer
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Kernel, strides, pads and number of windows, all (height, width), of a pooling."""
    given = call.arguments
    kernel = pair(given["kernel_size"])
    strides = pair(given["stride"]) if given["stride"] else kernel
    pads = pair(given["padding"])
    down, across = (
        Axis(k, stride, pad, pad).windows(size, bool(given["ceil_mode"]))
        for size, k, stride, pad in zip(source.shape[1:], kernel, strides, pads, strict=True)
    )
    if down < 1 or across < 1:
        raise EdgeBcsError(
            f"the window of '{call.name}' ({kernel[0]}×{kernel[1]}) is larger than its input "
            f"({size_of(source)} + 2·{pads[0]}×{pads[1]})"
        )
    return kernel, strides, (*pads, *pads), (down, across)


def _equal_shares(source: Layer, counts: tuple[int, int]) -> tuple[int, int] | None:
    """The window of an adaptive pooling if all its windows are equal and lie side by side."""
    _, height, width = source.shape
    even = height % counts[0] == 0 and width % counts[1] == 0
    return (height // counts[0], width // counts[1]) if even else None


def _over_pixels(call: Call, source: Layer, what: str) -> tuple[tuple[int, int], bool]:
    """Window of what is taken over height and width, or one of them, and whether the axes are kept."""
    given = call.arguments.get("dim")
    axes = {axis % 4 for axis in given} if isinstance(given, (tuple, list)) else set()
    keep = bool(call.arguments.get("keepdim"))
    if not axes or not axes <= {2, 3} or (not keep and axes != {2, 3}):
        raise EdgeBcsError(
            f"the {what} '{call.name}' must be over height and width, dim=[2, 3], or over one of them with "
            "keepdim=True"
        )
    _, height, width = source.shape
    return (height if 2 in axes else 1, width if 3 in axes else 1), keep


def _vector(call: Call, pooled: Layer) -> Layer:
    return call.add(Flatten(call.name, (pooled.name,), pooled.shape[:1]))
