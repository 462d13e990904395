"""ONNX files made node by node, and the comparison of what is captured of them with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from edge_bcs.exporters.frontends.onnx import OnnxNetwork, from_onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class File:
    """A graph under construction; every call of an operator adds a node and returns its output's name."""

    def __init__(self, *shape: int, batch: int | str = "batch", opset: int = 17) -> None:
        self.shape, self.batch, self.opset = shape, batch, opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(len(shape) + sum(shape))

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        def add(*inputs: str, outputs: int = 1, **attributes: Any) -> Any:
            names = [f"t{len(self.nodes)}.{number}" for number in range(outputs)]
            self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
            return names[0] if outputs == 1 else names

        return add

    def constant(self, array: Any, name: str = "") -> str:
        array = np.asarray(array)
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, *shape: int, name: str = "", low: float = -1.0) -> str:
        return self.constant(self.random.uniform(low, 1, shape).astype(np.float32), name)

    def whole(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def conv(self, x: str, *shape: int, name: str = "", **attributes: Any) -> str:
        made: str = self.Conv(x, self.numbers(*shape, name=name), self.numbers(shape[0]), **attributes)
        return made

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)])


def same_as_onnxruntime(model: onnx.ModelProto, folder: Path, batch: int = 3) -> OnnxNetwork:
    file = folder / "net.onnx"
    onnx.save(model, file)
    network = from_onnx(file)
    shape = network.edge_bcs_input_shape
    assert shape is not None
    x = np.random.default_rng(1).random((batch, *shape), np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = onnxruntime.InferenceSession(str(file), options).run(None, {"x": x})
    with torch.no_grad():
        found = network(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))
    return network


def small() -> tuple[File, str]:
    f = File(3, 8, 8)
    y = f.Relu(f.Conv("x", f.numbers(8, 3, 3, 3, name="stem.weight"), f.numbers(8)))
    return f, f.Gemm(f.Flatten(f.GlobalAveragePool(y)), f.numbers(10, 8, name="head.weight"), transB=1)
