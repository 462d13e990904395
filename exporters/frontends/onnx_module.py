"""The torch module that an ONNX graph becomes, and what builds it step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .found import BATCH
from .onnx_file import Array, OnnxGraph, OnnxNode

_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Step:
    """A function of the network: ``run(network, *tensors)`` → tensor or tuple; ``done`` is read no more."""

    run: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...] = ()


class OnnxNetwork(nn.Module):
    """What an ONNX file computes: images f32 [n, C, H, W] → its first output.

    Attributes:
        steps: its functions in order. edge_bcs_input_shape: (C, H, W) of the images, where the file says it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.edge_bcs_input_shape: tuple[int, int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, classes] of images f32 [n, C, H, W]."""
        values: dict[str, Tensor] = {"": x}
        for step in self.steps:
            found = step.run(self, *(values[name] for name in step.inputs))
            values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=False))
            for name in step.done:
                del values[name]
        return values[self.steps[-1].outputs[0]]


class RefusedError(Exception):
    """Why a node cannot be taken."""


@dataclass(frozen=True)
class Call:
    """A module of the network, by its name."""

    name: str

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Return what the module makes of ``x``."""
        found: Tensor = network.get_submodule(self.name)(x)
        return found


@dataclass(frozen=True)
class Apply:
    """A function of tensors with further arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Any:
        """Return what the function makes of the tensors."""
        return self.function(*tensors, *self.arguments, **dict(self.keywords))


@dataclass
class Builder:
    """Walks the nodes of a graph in order and makes the network.

    Attributes:
        graph: of the file. shape: (C, H, W) of its images.
        rules: operator → what is done with its nodes. folded: operator → what it makes of constants.
        values: tensors without numbers, which know their shapes. constants: arrays by name.
    """

    graph: OnnxGraph
    shape: tuple[int, int, int]
    rules: Mapping[str, Callable[[Builder, OnnxNode], None]]
    folded: Mapping[str, Callable[..., Any]]
    network: OnnxNetwork = field(default_factory=OnnxNetwork)

    def __post_init__(self) -> None:
        graph = self.graph
        self.constants = dict(graph.constants)
        self.producers = {name: node for node in graph.nodes for name in node.outputs}
        self.readers: dict[str, list[OnnxNode]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.values = {graph.image: torch.empty(BATCH, *self.shape, device="meta")}
        self.names = {graph.image: ""}  # of tensors, where the step that made them calls them otherwise
        self.skipped: set[int] = set()  # nodes that became part of one before them
        self.numbers: dict[
            str, Array
        ] = {}  # of parameters and buffers, which have none while shapes are found
        for node in graph.nodes:
            if id(node) not in self.skipped:
                self._visit(node)
        if graph.output not in self.values:
            raise RefusedError(f"the output '{graph.output}' does not depend on the image")
        self._finish()

    def _finish(self) -> None:
        """Keep what the output needs, and let go of every tensor after its last reader."""
        wanted, kept = {self.name_of(self.graph.output)}, []
        for step in reversed(self.network.steps):
            if wanted.isdisjoint(step.outputs):
                continue
            done = {*step.inputs, *step.outputs} - wanted
            kept.append(Step(step.run, step.inputs, step.outputs, tuple(sorted(done))))
            wanted |= set(step.inputs)
        if not kept:
            raise RefusedError("its output is its image")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in self.numbers.items()}
        self.network.load_state_dict(tensors, strict=True, assign=True)
        self.network.steps = kept[::-1]
        self.network.edge_bcs_input_shape = self.shape

    def name_of(self, tensor: str) -> str:
        """Name under which the network holds a tensor of the file."""
        return self.names.get(tensor, tensor)

    def _visit(self, node: OnnxNode) -> None:
        if node.operator == "Shape":
            self._shape(node)
        elif all(name in self.constants or not name for name in node.inputs) and node.inputs:
            self._fold(node)
        else:
            rule = self.rules.get(node.operator)
            if rule is None:
                raise RefusedError(f"{node} is not supported; supported are {', '.join(sorted(self.rules))}")
            try:
                rule(self, node)
            except RefusedError as error:
                raise RefusedError(f"{node}: {error}") from None
            except Exception as error:  # whatever torch says of hostile numbers
                said = " ".join(str(error).split())[:160]
                raise RefusedError(f"{node} cannot be computed from what it is given ({said})") from None

    # What rules call

    def emit(self, node: OnnxNode, run: Callable[..., Any], *inputs: str) -> None:
        """Append a step whose outputs are those of ``node``."""
        with torch.no_grad():
            found = run(self.network, *(self.values[name] for name in inputs))
        results = found if isinstance(found, tuple) else (found,)
        for name, result in zip(node.outputs, results, strict=False):
            if result.shape[0] != BATCH or prod(result.shape[1:]) > _MOST_PIXELS:
                raise RefusedError(f"it makes a tensor of the shape {shown(result.shape)}")
            self.values[name] = result
        self.network.steps.append(Step(run, tuple(map(self.name_of, inputs)), node.outputs))

    def module(
        self, node: OnnxNode, named: str, module: nn.Module, source: str, **numbers: Array | None
    ) -> None:
        """Append a step that calls ``module``, which is named after its weight ``named`` and gets numbers."""
        name = named.removesuffix(".weight") if named.endswith(".weight") else ""
        parts = [part.replace(" ", "_") for part in name.split(".")]
        if not name or not all(parts) or not self._free(parts):
            count = sum(1 for _ in self.network.named_children())
            parts = [f"{node.operator.lower()}_{count}"]
        parent: nn.Module = self.network
        for part in parts[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(parts[-1], module.eval())
        name = ".".join(parts)
        self.numbers |= {f"{name}.{key}": array for key, array in numbers.items() if array is not None}
        self.emit(node, Call(name), source)

    def _free(self, parts: Sequence[str]) -> bool:
        """Whether a module may be added under this name."""
        parent: nn.Module = self.network
        for position, part in enumerate(parts):
            if part not in dict(parent.named_children()):
                return not hasattr(parent, part)
            parent = parent.get_submodule(part)
            if type(parent) is not nn.Module or position == len(parts) - 1:
                return False
        return False

    def tensor(self, node: OnnxNode, position: int = 0) -> str:
        """The tensor of the network at an input."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        if name not in self.values:
            raise RefusedError(f"its input {position} must be a tensor of the network")
        return name

    def map(self, node: OnnxNode) -> str:
        """The same, for what needs a feature map."""
        name = self.tensor(node)
        if self.values[name].ndim != 4:
            raise RefusedError(f"it needs [batch, C, H, W] and gets {shown(self.values[name].shape)}")
        return name

    def constant(self, node: OnnxNode, position: int, otherwise: Any = None) -> Any:
        """The array at an input; ``otherwise`` where it is left out."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        if not name:
            return otherwise
        if name not in self.constants:
            raise RefusedError(f"its input {position} must be a constant")
        return self.constants[name]

    def weight(self, node: OnnxNode, position: int, rank: int) -> Array:
        """Float numbers of so many dimensions at an input."""
        found = self.constant(node, position)
        if found is None or found.dtype != np.float32 or found.ndim != rank:
            raise RefusedError(f"its input {position} must be {rank}-dimensional numbers")
        array: Array = found
        return array

    def listed(self, node: OnnxNode, name: str, position: int) -> list[int] | None:
        """Whole numbers, an attribute in older opsets and an input in newer ones; None if left out."""
        found = node.attributes.get(name)
        if found is None:
            found = self.constant(node, position)
        return None if found is None else [int(number) for number in np.ravel(found)]

    def alone(self, tensor: str) -> OnnxNode | None:
        """The only node that reads a tensor."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor != self.graph.output else None

    def skip(self, *nodes: OnnxNode) -> None:
        """These nodes are part of the one that is visited."""
        self.skipped |= {id(node) for node in nodes}

    # Arithmetic on shapes

    def _shape(self, node: OnnxNode) -> None:
        name = node.inputs[0]
        if name not in self.values and name not in self.constants:
            raise RefusedError(f"{node} is given nothing")
        found = self.values[name].shape if name in self.values else self.constants[name].shape
        first, last = node.attributes.get("start", 0), node.attributes.get("end")
        self.constants[node.outputs[0]] = np.array(found[first:last], np.int64)

    def _fold(self, node: OnnxNode) -> None:
        arrays = [self.constants[name] if name else None for name in node.inputs]
        rule = self.folded.get(node.operator)
        if rule is None:
            raise RefusedError(
                f"{node} computes with constants in a way that is not supported; simplify the file"
            )
        try:
            found = np.asarray(rule(node.attributes, *arrays))
        except Exception as error:  # whatever numpy says of hostile numbers
            said = " ".join(str(error).split())[:160]
            raise RefusedError(f"{node} cannot be computed ({said})") from None
        if found.size > 1 << 20 and found.size > sum(array.size for array in arrays if array is not None):
            raise RefusedError(f"{node} makes {found.size:,} numbers of constants")
        self.constants[node.outputs[0]] = found


def shown(shape: Sequence[int]) -> str:
    """Return a shape for a message."""
    return f"[{', '.join('batch' if extent == BATCH else str(extent) for extent in shape)}]"
