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

from .graphs import evaluation_graph, jacobian_graph, lists_graph
from .layers import Input
from .network import Network, network_of
from .nodes import Graph

Array = np.ndarray[Any, Any]
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
        self._gradients = self._session(jacobian_graph(network, IMAGES_AT_ONCE))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W] in [0, 1], differentiable once."""
        logits: Tensor = _Logits.apply(x, self)  # type: ignore[no-untyped-call]
        return logits

    def logits(self, x: Array) -> Array:
        """Return the logits f32 [n, K] of images f32 [n, C, H, W]."""
        found = np.empty((len(x), self._classes), np.float32)
        for first in range(0, len(x), IMAGES_AT_ONCE):
            part = x[first : first + IMAGES_AT_ONCE]
            found[first : first + len(part)] = self._run(self._logits, input=_whole(part))[: len(part)]
        return found

    def gradients(self, x: Array, seed: Array) -> Array:
        """Return Vᵀ·J f32 [n, C, H, W] of images f32 [n, C, H, W] for V = ``seed`` f32 [n, K]."""
        found = np.empty_like(x)
        lanes = lanes_of(IMAGES_AT_ONCE)
        for first in range(0, len(x), IMAGES_AT_ONCE):
            part = x[first : first + IMAGES_AT_ONCE]
            stack = _whole(seed[first : first + IMAGES_AT_ONCE]).reshape(-1, lanes, self._classes)
            seeds = np.ascontiguousarray(stack.transpose(0, 2, 1))
            blocks = self._run(self._gradients, input=_whole(part), seed=seeds)
            images = blocks.transpose(0, 2, 1).reshape(-1, *self._shape)
            found[first : first + len(part)] = images[: len(part)]
        found *= self._scale
        return found

    def _session(self, graph: Graph) -> onnxruntime.InferenceSession:
        content = graph.to_onnx().SerializeToString()
        options = session_options(self._threads)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def _run(self, session: onnxruntime.InferenceSession, **given: Array) -> Array:
        read = {item.name: given.get(item.name, self._read.get(item.name)) for item in session.get_inputs()}
        found: Array = session.run(None, read)[0]
        return found


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
        context.save_for_backward(x)
        context.passes = passes
        return torch.from_numpy(passes.logits(x.detach().numpy()))

    @staticmethod
    def backward(context: Any, *seeds: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the images."""
        (x,) = context.saved_tensors
        return torch.from_numpy(context.passes.gradients(x.detach().numpy(), seeds[0].numpy())), None


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
