"""Capture: ``torch.fx`` trace of an ``nn.Module`` into the layer graph, refusing the rest by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edge_bcs.core.errors import EdgeBcsError

from ..layers import (
    UNKNOWN,
    Add,
    AveragePool,
    BatchNorm,
    Convolution,
    Elementwise,
    Flatten,
    Input,
    Layer,
    LayerGraph,
    MaxPool,
    ReLU,
    Shape,
    agree,
    shown,
)

SUPPORTED = (
    "Conv2d, Linear, BatchNorm1d/2d, ReLU, LeakyReLU, addition of two tensors, MaxPool2d, AvgPool2d, "
    "AdaptiveAvgPool2d, mean over height and width, flatten/view/reshape to a vector, Identity"
)

_RELU = (F.relu, torch.relu, torch.relu_, F.relu_)
_ELEMENTWISE: dict[Any, tuple[str, dict[str, tuple[str, float]]]] = {
    nn.LeakyReLU: ("LeakyReLU", {"slope": ("negative_slope", 0.01)}),
    F.leaky_relu: ("LeakyReLU", {"slope": ("negative_slope", 0.01)}),
}
"""Module or function of torch → operator, and for each of its attributes torch's name and default."""
_ADD = (operator.add, operator.iadd, torch.add)
_FLATTEN = (torch.flatten, torch.reshape)
_SIZES = ("size", "dim")


def capture(module: nn.Module, input_shape: Shape) -> LayerGraph:
    """Trace ``module`` on one image of ``input_shape`` = (C, H, W) and return its layer graph.

    For ``UNKNOWN`` every extent that depends on the image is 0, and nothing is refused because of it: such a
    graph shows that the layers are supported, and is good for nothing else.

    The module is not run, so nothing of it changes. Dropout is taken as it stands: in eval mode (or with
    probability 0) it is the identity, in training mode it is refused, because the artifact trains without it.

    Raises:
        EdgeBcsError: the network cannot be traced or contains something unsupported; the message names it.
    """
    if len(input_shape) != 3 or (any(extent < 1 for extent in input_shape) and input_shape != UNKNOWN):
        raise EdgeBcsError(f"the input shape must be (channels, height, width), not {tuple(input_shape)}")
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:
        said = " ".join(str(error).split())
        raise EdgeBcsError(
            f"the network cannot be traced ({said}); its forward must not depend on the data, and may use "
            f"{SUPPORTED}"
        ) from error
    return _Capture(traced, input_shape).graph


class _Capture:
    """Walks the traced nodes in order; ``values`` maps each to its layer, or to None for sizes of shapes."""

    def __init__(self, traced: fx.GraphModule, input_shape: Shape) -> None:
        self.traced = traced
        self.graph = LayerGraph()
        self.values: dict[fx.Node, Layer | None] = {}
        self.used: set[str] = set()
        for node in traced.graph.nodes:
            try:
                self._visit(node, input_shape)
            except EdgeBcsError:
                raise
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                said = " ".join(str(error).split())
                raise EdgeBcsError(
                    f"'{node.name}' ({node.target}) has arguments that are not supported ({said}); they must "
                    "be constants"
                ) from error

    def _visit(self, node: fx.Node, input_shape: Shape) -> None:
        if node.op == "placeholder":
            if any(isinstance(layer, Input) for layer in self.graph.layers):
                if node.users:
                    raise EdgeBcsError(
                        f"the network takes a second input '{node.target}'; only one image is supported"
                    )
                return
            self._append(node, Input(node.name, (), tuple(input_shape)))
        elif node.op == "output":
            self._finish(node.args[0])
        elif node.op == "call_module":
            self._module(node, str(node.target))
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "call_method":
            self._method(node, str(node.target))
        elif node.users:
            raise EdgeBcsError(
                f"the network reads the tensor '{node.target}' directly; supported are {SUPPORTED}"
            )

    def _append(self, node: fx.Node, layer: Layer) -> None:
        self.graph.layers.append(layer)
        self.values[node] = layer

    def _finish(self, result: Any) -> None:
        layer = self.values.get(result) if isinstance(result, fx.Node) else None
        if layer is None or len(layer.shape) != 1:
            raise EdgeBcsError("the network must return one tensor of logits with shape (batch, classes)")
        self.graph.output = layer.name
        needed = {layer.name}
        for candidate in reversed(self.graph.layers):
            if candidate.name in needed:
                needed.update(candidate.inputs)
        # What does not reach the logits is not computed; the image stays, whatever the network does with it.
        self.graph.layers = [
            kept for kept in self.graph.layers if kept.name in needed or isinstance(kept, Input)
        ]

    def _layer(self, node: fx.Node, position: int = 0) -> Layer:
        """The layer that argument ``position`` of ``node`` refers to."""
        argument = node.args[position] if position < len(node.args) else node.kwargs.get("input")
        layer = self.values.get(argument) if isinstance(argument, fx.Node) else None
        if layer is None:
            raise EdgeBcsError(
                f"'{node.name}' takes something that is not a tensor of the network; "
                f"supported are {SUPPORTED}"
            )
        return layer

    def _map(self, node: fx.Node, what: str) -> Layer:
        """Like ``_layer``, for layers that need a feature map."""
        layer = self._layer(node)
        if len(layer.shape) != 3:
            raise EdgeBcsError(
                f"{what} '{node.name}' needs a feature map (C, H, W) but gets {shown(layer.shape)}"
            )
        return layer

    # Modules

    def _module(self, node: fx.Node, name: str) -> None:
        module = self.traced.get_submodule(name)
        if any(True for _ in module.parameters()):
            if name in self.used:
                raise EdgeBcsError(f"module '{name}' is used twice; every layer must have weights of its own")
            self.used.add(name)
        if isinstance(module, nn.Conv2d):
            self._convolution(node, name, module)
        elif isinstance(module, nn.Linear):
            self._linear(node, name, module)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            self._batch_norm(node, name, module)
        elif isinstance(module, nn.ReLU):
            self._relu(node)
        elif type(module) in _ELEMENTWISE:
            self._elementwise(node, type(module), vars(module))
        elif isinstance(module, nn.MaxPool2d):
            self._max_pool(node, vars(module))
        elif isinstance(module, nn.AvgPool2d):
            self._average_pool(node, vars(module))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node, module.output_size)
        elif isinstance(module, nn.Flatten):
            self._flatten(node, module.start_dim, module.end_dim)
        elif isinstance(module, nn.Identity):
            self.values[node] = self._layer(node)
        elif isinstance(module, (nn.Dropout, nn.Dropout2d)):
            self._dropout(node, module.p, module.training)
        else:
            raise EdgeBcsError(
                f"module '{name}' ({type(module).__name__}) is not supported; supported are {SUPPORTED}"
            )

    def _convolution(self, node: fx.Node, name: str, module: nn.Conv2d) -> None:
        source = self._map(node, "convolution")
        if module.groups != 1:
            raise EdgeBcsError(f"convolution '{name}' has groups={module.groups}; only groups=1 is supported")
        if module.padding_mode != "zeros":
            raise EdgeBcsError(
                f"convolution '{name}' has padding_mode='{module.padding_mode}'; only 'zeros' is supported"
            )
        if _pair(module.dilation) != (1, 1):
            raise EdgeBcsError(
                f"convolution '{name}' has dilation={module.dilation}; only dilation=1 is supported"
            )
        kernel = _pair(module.kernel_size)
        stride = _single(module.stride, f"convolution '{name}' has unequal strides")
        if isinstance(module.padding, str):
            pads = (0, 0) if module.padding == "valid" else ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
            if module.padding == "same" and (kernel[0] % 2 == 0 or kernel[1] % 2 == 0):
                raise EdgeBcsError(
                    f"convolution '{name}' has padding='same' with an even kernel; use an odd kernel"
                )
        else:
            pads = _pair(module.padding)
        padding = _single(pads, f"convolution '{name}' has unequal paddings")
        if kernel[0] * kernel[1] > 255:
            raise EdgeBcsError(
                f"convolution '{name}' has a kernel of {kernel[0]}×{kernel[1]}; "
                "at most 255 weights a channel are supported"
            )
        channels, height, width = source.shape
        if channels not in (module.in_channels, 0):
            raise EdgeBcsError(
                f"convolution '{name}' expects {module.in_channels} channels but gets {channels}"
            )
        shape = (
            module.out_channels,
            _extent(height, kernel[0], stride, padding, node),
            _extent(width, kernel[1], stride, padding, node),
        )
        bias = module.bias is not None
        self._append(node, Convolution(node.name, (source.name,), shape, name, kernel, stride, padding, bias))

    def _linear(self, node: fx.Node, name: str, module: nn.Linear) -> None:
        source = self._layer(node)
        if not agree(source.shape, (module.in_features,)):
            raise EdgeBcsError(
                f"linear layer '{name}' expects a vector of {module.in_features} but gets "
                f"{shown(source.shape)}; flatten before it"
            )
        bias = module.bias is not None
        self._append(
            node, Convolution(node.name, (source.name,), (module.out_features,), name, (1, 1), 1, 0, bias)
        )

    def _batch_norm(self, node: fx.Node, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        source = self._layer(node)
        if source.shape[0] not in (module.num_features, 0):
            raise EdgeBcsError(
                f"batch norm '{name}' expects {module.num_features} channels but gets {source.shape[0]}"
            )
        if module.momentum is None:
            raise EdgeBcsError(
                f"batch norm '{name}' has momentum=None; only a running average (such as 0.1) is supported"
            )
        self._append(
            node, BatchNorm(node.name, (source.name,), source.shape, name, module.eps, module.momentum)
        )

    # Functions and methods

    def _function(self, node: fx.Node) -> None:
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if target in _RELU:
            self._relu(node)
        elif target in _ADD:
            self._add(node)
        elif target in _ELEMENTWISE:
            theirs = (name for name, _ in _ELEMENTWISE[target][1].values())
            self._elementwise(node, target, _arguments(node, *theirs))
        elif target in (F.max_pool2d, torch.max_pool2d):
            self._max_pool(
                node, _arguments(node, "kernel_size", "stride", "padding", "dilation", "ceil_mode")
            )
        elif target in (F.avg_pool2d, torch._C._nn.avg_pool2d):
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            self._average_pool(node, _arguments(node, *names))
        elif target is F.adaptive_avg_pool2d:
            self._adaptive_pool(node, _arguments(node, "output_size")["output_size"])
        elif target is torch.mean:
            self._mean(node)
        elif target is torch.flatten:
            arguments = _arguments(node, "start_dim", "end_dim")
            self._flatten(node, arguments.get("start_dim", 0), arguments.get("end_dim", -1))
        elif target is torch.reshape:
            self._reshape(node, tuple(node.args[1]) if len(node.args) > 1 else tuple(node.kwargs["shape"]))  # type: ignore[arg-type]
        elif target is F.dropout or target is F.dropout2d:
            arguments = _arguments(node, "p", "training")
            self._dropout(node, arguments.get("p", 0.5), arguments.get("training", True))
        elif target is getattr or (target is operator.getitem and self._is_size(node.args[0])):
            self.values[node] = None  # a shape, only good as an argument of view or reshape
        else:
            name = getattr(target, "__name__", str(target))
            raise EdgeBcsError(f"the function '{name}' is not supported; supported are {SUPPORTED}")

    def _method(self, node: fx.Node, name: str) -> None:
        if name in ("relu", "relu_"):
            self._relu(node)
        elif name in ("add", "add_"):
            self._add(node)
        elif name == "mean":
            self._mean(node)
        elif name == "flatten":
            arguments = _arguments(node, "start_dim", "end_dim")
            self._flatten(node, arguments.get("start_dim", 0), arguments.get("end_dim", -1))
        elif name in ("view", "reshape"):
            sizes = node.args[1:]
            self._reshape(
                node, tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
            )
        elif name == "contiguous":
            self.values[node] = self._layer(node)
        elif name in _SIZES:
            self.values[node] = None
        else:
            raise EdgeBcsError(f"the method '{name}' is not supported; supported are {SUPPORTED}")

    def _relu(self, node: fx.Node) -> None:
        source = self._layer(node)
        self._append(node, ReLU(node.name, (source.name,), source.shape))

    def _elementwise(self, node: fx.Node, torchs: Any, given: dict[str, Any]) -> None:
        source = self._layer(node)
        kind, attributes = _ELEMENTWISE[torchs]
        found = {ours: float(given.get(theirs, default)) for ours, (theirs, default) in attributes.items()}
        self._append(node, Elementwise(node.name, (source.name,), source.shape, kind, found))

    def _add(self, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            raise EdgeBcsError(
                f"the addition '{node.name}' must add two tensors of the network, without alpha"
            )
        first, second = self._layer(node, 0), self._layer(node, 1)
        if not agree(first.shape, second.shape):
            raise EdgeBcsError(
                f"the addition '{node.name}' adds {shown(first.shape)} and {shown(second.shape)}; both must "
                "have one shape"
            )
        self._append(node, Add(node.name, (first.name, second.name), first.shape))

    def _dropout(self, node: fx.Node, probability: float, training: bool) -> None:
        if training and probability > 0:
            raise EdgeBcsError(
                f"dropout '{node.name}' is active; the artifact trains without dropout, so call "
                "model.eval() first "
                "or set its probability to 0"
            )
        self.values[node] = self._layer(node)

    def _max_pool(self, node: fx.Node, options: dict[str, Any]) -> None:
        source = self._map(node, "max pooling")
        kernel, stride = self._window(node, "max pooling", options)
        padding = _single(options.get("padding", 0), f"max pooling '{node.name}' has unequal paddings")
        if options.get("ceil_mode") or options.get("return_indices"):
            raise EdgeBcsError(
                f"max pooling '{node.name}' must have ceil_mode=False and return_indices=False"
            )
        if _pair(options.get("dilation", 1)) != (1, 1):
            raise EdgeBcsError(f"max pooling '{node.name}' has dilation; only dilation=1 is supported")
        if kernel * kernel > 255:
            raise EdgeBcsError(
                f"max pooling '{node.name}' has a window of {kernel}×{kernel}; at most 15×15 is supported"
            )
        channels, height, width = source.shape
        shape = (
            channels,
            _extent(height, kernel, stride, padding, node),
            _extent(width, kernel, stride, padding, node),
        )
        self._append(node, MaxPool(node.name, (source.name,), shape, kernel, stride, padding))

    def _average_pool(self, node: fx.Node, options: dict[str, Any]) -> None:
        source = self._map(node, "average pooling")
        kernel, stride = self._window(node, "average pooling", options)
        if (
            _pair(options.get("padding", 0)) != (0, 0)
            or options.get("ceil_mode")
            or options.get("divisor_override")
        ):
            raise EdgeBcsError(
                f"average pooling '{node.name}' must have padding=0, ceil_mode=False and no divisor_override"
            )
        channels, height, width = source.shape
        shape = (channels, _extent(height, kernel, stride, 0, node), _extent(width, kernel, stride, 0, node))
        self._append(node, AveragePool(node.name, (source.name,), shape, kernel, stride))

    def _window(self, node: fx.Node, what: str, options: dict[str, Any]) -> tuple[int, int]:
        kernel = _single(options["kernel_size"], f"{what} '{node.name}' has a window that is not square")
        stride = options.get("stride")
        if stride is None or stride == []:
            return kernel, kernel
        return kernel, _single(stride, f"{what} '{node.name}' has unequal strides")

    def _adaptive_pool(self, node: fx.Node, output_size: Any) -> None:
        source = self._map(node, "average pooling")
        channels, height, width = source.shape
        size = _single(output_size, f"average pooling '{node.name}' has an output that is not square")
        if height != width or height % size:
            raise EdgeBcsError(
                f"average pooling '{node.name}' cannot bring {height}×{width} to {size}×{size} with "
                "equal square windows"
            )
        kernel = height // size
        self._append(node, AveragePool(node.name, (source.name,), (channels, size, size), kernel, kernel))

    def _mean(self, node: fx.Node) -> None:
        arguments = _arguments(node, "dim", "keepdim")
        source = self._map(node, "mean")
        axes = arguments.get("dim")
        if not isinstance(axes, (tuple, list)) or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise EdgeBcsError(f"the mean '{node.name}' must be over height and width, dim=[2, 3]")
        channels, height, width = source.shape
        if height != width:
            raise EdgeBcsError(
                f"the mean '{node.name}' is over {height}×{width}; only square maps are supported"
            )
        pooled = AveragePool(f"{node.name}_pool", (source.name,), (channels, 1, 1), height, height)
        self._append(node, pooled)
        if not arguments.get("keepdim", False):
            self._append(node, Flatten(node.name, (pooled.name,), (channels,)))

    def _flatten(self, node: fx.Node, start: int, end: int) -> None:
        source = self._layer(node)
        rank = len(source.shape) + 1
        if start % rank != 1 or end % rank != rank - 1:
            raise EdgeBcsError(
                f"the flatten '{node.name}' must keep the batch dimension and flatten all others"
            )
        self._vector(node, source)

    def _reshape(self, node: fx.Node, sizes: tuple[Any, ...]) -> None:
        source = self._layer(node)
        total = prod(source.shape)
        batch = len(sizes) == 2 and (sizes[0] == -1 or self._is_size(sizes[0]))
        if not batch or not (sizes[1] == total or not total or (sizes[1] == -1 and sizes[0] != -1)):
            raise EdgeBcsError(
                f"the reshape '{node.name}' must give (batch, {total}); use torch.flatten(x, 1)"
            )
        self._vector(node, source)

    def _is_size(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.values and self.values[value] is None

    def _vector(self, node: fx.Node, source: Layer) -> None:
        if len(source.shape) == 1:
            self.values[node] = source
        else:
            self._append(node, Flatten(node.name, (source.name,), (prod(source.shape),)))


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments after the tensor, by name, of a traced call."""
    given = dict(zip(names, node.args[1:], strict=False))
    given.update(node.kwargs)
    return given


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return int(first), int(second)


def _single(value: Any, complaint: str) -> int:
    """The common extent of both axes."""
    first, second = _pair(value)
    if first != second:
        raise EdgeBcsError(f"{complaint} {first} and {second}; both must be equal")
    return first


def _extent(size: int, kernel: int, stride: int, padding: int, node: fx.Node) -> int:
    """Number of windows along one axis; 0, unknown, of an unknown size."""
    if not size:
        return 0
    extent = (size + 2 * padding - kernel) // stride + 1
    if extent < 1:
        raise EdgeBcsError(
            f"the window of '{node.name}' ({kernel}) is larger than its input ({size} + 2·{padding})"
        )
    return extent
