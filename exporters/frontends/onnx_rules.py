"""What each operator of ONNX becomes: a module, a function of torch, or numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .found import BATCH
from .onnx_file import Array, OnnxNode
from .onnx_module import Apply, Builder, RefusedError, shown
from .onnx_patterns import gelu, group_norm, layer_norm

_SEEN = 1 << 20  # batches that a norm's statistics are of: a file does not say, and they are no new network's


RULES: dict[str, Callable[[Builder, OnnxNode], None]] = {}


def _rule(*operators: str) -> Callable[[Callable[[Builder, OnnxNode], None]], Any]:
    def register(rule: Callable[[Builder, OnnxNode], None]) -> Any:
        for operator in operators:
            RULES[operator] = rule
        return rule

    return register


def _pads(
    b: Builder, node: OnnxNode, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """(top, left, bottom, right), those of auto_pad computed."""
    pads = [int(pad) for pad in node.attributes.get("pads", [0, 0, 0, 0])]
    automatic = node.attributes.get("auto_pad", "NOTSET")
    if automatic == "NOTSET":
        if len(pads) != 4 or min(pads) < 0:
            raise RefusedError(f"it has the pads {pads}")
        return pads
    if automatic == "VALID":
        return [0, 0, 0, 0]
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        raise RefusedError(f"it has auto_pad={automatic!r}")
    extents = b.values[b.map(node)].shape[2:]
    before, after = [], []
    for extent, size, stride, dilation in zip(extents, kernel, strides, dilations, strict=True):
        total = max(0, (-(-extent // stride) - 1) * stride + (size - 1) * dilation + 1 - extent)
        less, more = total // 2, total - total // 2
        before.append(less if automatic == "SAME_UPPER" else more)
        after.append(more if automatic == "SAME_UPPER" else less)
    return [*before, *after]


def _two(node: OnnxNode, name: str) -> list[int]:
    found = [int(number) for number in node.attributes.get(name, [1, 1])]
    if len(found) != 2 or min(found) < 1:
        raise RefusedError(f"it has {name}={found}; two positive numbers are supported")
    return found


@_rule("Conv")
def _convolution(b: Builder, node: OnnxNode) -> None:
    source, weight = b.map(node), b.weight(node, 1, 4)
    bias = b.constant(node, 2)
    kernel, strides, dilations = list(weight.shape[2:]), _two(node, "strides"), _two(node, "dilations")
    pads, groups = _pads(b, node, kernel, strides, dilations), int(node.attributes.get("group", 1))
    channels = b.values[source].shape[1]
    if groups < 1 or weight.shape[1] * groups != channels or weight.shape[0] % groups:
        raise RefusedError(
            f"its weights {list(weight.shape)} in {groups} groups do not fit {channels} channels"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RefusedError(f"its bias has the shape {list(bias.shape)}")
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        padded = OnnxNode("Pad", "", (), (f"{node.outputs[0]}.padded",))
        b.emit(padded, Apply(F.pad, ((left, right, top, bottom),)), source)
        source, top, left = padded.outputs[0], 0, 0
    module = nn.Conv2d(
        channels, weight.shape[0], (kernel[0], kernel[1]), (strides[0], strides[1]), (top, left),
        (dilations[0], dilations[1]), groups,
        bias=bias is not None, device="meta",
    )  # fmt: skip
    b.module(node, node.inputs[1], module, source, weight=weight, bias=bias)


def _linear(b: Builder, node: OnnxNode, source: str, weight: Array, bias: Array | None, name: str) -> None:
    """``weight`` is [out, in]."""
    if b.values[source].shape[-1] != weight.shape[1]:
        raise RefusedError(f"its weights {list(weight.shape)} do not fit {shown(b.values[source].shape)}")
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    shift = None if bias is None else np.broadcast_to(bias, weight.shape[:1])
    b.module(node, name, module, source, weight=weight, bias=shift)


@_rule("Gemm")
def _gemm(b: Builder, node: OnnxNode) -> None:
    a, source = node.attributes, b.tensor(node)
    if a.get("transA", 0) or b.values[source].ndim != 2:
        raise RefusedError("it must multiply [batch, features] by constants")
    weight = b.weight(node, 1, 2) * np.float32(a.get("alpha", 1.0))
    bias = b.constant(node, 2)
    bias = None if bias is None else np.ravel(bias) * np.float32(a.get("beta", 1.0))
    _linear(b, node, source, weight if a.get("transB", 0) else weight.T, bias, node.inputs[1])


@_rule("MatMul")
def _matmul(b: Builder, node: OnnxNode) -> None:
    source, weight, bias, last = b.tensor(node), b.weight(node, 1, 2), None, node
    following = b.alone(node.outputs[0])
    if following is not None and following.operator == "Add":
        (other,) = [name for name in following.inputs if name != node.outputs[0]] or [""]
        found = b.constants.get(other)
        if found is not None and found.ndim == 1 and found.shape == weight.shape[1:]:
            bias, last = found, following
            b.skip(following)
    name = node.inputs[1]
    if not name.endswith(".weight") and last is not node:
        named = next(other for other in last.inputs if other != node.outputs[0])
        name = named.removesuffix(".bias") + ".weight" if named.endswith(".bias") else name
    _linear(b, last, source, weight.T, bias, name)


@_rule("BatchNormalization")
def _batch_norm(b: Builder, node: OnnxNode) -> None:
    if node.attributes.get("training_mode", 0):
        raise RefusedError("it is in training mode; export the network in evaluation mode")
    source = b.tensor(node)
    scale, shift, mean, variance = (b.weight(node, position, 1) for position in (1, 2, 3, 4))
    kind = nn.BatchNorm2d if b.values[source].ndim == 4 else nn.BatchNorm1d
    # ONNX counts what is kept of the old average, torch what is taken of the new one.
    momentum = 1 - float(node.attributes.get("momentum", 0.9))
    module = kind(len(scale), float(node.attributes.get("epsilon", 1e-5)), momentum, device="meta")
    statistics = {"running_mean": mean, "running_var": variance, "num_batches_tracked": np.array(_SEEN)}
    b.module(node, node.inputs[1], module, source, weight=scale, bias=shift, **statistics)


@_rule("LayerNormalization")
def _layer_norm(b: Builder, node: OnnxNode) -> None:
    source = b.tensor(node)
    axis, rank = int(node.attributes.get("axis", -1)), b.values[source].ndim
    extents = list(b.values[source].shape[axis:])
    if axis % rank == 0:
        raise RefusedError("it normalises over the batch")
    module = nn.LayerNorm(extents, float(node.attributes.get("epsilon", 1e-5)), device="meta")
    scale = b.weight(node, 1, len(extents))
    shift = b.constant(node, 2, np.zeros(extents, np.float32))
    b.module(node, node.inputs[1], module, source, weight=scale, bias=shift)


@_rule("GroupNormalization")
def _group_norm(b: Builder, node: OnnxNode) -> None:
    source, groups = b.map(node), int(node.attributes["num_groups"])
    scale, shift = b.weight(node, 1, 1), b.weight(node, 2, 1)
    channels = b.values[source].shape[1]
    if len(scale) == groups != channels:  # opset 18 has one for each group
        scale, shift = (np.repeat(array, channels // groups) for array in (scale, shift))
    module = nn.GroupNorm(groups, channels, float(node.attributes.get("epsilon", 1e-5)), device="meta")
    b.module(node, node.inputs[1], module, source, weight=scale, bias=shift)


def _plain(operator: str, function: Callable[..., Tensor], **attributes: tuple[str, Any]) -> None:
    """An operator of one tensor: torch's argument → (ONNX's attribute, its default)."""

    def rule(b: Builder, node: OnnxNode) -> None:
        given = [
            (name, node.attributes.get(theirs, default)) for name, (theirs, default) in attributes.items()
        ]
        b.emit(node, Apply(function, (), tuple(given)), b.tensor(node))

    RULES[operator] = rule


_plain("Relu", F.relu)
_plain("LeakyRelu", F.leaky_relu, negative_slope=("alpha", 0.01))
_plain("HardSwish", F.hardswish)
_plain("Sigmoid", torch.sigmoid)
_plain("Tanh", torch.tanh)
_plain("Gelu", F.gelu, approximate=("approximate", "none"))
_plain("GlobalAveragePool", F.adaptive_avg_pool2d, output_size=("", (1, 1)))
_plain("GlobalMaxPool", F.adaptive_max_pool2d, output_size=("", (1, 1)))
_plain("Flatten", torch.flatten, start_dim=("axis", 1))
_plain("Softmax", torch.softmax, dim=("axis", -1))
_plain("LogSoftmax", torch.log_softmax, dim=("axis", -1))


@_rule("Identity", "Dropout", "Cast")
def _identity(b: Builder, node: OnnxNode) -> None:
    if node.operator == "Cast" and node.attributes.get("to") != 1:
        raise RefusedError("it makes other numbers than float32 of a tensor of the network")
    source = b.tensor(node)
    b.values[node.outputs[0]] = b.values[source]
    b.names[node.outputs[0]] = b.name_of(source)


@_rule("Clip")
def _clip(b: Builder, node: OnnxNode) -> None:
    sides = []
    for position, (name, otherwise) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        found = node.attributes.get(name)
        found = b.constant(node, position, otherwise) if found is None else found
        sides.append(float(found) if np.size(found) == 1 else np.nan)
    low, high = sides
    if low != 0 or not (high == 6 or high > 3e38):
        raise RefusedError(f"it clips to [{low:g}, {high:g}]; [0, 6] (ReLU6) is supported")
    b.emit(node, Apply(F.relu6 if high == 6 else F.relu), b.tensor(node))


@_rule("HardSigmoid")
def _hard_sigmoid(b: Builder, node: OnnxNode) -> None:
    slope, middle = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    if abs(slope - 1 / 6) > 1e-6 or middle != 0.5:
        raise RefusedError(
            f"it has the slope {slope:g} and the middle {middle:g}; torch's 1/6 and 0.5 are supported"
        )
    b.emit(node, Apply(F.hardsigmoid), b.tensor(node))


RULES["Erf"] = gelu


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
}


@_rule(*_ARITHMETIC)
def _arithmetic(b: Builder, node: OnnxNode) -> None:
    function: Callable[..., Any] = _ARITHMETIC[node.operator]
    constants = [name for name in node.inputs if name in b.constants]
    if not constants:
        b.emit(node, Apply(function), b.tensor(node, 0), b.tensor(node, 1))
        return
    first = node.inputs[0] in b.constants
    array, source = b.constants[constants[0]], b.tensor(node, 1 if first else 0)
    if array.dtype.kind not in "fi":
        raise RefusedError("it computes with a constant that is no number")
    if array.size == 1:
        number = float(np.ravel(array)[0])
        b.emit(node, _Scalar(function, number, first), source)
        return
    rank = b.values[source].ndim
    if array.ndim > rank or (array.ndim == rank and array.shape[0] != 1):
        raise RefusedError(f"it computes with a constant of the shape {list(array.shape)}")
    name = f"constant_{sum(1 for _ in b.network.named_parameters())}"
    wanted = constants[0].replace(".", "_")
    name = wanted if wanted.isidentifier() and not hasattr(b.network, wanted) else name
    b.network.register_parameter(name, nn.Parameter(torch.empty(array.shape, device="meta")))
    b.numbers[name] = array.astype(np.float32)
    b.emit(node, _Parameter(function, name, first), source)


@dataclass(frozen=True)
class _Scalar:
    function: Callable[..., Tensor]
    number: float
    first: bool

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        if not self.first:
            return self.function(x, self.number)
        return self.function(torch.full_like(x, self.number), x)


@dataclass(frozen=True)
class _Parameter:
    function: Callable[..., Tensor]
    name: str
    first: bool

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        parameter = network.get_parameter(self.name)
        return self.function(parameter, x) if self.first else self.function(x, parameter)


@_rule("Concat")
def _concat(b: Builder, node: OnnxNode) -> None:
    names = [b.tensor(node, position) for position in range(len(node.inputs))]
    b.emit(node, _Concat(int(node.attributes.get("axis", 1))), *names)


@dataclass(frozen=True)
class _Concat:
    axis: int

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.axis)


@_rule("Split")
def _split(b: Builder, node: OnnxNode) -> None:
    source, axis = b.tensor(node), int(node.attributes.get("axis", 0))
    extent, sizes = b.values[source].shape[axis], b.listed(node, "split", 1)
    if sizes is None:
        parts = int(node.attributes.get("num_outputs", len(node.outputs)))
        size = -(-extent // parts)
        sizes = [min(size, extent - first) for first in range(0, extent, size)]
    if min(sizes) < 1:
        raise RefusedError(f"it makes parts of {sizes}")
    b.emit(node, Apply(torch.split, (sizes, axis)), source)


@_rule("Slice")
def _slice(b: Builder, node: OnnxNode) -> None:
    source = b.tensor(node)
    starts, ends = b.listed(node, "", 1) or [], b.listed(node, "", 2) or []
    axes = b.listed(node, "", 3) or list(range(len(starts)))
    steps = b.listed(node, "", 4) or [1] * len(starts)
    rank = b.values[source].ndim
    slices = [slice(None)] * rank
    for first, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % rank == 0 or step < 1:
            raise RefusedError("it cuts the batch, or goes backwards")
        slices[axis] = slice(first, end, step)
    b.emit(node, _Slice(tuple(slices)), source)


@dataclass(frozen=True)
class _Slice:
    slices: tuple[slice, ...]

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        return x[self.slices]


@_rule("Transpose")
def _transpose(b: Builder, node: OnnxNode) -> None:
    source = b.tensor(node)
    order = node.attributes.get("perm") or list(range(b.values[source].ndim))[::-1]
    if order[0] != 0:
        raise RefusedError("it moves the batch")
    b.emit(node, Apply(torch.permute, (tuple(order),)), source)


@_rule("Reshape", "Squeeze", "Unsqueeze")
def _reshape(b: Builder, node: OnnxNode) -> None:
    source = b.tensor(node)
    extents = list(b.values[source].shape)
    if node.operator == "Reshape":
        wanted = [int(number) for number in np.ravel(b.constant(node, 1))]
        if not node.attributes.get("allowzero", 0):
            wanted = [extents[i] if number == 0 else number for i, number in enumerate(wanted)]
        if group_norm(b, node, source, wanted):
            return
    elif node.operator == "Squeeze":
        axes = b.listed(node, "axes", 1)
        gone = {i for i, extent in enumerate(extents) if extent == 1} if axes is None else {
            axis % len(extents) for axis in axes
        }  # fmt: skip
        if any(extents[axis] != 1 for axis in gone):
            raise RefusedError("it leaves out an axis that is not 1 long")
        wanted = [extent for axis, extent in enumerate(extents) if axis not in gone]
    else:
        axes = b.listed(node, "axes", 1) or []
        rank = len(extents) + len(axes)
        wanted, rest = [], iter(extents)
        for axis in range(rank):
            wanted.append(1 if axis in {other % rank for other in axes} else next(rest))
    if not wanted or len(wanted) > 8:
        raise RefusedError(f"it makes {len(wanted)} dimensions")
    count = prod(extents[1:])
    known = prod(number for number in wanted[1:] if number != -1)
    first = wanted[0]
    open_first = first in (-1, BATCH, b.graph.batch)
    if not open_first or wanted[1:].count(-1) > 1 or known < 1 or count % known:
        raise RefusedError(f"it makes {shown(wanted)} of {shown(extents)}; the batch must stay by itself")
    rest_of = [count // known if number == -1 else number for number in wanted[1:]]
    if prod(rest_of) != count:
        raise RefusedError(f"it makes {shown(wanted)} of {shown(extents)}; the batch must stay by itself")
    b.emit(node, _Reshape(tuple(rest_of)), source)


@dataclass(frozen=True)
class _Reshape:
    extents: tuple[int, ...]

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.extents)


@_rule("Pad")
def _pad(b: Builder, node: OnnxNode) -> None:
    if node.attributes.get("mode", "constant") != "constant":
        raise RefusedError(f"it pads with mode={node.attributes['mode']!r}; constant is supported")
    source = b.map(node)
    pads, value = b.listed(node, "pads", 1) or [], b.constant(node, 2, 0.0)
    axes = b.listed(node, "", 3)
    if axes is not None:
        full = [0] * 8
        for position, axis in enumerate(axes):
            full[axis % 4], full[4 + axis % 4] = pads[position], pads[len(axes) + position]
        pads = full
    if len(pads) != 8 or any(pads[axis] for axis in (0, 1, 4, 5)):
        raise RefusedError("it pads other axes than height and width")
    sides = (pads[3], pads[7], pads[2], pads[6])
    b.emit(node, Apply(F.pad, (sides, "constant", float(np.ravel(value)[0]))), source)


@_rule("MaxPool", "AveragePool")
def _pool(b: Builder, node: OnnxNode) -> None:
    source = b.map(node)
    kernel, strides, dilations = _two(node, "kernel_shape"), _two(node, "strides"), _two(node, "dilations")
    pads = _pads(b, node, kernel, strides, dilations)
    if dilations != [1, 1]:
        raise RefusedError("it is dilated")
    ceil, average = bool(node.attributes.get("ceil_mode", 0)), node.operator == "AveragePool"
    inside = bool(node.attributes.get("count_include_pad", 0))
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        if average and not inside:
            raise RefusedError("it averages over unequal pads without counting them")
        value = 0.0 if average else float("-inf")
        padded = OnnxNode("Pad", "", (), (f"{node.outputs[0]}.padded",))
        b.emit(padded, Apply(F.pad, ((left, right, top, bottom), "constant", value)), source)
        source, top, left = padded.outputs[0], 0, 0
    function: Callable[..., Any] = F.max_pool2d
    given = [
        ("kernel_size", tuple(kernel)),
        ("stride", tuple(strides)),
        ("padding", (top, left)),
        ("ceil_mode", ceil),
    ]
    if average:
        function, given = F.avg_pool2d, [*given, ("count_include_pad", inside)]
    b.emit(node, Apply(function, (), tuple(given)), source)


@_rule("ReduceMean")
def _reduce_mean(b: Builder, node: OnnxNode) -> None:
    source = b.tensor(node)
    rank = b.values[source].ndim
    axes = sorted(axis % rank for axis in b.listed(node, "axes", 1) or [])
    if layer_norm(b, node, source, axes):
        return
    if rank != 4 or axes != [2, 3]:
        raise RefusedError("it averages over other axes than height and width")
    keep = bool(node.attributes.get("keepdims", 1))
    b.emit(node, Apply(torch.mean, ((2, 3), keep)), source)


@_rule("Resize")
def _resize(b: Builder, node: OnnxNode) -> None:
    source = b.map(node)
    a, extents = node.attributes, b.values[source].shape[2:]
    mode, place = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    scales, sizes = b.constant(node, 2), b.constant(node, 3)
    if sizes is not None and np.size(sizes) == 4:
        size = [int(number) for number in np.ravel(sizes)[2:]]
    elif scales is not None and np.size(scales) == 4:
        factors = [float(number) for number in np.ravel(scales)]
        if factors[:2] != [1.0, 1.0]:
            raise RefusedError("it changes the number of channels")
        size = [int(extent * factor) for extent, factor in zip(extents, factors[2:], strict=True)]
    else:
        raise RefusedError("its size must be a constant")
    if min(size) < 1 or max(size) > 1 << 14:
        raise RefusedError(f"it makes images of {size}")
    given: list[tuple[str, Any]] = [("size", tuple(size)), ("mode", "nearest")]
    if mode == "nearest":
        floor = a.get("nearest_mode", "round_prefer_floor") == "floor"
        whole = all(to % extent == 0 for to, extent in zip(size, extents, strict=True))
        # Where each pixel is repeated as often, half pixels rounded down are the same.
        if not (place == "asymmetric" and (floor or whole)) and not (whole and place == "half_pixel"):
            raise RefusedError(
                f"it takes the nearest pixel by {place!r}; 'asymmetric' and floor are supported"
            )
    elif mode == "linear" and place in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        given = [("size", tuple(size)), ("mode", "bilinear"), ("align_corners", place == "align_corners")]
    else:
        raise RefusedError(f"it has mode={mode!r} and {place!r}; nearest and linear are supported")
    b.emit(node, Apply(F.interpolate, (), tuple(given)), source)
