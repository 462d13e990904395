"""Passes of a sparse network by its own graphs, for what calls and differentiates it as a torch module.

Attack libraries ask a module for logits and for gradients with respect to images. Of a network of which one
weight in a hundred is there, PyTorch multiplies by all of them; the graphs skip what is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
_SIZES = (32, 16)
"""Images of a run of a graph; the last ones take the smallest that holds them."""


@dataclass(frozen=True)
class _Sessions:
    """The graphs for so many images at once: logits alone, logits with what backwards needs, backwards."""

    size: int
    logits: onnxruntime.InferenceSession
    forward: onnxruntime.InferenceSession
    backward: onnxruntime.InferenceSession
    halo: int


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
        arrays = {**state, "coo.lists": np.zeros(network.lists_length, np.int32)}
        self._read = {name: _value(array) for name, array in arrays.items()}
        lists = _run(self._session(lists_graph(network)), self._read)
        self._read["coo.lists"] = lists["coo.lists.out"]
        self._sessions = [self._sessions_for(network, size) for size in _SIZES]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W] in [0, 1], differentiable once.

        Raises:
            EdgeBcsError: images of another shape or type.
        """
        if tuple(x.shape[1:]) != self._shape or x.dtype != torch.float32:
            raise EdgeBcsError(
                f"the network takes images f32 [n, {', '.join(map(str, self._shape))}], not "
                f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            )
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.from_numpy(self.forward(x.detach().numpy()))
        logits: Tensor = _Logits.apply(x, self)  # type: ignore[no-untyped-call]
        return logits

    def forward(self, x: Array, kept: list[Values] | None = None) -> Array:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W].

        ``kept`` gets what `backward` needs, by micro-batch; None: nothing is needed.
        """
        logits = np.empty((len(x), self._classes), np.float32)
        for first, sessions in self._parts(len(x)):
            part = x[first : first + sessions.size]
            given = {**self._read, "input": _value(_whole(part, sessions.size))}
            found = _run(sessions.logits if kept is None else sessions.forward, given)
            logits[first : first + len(part)] = found.pop("logits").numpy()[: len(part)]
            if kept is not None:
                kept.append(found)
        return logits

    def backward(self, seed: Array, kept: list[Values]) -> Array:
        """Return Vᵀ·J f32 [n, C, H, W] for V = ``seed`` f32 [n, K], of the images of a `forward`."""
        gradient = np.empty((len(seed), *self._shape), np.float32)
        for (first, sessions), values in zip(self._parts(len(seed)), kept, strict=True):
            part = seed[first : first + sessions.size]
            stack = _whole(part, sessions.size).reshape(-1, lanes_of(sessions.size), self._classes)
            given = {**self._read, **values, "seed": _value(np.ascontiguousarray(stack.transpose(0, 2, 1)))}
            (blocks,) = _run(sessions.backward, given).values()
            gradient[first : first + len(part)] = unstacked(blocks.numpy(), self._shape, sessions.halo)[
                : len(part)
            ]
        gradient *= self._scale
        return gradient

    def _parts(self, count: int) -> Iterator[tuple[int, _Sessions]]:
        """Where each micro-batch of ``count`` images begins, and what computes it."""
        first = 0
        while first < count:
            fitting = [one for one in self._sessions if one.size >= count - first]
            sessions = fitting[-1] if fitting else self._sessions[0]
            yield first, sessions
            first += sessions.size

    def _sessions_for(self, network: Network, size: int) -> _Sessions:
        forward, backward, halo = jacobian_graphs(network, size)
        logits = self._session(evaluation_graph(network, size))
        return _Sessions(size, logits, self._session(forward), self._session(backward), halo)

    def _session(self, graph: Graph) -> onnxruntime.InferenceSession:
        options = session_options(self._threads, apart=True)
        content = graph.to_onnx().SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def jacobian_graphs(network: Network, micro_batch: int) -> tuple[Graph, Graph, int]:
    """The logits of a micro-batch with running statistics, and Vᵀ·J: the gradient of its images for one of
    the logits.

    The first has the input ``input`` and the output ``logits``. The second has the input ``seed``, a stack
    [NB, K, B] of the gradient of the logits, and one output, a stack of images before the factor of a
    normalisation, with the halo that comes third. What it needs besides are further outputs of the first.
    """
    lanes = lanes_of(micro_batch)
    read = ("input", *network.attack.parameters)
    graph = empty_graph("jacobian_model", network, read, ["logits"], micro_batch)
    branch = Branch(Lowering(graph, network, network.attack, lanes), "input")
    UnpackOutput.emit(graph, {"stack": branch.logits}, {"y": "logits"}, {"lanes": lanes})
    graph.inputs["seed"] = TensorType("f32", (micro_batch // lanes, network.num_classes, lanes))
    length = len(graph.nodes)
    gradient = Tape(branch, "seed").image_gradient
    graph.resolve()

    types = tensor_types(graph)
    forward, backward = graph.nodes[:length], graph.nodes[length:]
    made = {name for node in forward for name in node.outputs if name}
    used = {name for node in backward for name in node.inputs}
    kept = {name: types[name] for name in types if name in made & used}
    inputs = {name: kind for name, kind in graph.inputs.items() if name != "seed"}
    read_backwards = {name: types[name] for name in (*graph.inputs, *kept) if name in used}
    return (
        Graph("logits_model", inputs, {**graph.outputs, **kept}, forward),
        Graph("jacobian_model", read_backwards, {gradient: types[gradient]}, backward),
        graph.halos.solve(gradient),
    )


def unstacked(stack: Array, shape: tuple[int, int, int], halo: int) -> Array:
    """Images [n, C, H, W] of the ``shape`` (C, H, W) out of a stack [NB, pixels, B] with a halo."""
    channels, height, width = shape
    rows, columns = height + halo, width + halo
    planes = stack[:, stack.shape[1] - channels * rows * columns :]
    planes = planes.reshape(len(stack), channels, rows, columns, -1)[:, :, :height, :width]
    return planes.transpose(0, 4, 1, 2, 3).reshape(-1, *shape)


def _run(session: onnxruntime.InferenceSession, given: Mapping[str, onnxruntime.OrtValue]) -> Values:
    """The outputs of a graph that reads some of what is given."""
    read = {item.name: given[item.name] for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, read), strict=True))


def _value(array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _scale(network: Network) -> Array:
    """The factor of a normalisation of pixels, f32 [C, 1, 1] or 1."""
    scales = [layer.scale for layer in network.graph.layers if isinstance(layer, Input) and layer.scale]
    return np.array(scales[0], np.float32)[:, None, None] if scales else np.ones(1, np.float32)


def _whole(part: Array, size: int) -> Array:
    """A micro-batch of that size: what is missing is 0."""
    if len(part) == size:
        return np.ascontiguousarray(part)
    whole = np.zeros((size, *part.shape[1:]), np.float32)
    whole[: len(part)] = part
    return whole


class _Logits(torch.autograd.Function):
    """The logits of images, and backwards the gradient of the images."""

    @staticmethod
    def forward(context: Any, x: Tensor, passes: Passes) -> Tensor:
        """Return the logits f32 [n, K]."""
        context.passes, context.kept = passes, []
        return torch.from_numpy(passes.forward(x.detach().numpy(), context.kept))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *seeds: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the images."""
        return torch.from_numpy(context.passes.backward(seeds[0].numpy(), context.kept)), None


@contextlib.contextmanager
def by_graphs(
    sparse: SparseModel, input_shape: tuple[int, int, int], threads: int | None = None
) -> Iterator[None]:
    """Let the graphs of ``sparse`` compute it, in evaluation mode, as long as the context lasts.

    Its weights may not change meanwhile, and it can be neither copied nor stored.

    Raises:
        EdgeBcsError: the network lies on another device than the CPU, or holds something that is not
            supported.
    """
    if sparse.index.device.type != "cpu":
        raise EdgeBcsError("the graphs run on the CPU, and the network lies on another device.")
    before, sparse.passes = sparse.passes, Passes(sparse, input_shape, threads)
    try:
        yield
    finally:
        sparse.passes = before
