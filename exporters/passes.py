"""Passes of a sparse network by its own graphs, for what calls and differentiates it as a torch module.

Attack libraries ask a module for logits and for gradients with respect to images. Of a network of which one
weight in a hundred is there, PyTorch multiplies by all of them; the graphs skip what is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import torch
from edge_bcs.runtime.engine import available_threads
from edge_bcs.runtime.sessions import session_options
from edge_bcs.targets.cost_model import lanes_of
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.sparse_model import SparseModel

from .autodiff import Tape
from .forward import Branch, Lowering
from .graphs import empty_graph, evaluation_graph, lists_graph
from .layers import Input
from .memory.replay import tensor_types
from .network import Network, network_of
from .nodes import Graph, TensorType
from .operators.images import UnpackOutput

Array = np.ndarray[Any, Any]
Values = dict[str, onnxruntime.OrtValue]
IMAGES_AT_ONCE = 32
"""Of a run of a graph: two blocks of 16 lanes."""


class Passes:
    """Logits of a network with running statistics, and gradients of images, by its graphs on the CPU.

    The weights are those that the network has now. Calls of several threads are not for it.
    """

    def __init__(
        self, sparse: SparseModel, input_shape: tuple[int, int, int], threads: int | None = None
    ) -> None:
        """Compile ``sparse`` for images (C, H, W), to be computed by so many threads; default: all cores.

        Raises:
            EdgeBcsError: the network holds something that is not supported.
        """
        network = network_of(sparse, input_shape)
        self._shape, self._classes = network.input_shape, network.num_classes
        self._scale = _scale(network)
        self._threads = threads or available_threads()
        state = sparse.state()
        given = {"coo.index": state["coo.index"], "coo.lists": np.zeros(network.lists_length, np.int32)}
        self._read = {**state, "coo.lists": self._session(lists_graph(network)).run(None, given)[0]}
        self._logits = self._session(evaluation_graph(network, IMAGES_AT_ONCE))
        forward, backward = jacobian_graphs(network, IMAGES_AT_ONCE)
        self._forward, self._backward = self._session(forward), self._session(backward)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W] in [0, 1], differentiable once."""
        logits: Tensor = _Logits.apply(x, self)  # type: ignore[no-untyped-call]
        return logits

    def forward(self, x: Array, kept: list[Values] | None = None) -> Array:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W].

        ``kept`` gets what `backward` needs, by micro-batch; None: nothing is needed.
        """
        logits = np.empty((len(x), self._classes), np.float32)
        for first in range(0, len(x), IMAGES_AT_ONCE):
            part = x[first : first + IMAGES_AT_ONCE]
            found = self._run(self._logits if kept is None else self._forward, {"input": _whole(part)})
            logits[first : first + len(part)] = found.pop("logits").numpy()[: len(part)]
            if kept is not None:
                kept.append(found)
        return logits

    def backward(self, seed: Array, kept: list[Values]) -> Array:
        """Return Vᵀ·J f32 [n, C, H, W] for V = ``seed`` f32 [n, K], of the images of a `forward`."""
        lanes = lanes_of(IMAGES_AT_ONCE)
        gradient = np.empty((len(seed), *self._shape), np.float32)
        for number, values in enumerate(kept):
            part = seed[number * IMAGES_AT_ONCE : (number + 1) * IMAGES_AT_ONCE]
            stack = _whole(part).reshape(-1, lanes, self._classes).transpose(0, 2, 1)
            found = self._run(self._backward, {"seed": np.ascontiguousarray(stack)}, values)
            (blocks,) = (value.numpy() for value in found.values())
            images = blocks.transpose(0, 2, 1).reshape(-1, *self._shape)
            gradient[number * IMAGES_AT_ONCE :][: len(part)] = images[: len(part)]
        gradient *= self._scale
        return gradient

    def _session(self, graph: Graph) -> onnxruntime.InferenceSession:
        content = graph.to_onnx().SerializeToString()
        options = session_options(self._threads)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def _run(
        self, session: onnxruntime.InferenceSession, given: dict[str, Array], kept: Values | None = None
    ) -> Values:
        kept = kept or {}
        arrays = {**self._read, **given}
        read = {
            item.name: kept[item.name]
            if item.name in kept
            else onnxruntime.OrtValue.ortvalue_from_numpy(arrays[item.name])
            for item in session.get_inputs()
        }
        outputs = [item.name for item in session.get_outputs()]
        return dict(zip(outputs, session.run_with_ort_values(outputs, read), strict=True))


def jacobian_graphs(network: Network, micro_batch: int) -> tuple[Graph, Graph]:
    """The logits of a micro-batch with running statistics, and Vᵀ·J: the gradient of its images for one of
    the logits.

    The first has the input ``input`` and the output ``logits``. The second has the input ``seed``, a stack
    [NB, K, B] of the gradient of the logits, and one output, a stack of images without halo, before the
    factor of a normalisation. What it needs besides are further outputs of the first.
    """
    lanes = lanes_of(micro_batch)
    read = ("input", *network.attack.parameters)
    graph = empty_graph("jacobian_model", network, read, ["logits"], micro_batch)
    branch = Branch(Lowering(graph, network, network.attack, lanes), "input")
    UnpackOutput.emit(graph, {"stack": branch.logits}, {"y": "logits"}, {"lanes": lanes})
    graph.inputs["seed"] = TensorType("f32", (micro_batch // lanes, network.num_classes, lanes))
    length = len(graph.nodes)
    gradient = Tape(branch, "seed").image_gradient
    graph.halos.zero(gradient)
    graph.resolve()

    types = tensor_types(graph)
    forward, backward = graph.nodes[:length], graph.nodes[length:]
    made = {name for node in forward for name in node.outputs if name}
    needed = {name: types[name] for node in backward for name in node.inputs if name in made}
    inputs = {name: kind for name, kind in graph.inputs.items() if name != "seed"}
    kept = {"seed": types["seed"], **inputs, **needed}
    used = {name for node in backward for name in node.inputs}
    return (
        Graph("logits_model", inputs, {**graph.outputs, **needed}, forward),
        Graph(
            "jacobian_model",
            {name: kind for name, kind in kept.items() if name in used},
            {gradient: types[gradient]},
            backward,
        ),
    )


def _scale(network: Network) -> Array:
    """The factor of a normalisation of pixels, f32 [C, 1, 1] or 1."""
    scales = [layer.scale for layer in network.graph.layers if isinstance(layer, Input) and layer.scale]
    return np.array(scales[0], np.float32)[:, None, None] if scales else np.ones(1, np.float32)


def _whole(part: Array) -> Array:
    """A micro-batch: what is missing is 0."""
    if len(part) == IMAGES_AT_ONCE:
        return np.ascontiguousarray(part)
    whole = np.zeros((IMAGES_AT_ONCE, *part.shape[1:]), np.float32)
    whole[: len(part)] = part
    return whole


class _Logits(torch.autograd.Function):
    """The logits of images, and backwards the gradient of the images."""

    @staticmethod
    def forward(context: Any, x: Tensor, passes: Passes) -> Tensor:
        """Return the logits f32 [n, K]."""
        context.passes, context.kept = passes, [] if context.needs_input_grad[0] else None
        return torch.from_numpy(passes.forward(x.detach().numpy(), context.kept))

    @staticmethod
    def backward(context: Any, *seeds: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the images."""
        return torch.from_numpy(context.passes.backward(seeds[0].numpy(), context.kept)), None


@contextlib.contextmanager
def by_graphs(
    sparse: SparseModel, input_shape: tuple[int, int, int], threads: int | None = None
) -> Iterator[None]:
    """Let the graphs of ``sparse`` compute it, in evaluation mode, as long as the context lasts.

    Its weights may not change meanwhile.

    Raises:
        EdgeBcsError: the network lies on another device than the CPU, or holds something that is not
            supported.
    """
    if sparse.index.device.type != "cpu":
        raise EdgeBcsError("the graphs run on the CPU, and the network lies on another device.")
    sparse.passes = Passes(sparse, input_shape, threads)
    try:
        yield
    finally:
        sparse.passes = None
