"""A torch module whose kernels have exactly κ non-zero weights, and the buffers that say which.

The state has the names and the layout of every other form of it (`edge_bcs.core.state`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.normalization import Normalization
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.segments import Segment
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.state import STATE_NAMES, Parts, state_layout
from edge_bcs.method.heads import head_of
from edge_bcs.method.hooks import (
    keep_biased_variance,
    normalization_of,
    resize_of,
    set_normalization,
    take_logits,
)

KERNELS = (nn.Conv2d, nn.Linear)
"""Modules whose `weight` is a kernel, [out, in / groups, kh, kw] or [out, in]."""


def prunable_layers(model: nn.Module, dense: Collection[str] = ()) -> tuple[Segment, ...]:
    """Return the kernels of `model` in the order of `named_modules()`, with their numbering.

    Args:
        model: the network. dense: names of modules whose kernels are left out, because they stay dense.

    Raises:
        EdgeBcsError: a module with a parameter of several dimensions that is neither Conv2d nor Linear, a
            parameter that two modules share or that is not float32, or no kernel at all.
    """
    layers = []
    offset = 0
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            _check_parameter(name, module, parameter_name, parameter)
            if id(parameter) in seen:
                raise EdgeBcsError(
                    f"{name}.{parameter_name} is shared by two modules, which is not supported"
                )
            seen.add(id(parameter))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None:
            raise EdgeBcsError(f"the batch norm {name} keeps no running statistics")
        if isinstance(module, KERNELS) and name not in dense:
            layer = Segment(name, tuple(module.weight.shape), offset)
            layers.append(layer)
            offset += layer.size
    if not layers:
        kind = type(model).__name__
        if dense:
            raise EdgeBcsError(f"every kernel of {kind} stays dense, and none is left to sparsify")
        raise EdgeBcsError(f"{kind} has neither a convolution nor a linear layer to sparsify")
    return tuple(layers)


def weight_name(layer: Segment) -> str:
    """Return the qualified name of the parameter that is a kernel."""
    return f"{layer.name}.weight".removeprefix(".")


def _check_parameter(name: str, module: nn.Module, kind: str, parameter: nn.Parameter) -> None:
    """Raise `EdgeBcsError` for a parameter that is neither a known kernel nor a vector."""
    kernel = isinstance(module, KERNELS) and kind == "weight"
    # A number a channel is trained as it is, whatever holds it: norms, biases, a layer's scale [C, 1, 1].
    if not kernel and sum(extent > 1 for extent in parameter.shape) > 1:
        raise EdgeBcsError(
            f"{name or 'the model'} ({type(module).__name__}) has the parameter {kind!r} of the shape "
            f"{list(parameter.shape)}; only Conv2d and Linear may have parameters of several dimensions"
        )
    if parameter.dtype != torch.float32:
        raise EdgeBcsError(f"{name}.{kind} is {parameter.dtype}; convert the model to float32")


class SparseModel(nn.Module):
    """`network` with exactly κ non-zero kernel weights, w = γ·θ at the positions `index`.

    The kernels are ordinary dense parameters of `network`, zero wherever there is no connection, so the
    model can be called, attacked and traced like any other. Kernels are views of one flat vector, and so
    are the other parameters: reading and writing the buffers is one gather or scatter.

    Batch norm keeps the biased batch variance in its running average (as the paper's code does, and the
    board).

    Attributes:
        network: the wrapped module.
        layers: the kernels among whose weights the connections lie, in the order of their numbering.
        size: N, the number of these weights.
        kappa: κ, the number of connections.
        index: i64[κ], strictly ascending positions of the connections.
        momentum: f32[κ], their momentum.
        dense: the other parameters, kernels that stay dense among them, in the order of `dense.value`.
        dense_momentum: f32[D], their momentum.
        statistics: the batch norms, in the order of `batchnorm.mean`.
        step: number of training steps that the weights have behind them.
        seed, sparsity, distribution: what `sparsify` was asked for; `sparsity` is a decimal string.
        classes: names of the outputs in label order; None until training takes them from its first data, or
            you set them. Data is matched with them by name (edge_bcs/data/classes.py).
        passes: what computes the logits of f32 [n, C, H, W] in evaluation mode instead of `network`; None for
            the latter (`edge_bcs.exporters.passes.by_graphs`).
    """

    classes: tuple[str, ...] | None
    passes: Callable[[Tensor], Tensor] | None
    index: Tensor
    momentum: Tensor
    dense_momentum: Tensor

    def __init__(
        self,
        network: nn.Module,
        value: NDArray[np.float32],
        index: NDArray[np.integer[Any]],
        *,
        seed: int = 0,
        sparsity: str,
        distribution: str = "paper",
        dense: Collection[str] = (),
    ) -> None:
        """Wrap `network` (not copied) with value f32[κ] at index int[κ].

        Its kernels are overwritten, but for those of the modules `dense`, which stay as they are.
        """
        super().__init__()
        self.layers = prunable_layers(network, dense)
        self.size = sum(layer.size for layer in self.layers)
        self.kappa = len(index)
        self.step = 0
        self.classes, self.passes = None, None
        self.seed, self.sparsity, self.distribution = seed, sparsity, distribution
        self.network = network
        self.dense = self._dense_parameters()
        self.statistics = self._batch_norms()
        device = next(network.parameters()).device
        self.register_buffer("index", torch.zeros(self.kappa, dtype=torch.int64, device=device))
        self.register_buffer("momentum", torch.zeros(self.kappa, device=device))
        width = sum(math.prod(parameter.shape) for parameter in self.dense)
        self.register_buffer("dense_momentum", torch.zeros(width, device=device))
        self._weights = self._others = torch.zeros(0)
        self._weight_gradients = self._other_gradients = torch.zeros(0)
        for statistics in self.statistics:
            keep_biased_variance(network.get_submodule(statistics.name))
        if take_logits not in network._forward_hooks.values():
            network.register_forward_hook(take_logits)
        self.load_coo(value, index)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, classes] of images f32 [n, C, H, W] in [0, 1]."""
        logits: Tensor = self.network(x) if self.training or self.passes is None else self.passes(x)
        return logits

    @property
    def record(self) -> dict[str, Any]:
        """What is said of the network where it is stored: {"name", "arguments"}, which rebuild it.

        A user's own module has the name of its class and no arguments, and may have "factory", what made it,
        "input_shape", [C, H, W] of the images that it was trained on, and "head", {"layer", "classes"}: the
        last layer, if somebody said how many outputs it has. Any may have "normalize" and "resize".
        """
        described: dict[str, Any] = {"name": type(self.network).__name__, "arguments": {}}
        if not self.own:
            described = {**self.network.network}  # type: ignore[dict-item]
        else:
            if self.factory is not None:
                described["factory"] = self.factory
            if self.input_shape is not None:
                described["input_shape"] = list(self.input_shape)
            if (head := head_of(self.network)) is not None:
                described["head"] = asdict(head)
        if self.normalize is not None:
            described["normalize"] = self.normalize.record
        if self.resize != SQUASH:
            described["resize"] = self.resize.text
        return described

    @property
    def own(self) -> bool:
        """Whether the network is a user's own, which no name rebuilds."""
        record = getattr(self.network, "network", None)  # which may also be what it calls a part of it
        return not (isinstance(record, dict) and "name" in record)

    # These lie on the module, so that copies of it keep them.

    @property
    def normalize(self) -> Normalization | None:
        """What is done to the pixels before the network's first layer; the images stay in [0, 1]."""
        return normalization_of(self.network)

    @normalize.setter
    def normalize(self, normalization: Normalization | None) -> None:
        set_normalization(self.network, normalization)

    @property
    def resize(self) -> Resize:
        """How image files are brought to the size of the network's images."""
        return resize_of(self.network)

    @resize.setter
    def resize(self, resize: Resize) -> None:
        self.network.edge_bcs_resize = resize  # type: ignore[assignment]

    @property
    def ending(self) -> str:
        """What the network itself does to its logits, "softmax" or "log_softmax", if that is known."""
        return str(getattr(self.network, "edge_bcs_ending", ""))

    @ending.setter
    def ending(self, ending: str) -> None:
        self.network.edge_bcs_ending = ending  # type: ignore[assignment]

    @property
    def factory(self) -> str | None:
        """What made a user's own module, MODULE:FACTORY, if it was said: information, never imported."""
        factory = getattr(self.network, "edge_bcs_factory", None)
        return factory if isinstance(factory, str) else None

    @factory.setter
    def factory(self, factory: str | None) -> None:
        self.network.edge_bcs_factory = factory  # type: ignore[assignment]

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images that the network was made for, or a user's own was last trained on."""
        if self.own:
            shape: tuple[int, int, int] | None = getattr(self.network, "edge_bcs_input_shape", None)
            return shape
        arguments = self.record.get("arguments", {})
        size = int(arguments.get("input_size", 32))
        return int(arguments.get("input_channels", 3)), size, size

    @input_shape.setter
    def input_shape(self, shape: tuple[int, int, int] | None) -> None:
        self.network.edge_bcs_input_shape = shape  # type: ignore[assignment]

    @property
    def parts(self) -> Parts:
        """Which kernel, parameter or batch norm a number of the state belongs to."""
        kernels = [(weight_name(layer), layer.offset) for layer in self.layers]
        return Parts(
            self.size,
            kernels,
            [(parameter.name, parameter.offset) for parameter in self.dense],
            [(statistics.name, statistics.offset) for statistics in self.statistics],
        )

    # Flat views.

    def _dense_parameters(self) -> tuple[Segment, ...]:
        kernels = {weight_name(layer) for layer in self.layers}
        found, offset = [], 0
        for name, parameter in self.network.named_parameters():
            if name not in kernels:
                found.append(Segment(name, tuple(parameter.shape), offset))
                offset += parameter.numel()
        return tuple(found)

    def _batch_norms(self) -> tuple[Segment, ...]:
        found, offset = [], 0
        for name, module in self.network.named_modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                found.append(Segment(name, (module.num_features,), offset))
                offset += module.num_features
        return tuple(found)

    def _kernels(self) -> list[nn.Parameter]:
        return [self.network.get_parameter(weight_name(layer)) for layer in self.layers]

    def _other_parameters(self) -> list[nn.Parameter]:
        return [self.network.get_parameter(parameter.name) for parameter in self.dense]

    @property
    def weights(self) -> Tensor:
        """f32[N]: all prunable weights, zero where there is no connection; the kernels are views of it."""
        self._weights = _flattened(self._kernels(), self._weights)
        return self._weights

    @property
    def dense_value(self) -> Tensor:
        """f32[D]: all other parameters; they are views of it."""
        self._others = _flattened(self._other_parameters(), self._others)
        return self._others

    def zero_gradients(self) -> None:
        """Set every gradient to zero, in flat vectors to which later backward passes add."""
        self._weight_gradients = _flat_gradients(self._kernels(), self._weight_gradients)
        self._other_gradients = _flat_gradients(self._other_parameters(), self._other_gradients)

    def take_gradients(self, kernels: Tensor, others: Tensor) -> None:
        """Have these gradients: ``kernels`` f32[κ] of the connections, or f32[N] of all prunable weights, and
        ``others`` f32[D]."""
        self.zero_gradients()
        places = slice(None) if len(kernels) == self.size else self.index
        self._weight_gradients[places] = kernels
        self._other_gradients.copy_(others)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return (f32[κ], f32[D]): accumulated since `zero_gradients`, of connections and of others."""
        return self._weight_gradients[self.index], self._other_gradients

    def all_gradients(self) -> Tensor:
        """f32[N]: accumulated since `zero_gradients`, of all prunable weights, dormant ones too."""
        return self._weight_gradients

    def value(self) -> Tensor:
        """Return a copy of w = γ·θ of the connections, f32[κ]."""
        return self.weights[self.index]

    def write(self, value: Tensor, index: Tensor) -> None:
        """Make value f32[κ] at index i64[κ] the connections; nothing is checked (see `load_coo`)."""
        weights = self.weights
        weights[self.index] = 0
        weights[index] = value
        self.index.copy_(index)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Drop connections for good; κ is what is left. ``kept`` bool[κ] says of each whether it stays."""
        with HeldSignals() as signals:
            signals.hold()
            self.weights[self.index[~kept]] = 0
            self.index, self.momentum = self.index[kept], self.momentum[kept]
            self.kappa = len(self.index)

    # Exchange with numpy: the seven buffers of the contract.

    def coo(self) -> tuple[NDArray[np.float32], NDArray[np.signedinteger[Any]]]:
        """Return (value f32[κ], index i32[κ] ascending; i64 if there are 2³¹ weights or more)."""
        dtype = np.int32 if self.size < 2**31 else np.int64
        return self.value().cpu().numpy().astype(np.float32), self.index.cpu().numpy().astype(dtype)

    def load_coo(
        self,
        value: NDArray[np.float32],
        index: NDArray[np.integer[Any]],
        momentum: NDArray[np.float32] | None = None,
    ) -> None:
        """Replace all connections; the momentum is zero unless given.

        Raises:
            EdgeBcsError: not κ entries, positions out of range or not strictly ascending, a value that is
                zero or not finite. Nothing is changed then.
        """
        if len(index) != self.kappa:
            check_coo(value, index, self.size)
            raise EdgeBcsError(f"the network has {self.kappa} connections, the buffers {len(index)}")
        self.become(value, index, momentum)

    @torch.no_grad()
    def become(
        self,
        value: NDArray[np.float32],
        index: NDArray[np.integer[Any]],
        momentum: NDArray[np.float32] | None = None,
    ) -> None:
        """Replace all connections by others, of which there may be more or fewer: κ is their number then.

        Raises:
            EdgeBcsError: as `load_coo`, but for their number; nothing is changed then.
        """
        check_coo(value, index, self.size)
        count = len(index)
        moved = torch.zeros(count) if momentum is None else torch.from_numpy(momentum.copy())
        if moved.shape != (count,) or not torch.isfinite(moved).all():
            raise EdgeBcsError(f"coo.momentum must hold {count} finite numbers")
        with HeldSignals() as signals:
            signals.hold()
            weights = self.weights
            weights.zero_()
            if count != self.kappa:
                self.kappa = count
                self.index, self.momentum = self.index.new_empty(count), self.momentum.new_empty(count)
            self.index.copy_(torch.from_numpy(index.astype(np.int64)))
            weights[self.index] = torch.from_numpy(value.astype(np.float32)).to(weights.device)
            self.momentum.copy_(moved)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return a copy of the seven buffers, by the names in `STATE_NAMES`."""
        value, index = self.coo()
        return {
            "coo.value": value,
            "coo.index": index,
            "coo.momentum": self.momentum.cpu().numpy().copy(),
            "dense.value": self.dense_value.cpu().numpy().copy(),
            "dense.momentum": self.dense_momentum.cpu().numpy().copy(),
            "batchnorm.mean": self._running("running_mean"),
            "batchnorm.variance": self._running("running_var"),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace the whole state by buffers as `state` returns them; no signal comes between.

        Raises:
            EdgeBcsError: a buffer is missing, has the wrong length or holds something that is not finite.
        """
        channels = sum(statistics.size for statistics in self.statistics)
        for name in STATE_NAMES:
            if name not in state:
                raise EdgeBcsError(f"the state has no {name}")
        for name, (_, length) in state_layout(self.kappa, len(self.dense_momentum), channels).items():
            if name.startswith("coo."):
                continue  # `load_coo` checks them
            if state[name].shape != (length,) or not np.isfinite(state[name]).all():
                raise EdgeBcsError(
                    f"{name} must hold {length} finite numbers for this network; it has the shape "
                    f"{list(state[name].shape)}"
                )
        with HeldSignals() as signals:
            signals.hold()
            self.load_coo(state["coo.value"], state["coo.index"], state["coo.momentum"])
            self.dense_value.copy_(torch.from_numpy(state["dense.value"].copy()))
            self.dense_momentum.copy_(torch.from_numpy(state["dense.momentum"].copy()))
            for statistics in self.statistics:
                part = statistics.span
                module = self.network.get_submodule(statistics.name)
                for attribute, name in (
                    ("running_mean", "batchnorm.mean"),
                    ("running_var", "batchnorm.variance"),
                ):
                    getattr(module, attribute).copy_(torch.from_numpy(state[name][part].copy()))

    def _running(self, attribute: str) -> NDArray[np.float32]:
        parts = [getattr(self.network.get_submodule(item.name), attribute) for item in self.statistics]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=np.float32)

    @property
    def dense_kernels(self) -> tuple[str, ...]:
        """Names of the modules whose kernels stay dense, in the order of the network."""
        sparse = {layer.name for layer in self.layers}
        modules = self.network.named_modules()
        return tuple(name for name, part in modules if isinstance(part, KERNELS) and name not in sparse)

    def layer_counts(self) -> dict[str, int]:
        """Return the number of connections of each layer, by its name, in order; they sum to κ."""
        bounds = self.index.new_tensor([*(layer.offset for layer in self.layers), self.size])
        counts = torch.searchsorted(self.index, bounds).diff().tolist()
        return dict(zip((layer.name for layer in self.layers), counts, strict=True))

    def extra_repr(self) -> str:
        """Return what `print` shows beside the network."""
        return f"connections={self.kappa} of {self.size}, sparsity={self.sparsity}, seed={self.seed}"


def check_coo(value: NDArray[np.float32], index: NDArray[np.integer[Any]], size: int) -> None:
    """Raise `EdgeBcsError` unless value f32[κ], index int[κ] are connections among `size` weights."""
    if value.ndim != 1 or value.shape != index.shape:
        raise EdgeBcsError(
            f"values and positions must be vectors of one length, not {list(value.shape)} and "
            f"{list(index.shape)}"
        )
    if index.dtype.kind not in "iu":
        raise EdgeBcsError(f"positions must be integers, not {index.dtype}")
    if not len(index) or index[0] < 0 or index[-1] >= size or (np.diff(index.astype(np.int64)) <= 0).any():
        raise EdgeBcsError(f"positions must be strictly ascending, in the range 0 to {size - 1}")
    if not np.isfinite(value).all() or (value == 0).any():
        raise EdgeBcsError("every connection's value must be finite and not zero")


def _flattened(parameters: Sequence[nn.Parameter], flat: Tensor) -> Tensor:
    """Return a vector of which all `parameters` are views: `flat` if it still is one, else a new one.

    Moving or copying a module gives each parameter memory of its own, hence the check.
    """
    position = flat.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != position or parameter.device != flat.device:
            break
        position += parameter.numel() * parameter.element_size()
    else:
        return flat
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    offset = 0
    for parameter in parameters:
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return flat


def _flat_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> Tensor:
    """Return a zeroed vector of which the gradients of all `parameters` are views."""
    size = sum(parameter.numel() for parameter in parameters)
    device = parameters[0].device if parameters else flat.device
    if flat.shape != (size,) or flat.device != device:
        flat = torch.empty(size, device=device)
    flat.zero_()
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return flat
