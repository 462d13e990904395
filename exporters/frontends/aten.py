"""The table of ATen operators: for each the row that makes a layer of a call.

A row gets a `Call`, whose arguments have the names of the operator's schema (such as
`torch.ops.aten.conv2d.default._schema`) with its defaults filled in, and returns the layer that it becomes.
Forms in place (`relu_`) come without their underscore, overloads of one name come to one row, and an operator
without a row is decomposed by torch into others before it is refused. A row for a new operator is all that
this folder needs to take it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError

from ..layers import (
    Add,
    AveragePool,
    Axis,
    BatchNorm,
    Convolution,
    Elementwise,
    Flatten,
    Layer,
    MaxPool,
    ReLU,
    Window,
    shown,
)
from .trace import BATCH, Call, Ending, Pixels, Row, Shaped, batched

SUPPORTED = (
    "supported are Conv2d, Linear, BatchNorm1d/2d, ReLU, LeakyReLU, addition of two tensors, MaxPool2d, "
    "AvgPool2d, AdaptiveAvgPool2d, mean over height and width, flatten/view/reshape to a vector, Dropout, "
    "Identity"
)

ROWS: dict[str, Row] = {}
"""Name of an operator of ATen → its row."""

_ELEMENTWISE: dict[str, tuple[str, dict[str, str]]] = {
    "leaky_relu": ("LeakyReLU", {"slope": "negative_slope"}),
}
"""Operator of ATen → ours, and for each of our attributes the name of its argument."""


def row(*operators: str) -> Callable[[Row], Row]:
    """Make a function the row of these operators."""

    def register(function: Row) -> Row:
        ROWS.update(dict.fromkeys(operators, function))
        return function

    return register


# Layers with weights


@row("conv2d", "convolution")
def _convolution(call: Call) -> Layer:
    source = call.map("input", "convolution")
    given = call.arguments
    module = call.owner("weight", "bias")
    if given.get("transposed"):
        raise EdgeBcsError(f"convolution '{module}' is transposed, which is not supported; {SUPPORTED}")
    groups, (out_channels, in_group, *size) = given["groups"], given["weight"].shape
    kernel, strides, dilations = _pair(size), _pair(given["stride"]), _pair(given["dilation"])
    pads = _pads(given["padding"], kernel, dilations)
    window = Window.of(kernel, strides, pads, dilations)
    window.check(module)
    channels, height, width = source.shape
    if channels != in_group * groups:
        raise EdgeBcsError(f"convolution '{module}' expects {in_group * groups} channels but gets {channels}")
    shape = (out_channels, _windows(height, window.down, call), _windows(width, window.across, call))
    geometry = (kernel, strides, pads, dilations, groups)
    bias = given["bias"] is not None
    return call.add(Convolution(call.name, (source.name,), shape, module, *geometry, bias))


def _pads(padding: Any, kernel: tuple[int, int], dilations: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of torch's ``padding``: "same" puts what is odd to the bottom and right."""
    if padding == "same":
        down, across = ((size - 1) * step for size, step in zip(kernel, dilations, strict=True))
        return down // 2, across // 2, down - down // 2, across - across // 2
    down, across = (0, 0) if padding == "valid" else _pair(padding)
    return down, across, down, across


@row("linear")
def _linear(call: Call) -> Layer:
    module = call.owner("weight", "bias")
    return _dense(call, call.layer("input"), module, call.arguments["weight"], call.arguments["bias"])


@row("mm", "addmm")
def _product(call: Call) -> Layer:
    """x·Wᵀ, and b + x·Wᵀ."""
    mm = call.operator == "mm"
    source, name = call.layer("self" if mm else "mat1"), call.transposed("mat2")
    if not name or call.arguments.get("alpha", 1) != 1 or call.arguments.get("beta", 1) != 1:
        raise EdgeBcsError(call.unsupported)
    bias = None if mm else call.arguments["self"]
    module = call.owner_of({"weight": name, "bias": "" if mm else call.parameter("self")})
    return _dense(call, source, module, call.arguments["mat2"].t(), bias)


def _dense(call: Call, source: Layer, module: str, weight: Tensor, bias: Tensor | None) -> Layer:
    features, inputs = weight.shape
    if source.shape != (inputs,):
        raise EdgeBcsError(
            f"linear layer '{module}' expects a vector of {inputs} but gets {shown(source.shape)}; "
            "flatten before it"
        )
    layer = Convolution(call.name, (source.name,), (features,), module, bias=bias is not None)
    return call.add(layer)


@row("batch_norm")
def _batch_norm(call: Call) -> Layer:
    source = call.layer("input")
    given = call.arguments
    if given["running_mean"] is None or given["running_var"] is None:
        raise EdgeBcsError(
            f"the batch norm {call.module} keeps no running statistics, which is not supported"
        )
    module = call.owner("running_mean", "running_var", "weight", "bias")
    if given["training"]:
        raise EdgeBcsError(
            f"batch norm '{module}' normalises by the batch in evaluation, too; give it "
            "training=self.training"
        )
    features = given["running_mean"].shape[0]
    if source.shape[0] != features:
        raise EdgeBcsError(f"batch norm '{module}' expects {features} channels but gets {source.shape[0]}")
    # In evaluation torch.nn hands 0 on for None.
    momentum = getattr(call.held_by(module), "momentum", given["momentum"])
    if momentum is None:
        raise EdgeBcsError(
            f"batch norm '{module}' has momentum=None; only a running average (such as 0.1) is supported"
        )
    return call.add(
        BatchNorm(call.name, (source.name,), source.shape, module, float(given["eps"]), float(momentum))
    )


# Elementwise


@row("relu")
def _relu(call: Call) -> Layer:
    source = call.layer("self")
    return call.add(ReLU(call.name, (source.name,), source.shape))


@row(*_ELEMENTWISE)
def _elementwise(call: Call) -> Layer:
    source = call.layer("self")
    kind, attributes = _ELEMENTWISE[call.operator]
    found = {ours: float(call.arguments[theirs]) for ours, theirs in attributes.items()}
    return call.add(Elementwise(call.name, (source.name,), source.shape, kind, found))


@row("add")
def _add(call: Call) -> Layer | Pixels:
    other = call.arguments["other"]
    if not isinstance(other, Tensor) and other == 0:
        return call.layer("self")
    if (pixels := _normalised(call)) is not None:
        return pixels
    if call.arguments["alpha"] != 1:
        raise EdgeBcsError(f"the addition '{call.name}' must add two tensors of the network, without alpha")
    first, second = call.layer("self"), call.layer("other")
    if first.shape != second.shape:
        raise EdgeBcsError(
            f"the addition '{call.name}' adds {shown(first.shape)} and {shown(second.shape)}; both must "
            "have one shape"
        )
    return call.add(Add(call.name, (first.name, second.name), first.shape))


@row("sub", "mul", "div", "rsub")
def _arithmetic(call: Call) -> Layer | Pixels:
    pixels = _normalised(call)
    if pixels is None:
        raise EdgeBcsError(call.unsupported)
    return pixels


def _normalised(call: Call) -> Pixels | None:
    """The image after arithmetic with numbers that are not trained, which is part of the first layer."""
    if call.arguments.get("alpha", 1) != 1 or call.arguments.get("rounding_mode") is not None:
        return None
    operator, first = call.operator, call.pixels("self")
    pixels = first or call.pixels("other")
    if pixels is None or (first and call.pixels("other")):
        return None
    channels = pixels.layer.shape[0]
    numbers = call.numbers("other" if first else "self", channels)
    if numbers is None or (operator == "div" and (not first or 0 in numbers)):
        return None
    scale, shift = pixels.scale or (1.0,) * channels, pixels.shift or (0.0,) * channels
    if operator in ("mul", "div"):
        factors = numbers if operator == "mul" else tuple(1 / number for number in numbers)
        scale = tuple(a * b for a, b in zip(scale, factors, strict=True))
        shift = tuple(a * b for a, b in zip(shift, factors, strict=True))
    else:
        minuend = operator == "rsub" if first else operator == "sub"  # numbers - image
        if minuend:
            scale, shift = tuple(-a for a in scale), tuple(-a for a in shift)
        sign = -1.0 if operator == "sub" and first else 1.0
        shift = tuple(a + sign * b for a, b in zip(shift, numbers, strict=True))
    return Pixels(pixels.layer, scale, shift)


# What changes nothing


@row("alias", "contiguous", "clone", "detach", "lift_fresh", "positive")
def _identity(call: Call) -> Layer:
    return call.layer("self")


@row("to", "_to_copy", "type_as", "expand", "expand_as")
def _same(call: Call) -> Layer:
    source, result = call.layer("self"), call.result()
    if result.shape != (BATCH, *source.shape):
        raise EdgeBcsError(f"{call.module} changes a shape, which is not supported; {SUPPORTED}")
    if result.dtype != torch.float32:
        raise EdgeBcsError(f"{call.module} computes in {result.dtype}; only float32 is supported")
    return source


@row("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def _dropout(call: Call) -> Layer:
    if call.arguments["train"] and call.arguments["p"] > 0:
        line = f" ({call.place.line})" if call.place.line else ""
        raise EdgeBcsError(
            f"dropout '{call.name}' is active in evaluation, too{line}; the artifact trains without dropout, "
            "so give it training=self.training"
        )
    return call.layer("self" if "self" in call.arguments else "input")


@row("softmax", "log_softmax")
def _softmax(call: Call) -> Any:
    source = call.layer("self")
    refusal = f"{call.module} is supported only as the last operation, where it is left out; {SUPPORTED}"
    if len(source.shape) != 1 or call.arguments["dim"] not in (1, -1):
        raise EdgeBcsError(refusal)
    return Ending(source, call.operator, refusal)


# Pooling


@row("max_pool2d")
def _max_pool(call: Call) -> Layer:
    source = call.map("self", "max pooling")
    given = call.arguments
    kernel, stride = _window(call, "max pooling")
    padding = _single(given["padding"], f"max pooling '{call.name}' has unequal paddings")
    if given["ceil_mode"]:
        raise EdgeBcsError(f"max pooling '{call.name}' must have ceil_mode=False and return_indices=False")
    if _pair(given["dilation"]) != (1, 1):
        raise EdgeBcsError(f"max pooling '{call.name}' has dilation; only dilation=1 is supported")
    if kernel * kernel > 255:
        raise EdgeBcsError(
            f"max pooling '{call.name}' has a window of {kernel}×{kernel}; at most 15×15 is supported"
        )
    channels, height, width = source.shape
    shape = (
        channels,
        _extent(height, kernel, stride, padding, call),
        _extent(width, kernel, stride, padding, call),
    )
    return call.add(MaxPool(call.name, (source.name,), shape, kernel, stride, padding))


@row("max_pool2d_with_indices")
def _max_pool_with_indices(call: Call) -> Any:
    return [_max_pool(call), None]


@row("avg_pool2d")
def _average_pool(call: Call) -> Layer:
    source = call.map("self", "average pooling")
    given = call.arguments
    kernel, stride = _window(call, "average pooling")
    if _pair(given["padding"]) != (0, 0) or given["ceil_mode"] or given["divisor_override"]:
        raise EdgeBcsError(
            f"average pooling '{call.name}' must have padding=0, ceil_mode=False and no divisor_override"
        )
    channels, height, width = source.shape
    shape = (channels, _extent(height, kernel, stride, 0, call), _extent(width, kernel, stride, 0, call))
    return call.add(AveragePool(call.name, (source.name,), shape, kernel, stride))


@row("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_pool(call: Call) -> Layer:
    source = call.map("self", "average pooling")
    channels, height, width = source.shape
    size = _single(
        call.arguments["output_size"], f"average pooling '{call.name}' has an output that is not square"
    )
    if height != width or height % size:
        raise EdgeBcsError(
            f"average pooling '{call.name}' cannot bring {height}×{width} to {size}×{size} with "
            "equal square windows"
        )
    kernel = height // size
    return call.add(AveragePool(call.name, (source.name,), (channels, size, size), kernel, kernel))


@row("mean")
def _mean(call: Call) -> Layer:
    source = call.map("self", "mean")
    axes = call.arguments.get("dim")
    if not isinstance(axes, (tuple, list)) or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise EdgeBcsError(f"the mean '{call.name}' must be over height and width, dim=[2, 3]")
    channels, height, width = source.shape
    if height != width:
        raise EdgeBcsError(f"the mean '{call.name}' is over {height}×{width}; only square maps are supported")
    pooled = call.add(AveragePool(f"{call.name}_pool", (source.name,), (channels, 1, 1), height, height))
    if call.arguments["keepdim"]:
        return pooled
    return call.add(Flatten(call.name, (pooled.name,), (channels,)))


# Shapes


@row(
    "flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as"
)
def _reshape(call: Call) -> Layer | Shaped:
    given, shape = call.shaped("self"), call.result().shape
    source = given.layer if isinstance(given, Shaped) else given
    total = prod(source.shape)
    if shape == (BATCH, *source.shape):
        return source
    if shape != (BATCH, total):
        refusal = (
            f"the {call.operator} '{call.name}' gives {batched(shape)} and must give (batch, {total}): "
            "keep the batch dimension and flatten all others, as torch.flatten(x, 1) does"
        )
        if shape[:1] != (BATCH,) or prod(shape[1:]) != total:
            raise EdgeBcsError(refusal)
        return Shaped(source, tuple(shape[1:]), refusal)
    return call.add(Flatten(call.name, (source.name,), (total,)))


@row("pad")
def _pad(call: Call) -> Layer:
    mode = call.arguments["mode"]
    if mode != "constant":
        raise EdgeBcsError(f"{call.module} has padding_mode='{mode}'; only 'zeros' is supported")
    raise EdgeBcsError(call.unsupported)


# Parts of the above


def _window(call: Call, what: str) -> tuple[int, int]:
    kernel = _single(call.arguments["kernel_size"], f"{what} '{call.name}' has a window that is not square")
    stride = call.arguments["stride"]
    if stride is None or len(stride) == 0:
        return kernel, kernel
    return kernel, _single(stride, f"{what} '{call.name}' has unequal strides")


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return int(first), int(second)


def _single(value: Any, complaint: str) -> int:
    """The common extent of both axes."""
    first, second = _pair(value)
    if first != second:
        raise EdgeBcsError(f"{complaint} {first} and {second}; both must be equal")
    return first


def _extent(size: int, kernel: int, stride: int, padding: int, call: Call) -> int:
    """Number of windows along one axis."""
    return _windows(size, Axis(kernel, stride, padding, padding), call)


def _windows(size: int, axis: Axis, call: Call) -> int:
    """The same of any windows."""
    windows = axis.windows(size)
    if windows < 1:
        raise EdgeBcsError(
            f"the window of '{call.name}' ({axis.span}) is larger than its input "
            f"({size} + {axis.before} + {axis.after})"
        )
    return windows
