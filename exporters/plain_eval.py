"""The evaluation model in ONNX's own operators: dense weights, batch norm folded, for any runtime.

A batch norm that is the only reader of a convolution is folded into its weights; any other stays a
BatchNormalization with its running statistics. The batch is free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edge_bcs import __version__

from . import layers
from .layers import LayerGraph
from .operators import OPERATORS
from .operators.base import Parameter
from .plain import Plain, X

PLAIN_EVAL = "eval_model.plain.onnx"
_OPSET, _IR_VERSION = 17, 8  # old enough for what is in the field
Array = np.ndarray[Any, Any]


def plain_evaluation_model(graph: LayerGraph, network: nn.Module) -> onnx.ModelProto:
    """Return the model: input `input` f32 [batch, C, H, W] in [0, 1], output `logits` f32 [batch, classes].

    Args:
        graph: the layers that were captured of ``network``, which has their parameters.
    """
    return _Writer(graph, network).model()


class _Writer:
    """Emits the layers in order; ``tensors`` maps a layer to the tensor that holds its output."""

    def __init__(self, graph: LayerGraph, network: nn.Module) -> None:
        self.network, self.graph = network, graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensors: dict[str, str] = {}
        readers = self.graph.consumers()
        self.folded = {  # convolution → the batch norm that becomes part of it
            layer.name: found[0]
            for layer in self.graph.layers
            if isinstance(layer, layers.Convolution)
            and len(found := readers[layer.name]) == 1
            and isinstance(found[0], layers.BatchNorm)
        }

    def model(self) -> onnx.ModelProto:
        for layer in self.graph.layers:
            self._write(layer)
        logits = self.tensors[self.graph.output]
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"], "logits"))
        graph = helper.make_graph(
            self.nodes,
            "eval_model",
            [
                helper.make_tensor_value_info(
                    "input", TensorProto.FLOAT, ["batch", *self.graph.layers[0].shape]
                )
            ],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", self.graph.num_classes])],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            producer_name="edge-bcs",
            producer_version=__version__,
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _constant(self, name: str, array: Array | Parameter) -> str:
        if isinstance(array, Parameter):
            array = _numbers(self.network.get_parameter(array.name)).reshape(array.shape)
        dtype = np.int64 if getattr(array, "dtype", None) == np.int64 else np.float32
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def _write(self, layer: layers.Layer) -> None:
        match layer:
            case layers.Input():
                self._normalise(layer)
            case layers.Flatten():
                to_map = Plain("Reshape", {"shape": np.array([0, *layer.shape], np.int64)})
                self._emit(layer, Plain("Flatten", {}, {"axis": 1}) if len(layer.shape) == 1 else to_map)
            case layers.BatchNorm() if self.folded.get(layer.inputs[0]) is layer:
                self.tensors[layer.name] = self.tensors[layer.inputs[0]]
            case _:
                self._emit(layer, *self._plain(layer))

    def _normalise(self, layer: layers.Input) -> None:
        self.tensors[layer.name] = "input"
        for operator, numbers in (("Mul", layer.scale), ("Add", layer.shift)):
            if numbers:
                name = f"{layer.name}.{operator}"
                constant = self._constant(f"{name}.numbers", np.array(numbers).reshape(-1, 1, 1))
                self.nodes.append(
                    helper.make_node(operator, [self.tensors[layer.name], constant], [name], name)
                )
                self.tensors[layer.name] = name

    def _plain(self, layer: layers.Layer) -> list[Plain]:
        """The nodes of a layer; a layer with parameters is one node, and they are its constants."""
        plain = OPERATORS[layer.operator].plain(layer)
        if isinstance(plain, list):
            return plain
        return [replace(plain, constants={**plain.constants, **self._parameters(layer)})]

    def _emit(self, layer: layers.Layer, *plain: Plain) -> None:
        inputs = [self.tensors[name] for name in layer.inputs]
        for number, node in enumerate(plain, 1):
            # The last node has the layer's name.
            name = layer.name if number == len(plain) else f"{layer.name}.{number}"
            inputs = [self._expression(name, f"{layer.name}.", inputs, node)]
        self.tensors[layer.name] = layer.name

    def _expression(self, name: str, prefix: str, given: list[str], plain: Plain) -> str:
        """Write the nodes that make the tensor ``name`` of the tensors ``given``, and return it.

        Args:
            prefix: of the names of constants.
        """
        inputs = list(given)
        if plain.operands:
            parts = enumerate(plain.operands)
            inputs = [self._operand(f"{name}.{i}", given, part) for i, part in parts]
        inputs += [
            "" if array is None else self._constant(f"{prefix}{constant}", array)
            for constant, array in plain.constants.items()
        ]
        self.nodes.append(helper.make_node(plain.operator, inputs, [name], name, **plain.attributes))
        return name

    def _operand(self, name: str, given: list[str], operand: Plain | float | None) -> str:
        if operand is X:
            return given[0]
        if isinstance(operand, Plain):
            return self._expression(name, f"{name}.", given, operand)
        return self._constant(name, np.asarray(operand))

    def _parameters(self, layer: layers.Layer) -> dict[str, Array]:
        """What the layer's module holds, by the names under which the file keeps it."""
        if isinstance(layer, layers.Convolution):
            return self._weight_and_bias(layer)
        if isinstance(layer, layers.BatchNorm):
            module = self.network.get_submodule(layer.module)
            names = ("weight", "bias", "running_mean", "running_var")
            return {name: _numbers(getattr(module, name)) for name in names}
        return {}

    def _weight_and_bias(self, layer: layers.Convolution) -> dict[str, Array]:
        module = self.network.get_submodule(layer.module)
        weight = _numbers(module.weight)
        bias = _numbers(module.bias) if layer.bias else np.zeros(len(weight))
        norm = self.folded.get(layer.name)
        if norm is not None:
            scale, shift = self._scale_and_shift(norm)
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = bias * scale + shift
        if len(layer.shape) == 3:  # a linear layer of a map with the channels last has only two axes
            weight = weight.reshape(*weight.shape[:2], *layer.kernel)
        return {"weight": weight, "bias": bias}

    def _scale_and_shift(self, layer: layers.BatchNorm) -> tuple[Array, Array]:
        """What the batch norm does to a channel, in float64."""
        module = self.network.get_submodule(layer.module)
        scale = _numbers(module.weight) / np.sqrt(_numbers(module.running_var) + layer.epsilon)
        return scale, _numbers(module.bias) - _numbers(module.running_mean) * scale


def _numbers(parameter: Any) -> Array:
    """A parameter in float64."""
    array: Array = parameter.detach().cpu().double().numpy()
    return array
