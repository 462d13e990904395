"""The table of ATen operators: for each the row that makes a layer of a call.

A row gets a `Call`, whose arguments have the names of the operator's schema (such as
`torch.ops.aten.conv2d.default._schema`) with its defaults filled in, and returns the layer that it becomes.
Forms in place (`relu_`) come without their underscore, overloads of one name come to one row, and an operator
without a row is decomposed by torch into others before it is refused. A row for a new operator is all that
this folder needs to take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError

from ..activations import FUNCTIONS
from ..layers import (
    Activation,
    Add,
    BatchNorm,
    Channels,
    Convolution,
    GroupNorm,
    Layer,
    Multiply,
    Pad,
    Rescale,
    Scale,
    Upsample,
    Window,
    shown,
)
from .call import Call
from .found import Ending, Pixels, Shaped
from .rows import SUPPORTED, extent, pair, row, size_of
from .views import channels_last, each_channel, joined, layer_of, moved, numbers_of, with_last

# Layers with weights


@row("conv2d", "convolution")
def _convolution(call: Call) -> Layer:
    source = call.map("input", "convolution")
    given = call.arguments
    module = call.owner("weight", "bias")
    if given.get("transposed"):
        raise EdgeBcsError(f"convolution '{module}' is transposed, which is not supported; {SUPPORTED}")
    groups, (out_channels, in_group, *size) = given["groups"], given["weight"].shape
    kernel, strides, dilations = pair(size), pair(given["stride"]), pair(given["dilation"])
    pads = _pads(given["padding"], kernel, dilations)
    if isinstance(source, Pad) and source.value == 0 and min(source.pads) >= 0:
        # Zeros around a map are what a convolution reads there anyway.
        top, left, bottom, right = (a + b for a, b in zip(source.pads, pads, strict=True))
        source, pads = call.read_by(source), (top, left, bottom, right)
    window = Window.of(kernel, strides, pads, dilations)
    window.check(module)
    channels, height, width = source.shape
    if channels != in_group * groups:
        raise EdgeBcsError(f"convolution '{module}' expects {in_group * groups} channels but gets {channels}")
    shape = (out_channels, extent(height, window.down, call), extent(width, window.across, call))
    geometry = (kernel, strides, pads, dilations, groups)
    bias = given["bias"] is not None
    return call.add(Convolution(call.name, (source.name,), shape, module, *geometry, bias))


def _pads(padding: Any, kernel: tuple[int, int], dilations: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of torch's ``padding``: "same" puts what is odd to the bottom and right."""
    if padding == "same":
        down, across = ((size - 1) * step for size, step in zip(kernel, dilations, strict=True))
        return down // 2, across // 2, down - down // 2, across - across // 2
    down, across = (0, 0) if padding == "valid" else pair(padding)
    return down, across, down, across


@row("linear")
def _linear(call: Call) -> Layer | Shaped:
    module, found = call.owner("weight", "bias"), call.shaped("input")
    weight, bias = call.arguments["weight"], call.arguments["bias"]
    if isinstance(found, Shaped) and channels_last(found) and weight.shape[1] == found.layer.shape[0]:
        # Of each pixel the channels: a convolution.
        shape = (len(weight), *found.layer.shape[1:])
        layer = Convolution(call.name, (found.layer.name,), shape, module, bias=bias is not None)
        return with_last(call, found, call.add(layer))
    return _dense(call, call.layer("input"), module, weight, bias)


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


@row("group_norm")
def _group_norm(call: Call) -> Layer:
    return _norm(call, call.layer("input"), call.arguments["num_groups"])


@row("instance_norm")
def _instance_norm(call: Call) -> Layer:
    if call.arguments["running_mean"] is not None:
        raise EdgeBcsError(f"{call.module} keeps running statistics, which is not supported; {SUPPORTED}")
    source = call.layer("input")
    return _norm(call, source, source.shape[0])


@row("layer_norm")
def _layer_norm(call: Call) -> Layer | Shaped:
    found, over = call.shaped("input"), tuple(call.arguments["normalized_shape"])
    if isinstance(found, Shaped) and channels_last(found) and over == found.layer.shape[:1]:
        return replace(found, layer=_norm(call, found.layer, 1, per_pixel=True))
    source = call.layer("input")
    if over != source.shape:
        raise EdgeBcsError(
            f"{call.module} normalises {shown(source.shape)} over {shown(over)}; it must be over all of it, "
            "or over the channels, last"
        )
    return _norm(call, source, 1)


def _norm(call: Call, source: Layer, groups: int, per_pixel: bool = False) -> Layer:
    given = call.arguments
    parts = [part for part in ("weight", "bias") if given[part] is not None]
    for part in parts:
        if given[part].numel() != source.shape[0]:
            raise EdgeBcsError(f"the {part} of {call.module} is not a number for each channel")
    if len(parts) == 1:
        raise EdgeBcsError(f"{call.module} has a {parts[0]} alone, which is not supported; {SUPPORTED}")
    module = call.owner("weight", "bias") if parts else ""
    epsilon = float(given["eps"])
    return call.add(GroupNorm(call.name, (source.name,), source.shape, module, groups, epsilon, per_pixel))


# Elementwise


@row(*{operator for function in FUNCTIONS.values() for operator in function.aten})
def _activation(call: Call) -> Layer | Shaped:
    kind, attributes = _function(call)
    return _through(
        call, "self", lambda x: call.add(Activation(call.name, (x.name,), x.shape, kind, attributes))
    )


def _function(call: Call) -> tuple[str, dict[str, float]]:
    """The function that is called, of the table of activations, and its attributes."""
    given = call.arguments
    for function in FUNCTIONS.values():
        fixed = function.aten.get(call.operator)
        if fixed is not None and all(given[name] == value for name, value in fixed.items()):
            return function.name, {ours: float(given[name]) for ours, name in function.attributes.items()}
    raise EdgeBcsError(call.unsupported)


@row("add", "sub", "rsub", "mul", "div", "neg")
def _arithmetic(call: Call) -> Layer | Shaped | Pixels:
    pixels = _normalised(call)
    if pixels is not None:
        return pixels
    given, operator = call.arguments, call.operator
    if given.get("rounding_mode") is not None:
        raise EdgeBcsError(call.unsupported)
    if operator == "neg":
        return _rescaled(call, "self", -1, 0)
    left, right = call.numbers("self", 1), call.numbers("other", 1)
    if operator == "mul":
        number = left or right
        return _rescaled(call, "other" if left else "self", number[0], 0) if number else _multiplied(call)
    if operator == "div":
        if right is None or right[0] == 0:
            raise EdgeBcsError(f"{call.module} divides by what is no constant; {SUPPORTED}")
        return _rescaled(call, "self", 1 / right[0], 0)
    # The second operand's factor; rsub takes the first one from it.
    alpha = float(given["alpha"])
    first, second = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[operator]
    if right is not None:
        return _rescaled(call, "self", first, second * right[0])
    if left is not None:
        return _rescaled(call, "other", second, first * left[0])
    return _together(call, lambda a, b: _added(call, _scaled(call, a, first), _scaled(call, b, second)))


def _added(call: Call, first: Layer, second: Layer) -> Layer:
    return call.add(Add(call.name, (first.name, second.name), first.shape))


def _scaled(call: Call, source: Layer, factor: float) -> Layer:
    """A summand with its factor."""
    name = f"{call.name}_{source.name}"
    return source if factor == 1 else call.add(Rescale(name, (source.name,), source.shape, factor))


def _multiplied(call: Call) -> Layer | Shaped:
    for argument, other in (("self", "other"), ("other", "self")):
        name = call.vector(other)
        if name:
            return _scaled_by(call, argument, name, call.arguments[other])
    found = [call.shaped("self"), call.shaped("other")]
    for whole, part in (found, found[::-1]):
        if isinstance(whole, Layer) and whole.shape[1:] != (1, 1):
            factor = each_channel(part, whole.shape)
            if factor is not None:
                return call.add(Multiply(call.name, (whole.name, factor.name), whole.shape, True))
    return _together(call, lambda a, b: call.add(Multiply(call.name, (a.name, b.name), a.shape)))


def _scaled_by(call: Call, argument: str, name: str, value: Tensor) -> Layer | Shaped:
    """A tensor times the parameter ``name``, which stands there in the shape of ``value``."""
    found = call.shaped(argument)
    numbers, layer = numbers_of(found), layer_of(found)
    channels = numbers % prod(layer.shape) // prod(layer.shape[1:])
    which = torch.arange(value.numel()).reshape(value.shape)
    if value.numel() != layer.shape[0] or not torch.equal(torch.broadcast_to(which, numbers.shape), channels):
        raise EdgeBcsError(f"{call.module} multiplies with '{name}', which is not a number for each channel")
    return _through(call, argument, lambda x: call.add(Scale(call.name, (x.name,), x.shape, name)))


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


def _rescaled(call: Call, argument: str, factor: float, offset: float) -> Layer | Shaped:
    if (factor, offset) == (1, 0):
        return call.shaped(argument)
    return _through(
        call, argument, lambda x: call.add(Rescale(call.name, (x.name,), x.shape, factor, offset))
    )


def _through(call: Call, argument: str, make: Callable[[Layer], Layer]) -> Layer | Shaped:
    """A function of each number by itself, in whatever order the numbers are."""
    found = call.shaped(argument)
    if isinstance(found, Shaped):
        return replace(found, layer=make(found.layer))
    return make(found)


def _together(call: Call, make: Callable[[Layer, Layer], Layer]) -> Layer | Shaped:
    """A function of each number of one tensor and that of the other one at its place."""
    first, second = call.shaped("self"), call.shaped("other")
    one, other = layer_of(first), layer_of(second)
    same = one.shape == other.shape and torch.equal(numbers_of(first), numbers_of(second))
    if not same:
        shapes = [
            shown(found.shape[1:] if isinstance(found, Shaped) else found.shape) for found in (first, second)
        ]
        raise EdgeBcsError(
            f"the {call.operator} '{call.name}' takes {shapes[0]} and {shapes[1]}; both must have one shape"
        )
    return replace(first, layer=make(one, other)) if isinstance(first, Shaped) else make(one, other)


# What changes nothing


@row("alias", "contiguous", "clone", "detach", "lift_fresh", "positive")
def _identity(call: Call) -> Layer | Shaped:
    return call.shaped("self")


@row("to", "_to_copy", "type_as")
def _same(call: Call) -> Layer | Shaped:
    source, result = call.shaped("self"), call.result()
    if result.shape != call.arguments["self"].shape:
        raise EdgeBcsError(f"{call.module} changes a shape, which is not supported; {SUPPORTED}")
    if result.dtype != torch.float32:
        raise EdgeBcsError(f"{call.module} computes in {result.dtype}; only float32 is supported")
    return source


@row("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def _dropout(call: Call) -> Layer | Shaped:
    if call.arguments["train"] and call.arguments["p"] > 0:
        line = f" ({call.place.line})" if call.place.line else ""
        raise EdgeBcsError(
            f"dropout '{call.name}' is active in evaluation, too{line}; the artifact trains without dropout, "
            "so give it training=self.training"
        )
    return call.shaped("self" if "self" in call.arguments else "input")


@row("softmax", "log_softmax")
def _softmax(call: Call) -> Any:
    source = call.layer("self")
    refusal = f"{call.module} is supported only as the last operation, where it is left out; {SUPPORTED}"
    if len(source.shape) != 1 or call.arguments["dim"] not in (1, -1):
        raise EdgeBcsError(refusal)
    return Ending(source, call.operator, refusal)


# Shapes


@row(
    *("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "unflatten", "expand", "repeat"),
    *("permute", "transpose", "t", "flip", "roll", "select", "slice", "index_select"),
    *("split", "split_with_sizes", "chunk", "unbind"),
    *("channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
)
def _moved(call: Call) -> Any:
    return moved(call, "self")


@row("cat", "concat", "concatenate", "stack")
def _joined(call: Call) -> Any:
    return joined(call, "tensors")


@row("pad", "constant_pad_nd")
def _pad(call: Call) -> Layer:
    given = call.arguments
    mode = given.get("mode", "constant")
    if mode != "constant":
        raise EdgeBcsError(f"{call.module} has padding_mode='{mode}'; only 'zeros' is supported")
    source, value = call.map("self", "padding"), float(given["value"] or 0)
    left, right, top, bottom, front, back, *others = [*map(int, given["pad"]), *[0] * 6][:8]
    channels, height, width = source.shape
    if any(others) or (value and (front, back) != (0, 0)):
        raise EdgeBcsError(f"{call.module} pads more than height and width, and channels with zeros")
    if (front, back) != (0, 0):
        picked = tuple(c if 0 <= c < channels else -1 for c in range(-front, channels + back))
        source = call.add(Channels(call.name, (source.name,), (len(picked), height, width), picked))
    shape = (source.shape[0], height + top + bottom, width + left + right)
    if min(shape) < 1:
        raise EdgeBcsError(f"{call.module} leaves nothing of {size_of(source)} pixels")
    pads = (top, left, bottom, right)
    return call.add(Pad(call.name, (source.name,), shape, pads, value)) if any(pads) else source


@row("upsample_nearest2d", "upsample_bilinear2d")
def _upsample(call: Call) -> Layer:
    given = call.arguments
    source = call.map("input" if "input" in given else "self", "upsampling")
    factors = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    scales = (1 / factors[0] if factors[0] else 0.0, 1 / factors[1] if factors[1] else 0.0)
    _, channels, *size = call.result().shape
    shape, pixels = (channels, *size), (source.shape[1], source.shape[2])
    linear, corners = call.operator == "upsample_bilinear2d", bool(given.get("align_corners"))
    return call.add(Upsample(call.name, (source.name,), shape, pixels, linear, corners, scales))
