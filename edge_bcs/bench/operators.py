"""Single convolutions: ours, dense PyTorch's, ONNX Runtime's and SparseProp's, on the same shapes.

Every distinct convolution of a network is timed in three forms: forward (ours with folded batch norm, ReLU
and its bits); gradient of the input (ours under a mask of bits); gradients of input and weights. The sides
run in turn, with a pause before each so that none meets another's spinning threads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from edge_bcs import models
from edge_bcs.bench import roofline
from edge_bcs.bench.machine import Roof
from edge_bcs.bench.roofline import Least
from edge_bcs.bench.turns import PAUSE
from edge_bcs.exporters.nodes import Node, TensorType
from edge_bcs.exporters.operators import OPERATORS
from edge_bcs.exporters.operators.convolution import algorithm
from edge_bcs.method.connectivity import kappa, layer_counts, paper_densities
from edge_bcs.method.sparse_model import prunable_layers
from edge_bcs.runtime import library

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
WARM_SECONDS, TURN_SECONDS, RUNS = 0.01, 0.03, 4
"""A function's turn: run untimed for so long, and once at least; then timed for so long, and so often at
least."""


class Convolution(NamedTuple):
    """One convolution's geometry and how many of its weights there are."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int
    padding: int
    active: int

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weights(self) -> int:
        """Weights of the dense kernel."""
        return self.out_channels * self.in_channels * self.kernel**2


def convolutions(network: str, distribution: str, sparsity: str) -> Counter[Convolution]:
    """The distinct convolutions of a network and how often it has each."""
    model = models.create(network)
    layers = prunable_layers(model)
    sizes = [layer.size for layer in layers]
    densities = [1.0] * len(sizes)
    if distribution == "paper":
        densities = paper_densities(model, layers, 1 - float(sparsity))
    counts = dict(
        zip(
            (layer.name for layer in layers),
            layer_counts(sizes, densities, kappa(sum(sizes), sparsity)),
            strict=True,
        )
    )
    found: Counter[Convolution] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):

            def note(module: torch.nn.Conv2d, inputs: Any, _: Any, name: str = name) -> None:
                geometry = (
                    module.in_channels,
                    module.out_channels,
                    inputs[0].shape[2],
                    module.kernel_size[0],
                )
                steps = (module.stride[0], int(module.padding[0]))
                found[Convolution(*geometry, *steps, int(counts[name]))] += 1

            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return found


def aligned(array: np.ndarray) -> onnxruntime.OrtValue:
    """The array at an address that is a multiple of 64, as ONNX Runtime's own tensors are."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return onnxruntime.OrtValue.ortvalue_from_numpy(copy)


def session(
    operator: str,
    inputs: dict[str, np.ndarray | None],
    outputs: list[str | None],
    threads: int,
    **attributes: Any,
) -> Callable[[], Any]:
    """A function that runs one operator on bound inputs; outputs are dtypes, None for an absent one."""
    given = {name: array for name, array in inputs.items() if array is not None}
    wanted = {f"out{i}": dtype for i, dtype in enumerate(outputs) if dtype is not None}
    node = helper.make_node(
        operator,
        ["" if array is None else name for name, array in inputs.items()],
        ["" if dtype is None else f"out{i}" for i, dtype in enumerate(outputs)],
        domain="edge_bcs",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        operator,
        [
            helper.make_tensor_value_info(name, TYPES[array.dtype.name], array.shape)
            for name, array in given.items()
        ],
        [helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in wanted.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge_bcs", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    library.register(options)
    made = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = made.io_binding()
    first: list[np.ndarray] = made.run(list(wanted), given)
    # A binding knows addresses alone: with onnxruntime 1.23 it keeps no array.
    read = {name: aligned(array) for name, array in given.items()}
    written = {name: aligned(array) for name, array in zip(wanted, first, strict=True)}
    for name, value in read.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in written.items():
        binding.bind_ortvalue_output(name, value)

    def run(held: object = (read, written)) -> list[np.ndarray]:
        made.run_with_iobinding(binding)
        return first

    return run


def stack(
    random: np.random.Generator, blocks: int, channels: int, size: int, halo: int, lanes: int
) -> np.ndarray:
    """A stack f32 [blocks, P, lanes] of normal pixels with a halo of zeros."""
    row = size + halo
    planes = np.zeros((blocks, channels, size + halo, row, lanes), np.float32)
    planes[:, :, :size, :size] = random.standard_normal((blocks, channels, size, size, lanes), np.float32)
    front = np.zeros((blocks, halo * row + halo, lanes), np.float32)
    return np.concatenate([front, planes.reshape(blocks, -1, lanes)], axis=1)


def attributes_of(layer: Convolution, lanes: int, kernel: str, side: str = "out_") -> dict[str, Any]:
    """Attributes of an operator of the layer, alone in its network, with ReLU.

    Args:
        layer: the layer. lanes: images side by side. kernel: "sparse" or "dense".
        side: whose pixels the operator makes, "out_" for Conv, "in_" for the gradients.
    """
    attributes = {
        "layer_offset": 0,
        "in_channels": layer.in_channels,
        "in_height": layer.size,
        "in_width": layer.size,
        "in_halo": layer.padding,
        "out_channels": layer.out_channels,
        "out_height": layer.out_size,
        "out_width": layer.out_size,
        "out_halo": 1,
        "kernel": [layer.kernel, layer.kernel],
        "strides": [layer.stride] * 2,
        "pads": [layer.padding] * 4,
        "dilations": [1, 1],
        "groups": 1,
        "lanes": lanes,
        "forward_pointer": 3 * layer.active,
        "transpose_pointer": 3 * layer.active + layer.out_channels + 1,
        "affine": 0,
        "activation": "relu",
    }
    return attributes | {"algorithm": algorithm(kernel, attributes, side)}


def ours(layer: Convolution, batch: int, lanes: int, threads: int, kernel: str) -> list[Callable[[], Any]]:
    """The three operators on random data."""
    random = np.random.default_rng(0)
    index = np.sort(random.choice(layer.weights, layer.active, replace=False)).astype(np.int32)
    value = random.standard_normal(layer.active, np.float32)
    pointers = layer.out_channels + 1 + layer.in_channels * layer.stride**2 + 1
    shape = [
        0,
        layer.out_channels,
        layer.in_channels,
        layer.kernel,
        layer.kernel,
        layer.stride,
        layer.padding,
    ]
    empty = np.zeros(3 * layer.active + pointers, np.int32)
    lists = session("BuildLists", {"index": index, "lists": empty}, ["int32"], 1, layers=shape)()[0]
    blocks = batch // lanes
    halo, dy_halo = layer.padding, layer.kernel // 2
    attributes = attributes_of(layer, lanes, kernel)
    backward = attributes_of(layer, lanes, kernel, "in_") | {"dy_halo": dy_halo, "dx_halo": 1, "mask_kind": 2}
    x = stack(random, blocks, layer.in_channels, layer.size, halo, lanes)
    dy = stack(random, blocks, layer.out_channels, layer.out_size, dy_halo, lanes)
    bytes_of_row = -(-layer.size * lanes // 8)
    mask = random.integers(0, 256, (blocks, layer.in_channels * layer.size, bytes_of_row), np.uint8)
    affine = random.standard_normal(2 * layer.out_channels, np.float32)
    common = {"value": value, "affine": affine}
    masked: dict[str, np.ndarray | None] = {"addend": None, "mask": mask}
    grads = {"coo_grad": np.zeros_like(value), "affine_grad": np.zeros_like(affine)}
    f32 = "float32"
    forward: dict[str, np.ndarray | None] = {"x": x, **common, "residual": None, "lists": lists}
    return [
        session("Conv", forward, [f32, "uint8"], threads, **attributes),
        session("ConvInputGrad", {"dy": dy, **common, **masked, "lists": lists}, [f32], threads, **backward),
        session(
            "ConvGrad",
            {"dy": dy, "x": x, **common, **masked, **grads, "lists": lists},
            [f32] * 3,
            threads,
            **backward,
        ),
    ]


def rooflines(
    layer: Convolution, batch: int, lanes: int, kernel: str, roof: Roof
) -> list[tuple[float, Least]]:
    """Bytes moved and least seconds of the three operators.

    Bytes: each stack once, and a bit for each element of the one that was or is to be rectified.
    """
    images = 4.0 * batch * layer.in_channels * layer.size**2
    results = 4.0 * batch * layer.out_channels * layer.out_size**2
    types = {"stack": TensorType("f32", (batch // lanes,))}
    found = []
    for operator, side, moved in (
        ("Conv", "out_", images + results * 33 / 32),
        ("ConvInputGrad", "in_", results + images * 33 / 32),
        ("ConvGrad", "in_", results + images * 65 / 32),
    ):
        attributes = attributes_of(layer, lanes, kernel, side)
        node = Node(operator, ["stack"], ["result"], attributes, operator)
        walks = OPERATORS[operator].walks(node, types, lambda _: layer.active)
        multiplied = roofline.products(operator, attributes, walks)
        flops = sum(2.0 * walk.entries * walk.rows * walk.floats for walk in walks)
        found.append((moved, roofline.least(multiplied, flops, moved, roof)))
    return found


def dense(layer: Convolution, batch: int) -> list[Callable[[], Any]]:
    """The same with torch: the convolution alone, without the batch norm and ReLU around it."""
    memory: dict[str, Any] = {"memory_format": torch.channels_last}
    x = torch.randn(batch, layer.in_channels, layer.size, layer.size).to(**memory)
    dy = torch.randn(batch, layer.out_channels, layer.out_size, layer.out_size).to(**memory)
    weight = torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel).to(**memory)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.conv2d(x, weight, stride=layer.stride, padding=layer.padding)

    def backward(weights: bool) -> Any:
        steps, pad = [layer.stride] * 2, [layer.padding] * 2
        want = [True, weights, False]
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, steps, pad, [1, 1], False, [0, 0], 1, want
        )

    return [forward, lambda: backward(False), lambda: backward(True)]


def ort_dense(layer: Convolution, batch: int, threads: int) -> Callable[[], Any]:
    """ONNX Runtime's own dense convolution, forward."""
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, layer.in_channels, layer.size, layer.size), np.float32)
    weight = random.standard_normal(
        (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel), np.float32
    )
    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        pads=[layer.padding] * 4,
        strides=[layer.stride] * 2,
        kernel_shape=[layer.kernel] * 2,
    )
    types = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "conv", types, result, [numpy_helper.from_array(weight, "w")])
    opsets = [helper.make_opsetid("", 21)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: made.run(None, {"x": x})


def sparseprop(layer: Convolution, batch: int) -> list[Callable[[], Any]] | None:
    """SparseProp's forward and its gradients of input and weights; None where the package is not installed.

    Of its two ways to use vectors (over images, over pixels) the faster one is taken, as its own
    `swap_modules_with_sparse` does.
    """
    try:
        from sparseprop.modules.conv2d import SparseConv2d
    except ImportError:
        return None
    weight = torch.zeros(layer.weights)
    weight[torch.randperm(layer.weights)[: layer.active]] = torch.randn(layer.active)
    shape = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    x = torch.randn(batch, layer.in_channels, layer.size, layer.size, requires_grad=True)
    dy = torch.randn(batch, layer.out_channels, layer.out_size, layer.out_size)
    best: list[Callable[[], Any]] = []
    fastest = float("inf")
    for over_pixels in (False, True):
        module = SparseConv2d(
            weight.reshape(shape), padding=layer.padding, stride=layer.stride, vectorizing_over_on=over_pixels
        )
        result = module(x)

        def forward(module: Any = module) -> Any:
            with torch.no_grad():
                return module(x)

        def backward(module: Any = module, result: Any = result) -> Any:
            return torch.autograd.grad(result, [x, module.W_val], dy, retain_graph=True)

        seconds = sum(timed([forward, backward], 1))
        if seconds < fastest:
            best, fastest = [forward, backward], seconds
    return best


def timed(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, run in turn."""
    return [float(np.median(taken)) for taken in times(functions, rounds)]


def times(functions: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round: the median of the runs of its turn.

    The functions take turns. Before its turn a function waits until the threads of the one before it no
    longer spin for work (they would take the cores from this one's). Then it runs untimed for `WARM_SECONDS`,
    because in a network, too, a layer's input was just written and its threads are awake; and all functions
    are timed for as long, however short their runs: after a pause it takes a machine milliseconds to be as
    fast as it is in the middle of a training.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, collected in zip(functions, taken, strict=True):
            time.sleep(PAUSE)
            began = time.perf_counter()
            function()
            while time.perf_counter() < began + WARM_SECONDS:
                function()
            runs: list[float] = []
            while len(runs) < RUNS or sum(runs) < TURN_SECONDS:
                start = time.perf_counter()
                function()
                runs.append(time.perf_counter() - start)
            collected.append(float(np.median(runs)))
    return taken
