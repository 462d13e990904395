"""Everything about a network that its graphs depend on: layers, numbering, kernels, what is fused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any

from edge_bcs.runtime.buffers import bound_buffers
from edge_bcs.targets import cost_model

from edge_bcs.core.part import ALL, Part, Trained, merged
from edge_bcs.core.segments import Segment
from edge_bcs.method.sparse_model import SparseModel

from .frontends.torch import capture
from .fusion import FusedLayer, Slot, fuse
from .layers import BatchNorm, Convolution, Input, LayerGraph
from .nodes import TensorType
from .operators.base import Learned
from .operators.lists import LAYER_INTEGERS
from .trained import parameters, trained_of

_SHORT = {"float32": "f32", "int32": "i32", "int64": "i64", "bool": "bool"}


@dataclass(frozen=True)
class Kernel(Segment):
    """The weights of one layer: their place among all N prunable ones, row-major [out, in, kh, kw].

    Attributes:
        layer: what multiplies by them.
        connections: how many of the weights were active when the network was captured; the estimate of the
            layer's arithmetic comes from these.
        algorithm: "sparse", where the connections are visited, or "dense", where all weights are.
    """

    layer: Convolution
    connections: int
    algorithm: str

    @property
    def inputs(self) -> int:
        """Channels that the layer reads, of all groups."""
        return self.size * self.layer.groups // (self.shape[0] * prod(self.layer.kernel))

    @property
    def geometry(self) -> list[int]:
        """`LAYER_INTEGERS` integers of the attribute of BuildLists."""
        at = self.layer
        geometry = [*at.kernel, *at.strides, *at.pads, *at.dilations, at.groups]
        return [self.offset, self.shape[0], self.inputs, *geometry]

    def described(self) -> dict[str, Any]:
        """The layer's row in the manifest."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "offset": self.offset,
            "kernel": list(self.layer.kernel),
            "strides": list(self.layer.strides),
            "pads": list(self.layer.pads),
            "dilations": list(self.layer.dilations),
            "groups": self.layer.groups,
            "density": self.connections / self.size,
            "algorithm": self.algorithm,
        }


@dataclass(frozen=True)
class Pass:
    """The network as it is computed: operators in order, and the scale and shift that they share.

    Attributes:
        layers: the forward operators. entries: six integers a slot, the attribute of FoldAffine.
        learned: what is trained. epsilon: of the batch norms.
        gradients: three integers a slot, the attribute of FoldAffineGrad; empty where all is trained.
        lists: of the kernels.
    """

    layers: list[FusedLayer]
    entries: list[int]
    learned: Learned
    epsilon: float
    gradients: list[int]
    lists: Lists

    @property
    def parameters(self) -> tuple[str, ...]:
        """The buffers that it reads besides its images."""
        return ("coo.value", "dense.value", "batchnorm.mean", "batchnorm.variance", self.lists.buffer)


@dataclass(frozen=True)
class Lists:
    """Where the lists of the kernels lie: the columns of all connections, the rows and the places of those of
    the kernels that have transpose lists, the pointers of all kernels to the connections of each output, then
    those of the former to each input's.

    Attributes:
        kernels: all of the network.
        pointers: kernel → where its pointers begin, those of the transpose lists −1 if it has none.
        transposed: connections of the kernels that have transpose lists.
        length: of all lists.
        made: whether each run of a graph makes them, in memory of their own; else they are kept.
    """

    kernels: Mapping[str, Kernel]
    pointers: Mapping[str, tuple[int, int]]
    transposed: int
    length: int
    made: bool = False

    @classmethod
    def of(cls, kernels: Mapping[str, Kernel], having: Collection[str]) -> Lists:
        """The lists of ``kernels``, of which those named ``having`` have transpose lists."""
        transposed = sum(kernels[name].connections for name in having)
        forward = sum(kernel.connections for kernel in kernels.values()) + 2 * transposed
        backwards = forward + sum(kernel.shape[0] + 1 for kernel in kernels.values())
        pointers: dict[str, tuple[int, int]] = {}
        for name, kernel in kernels.items():
            pointers[name] = forward, backwards if name in having else -1
            forward += kernel.shape[0] + 1
            backwards += kernel.inputs * kernel.layer.window.phases + 1 if name in having else 0
        return cls(kernels, pointers, transposed, backwards)

    @property
    def partial(self) -> bool:
        """Whether a kernel has no transpose lists."""
        return any(backwards < 0 for _, backwards in self.pointers.values())

    @property
    def buffer(self) -> str:
        """The bound buffer that a graph reads for them."""
        return "coo.index" if self.made else "coo.lists"

    @property
    def tensor(self) -> str:
        """The tensor in which operators find them."""
        return "lists" if self.made else "coo.lists"

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of BuildLists and MakeLists."""
        return {
            "layers": list(chain.from_iterable(kernel.geometry for kernel in self.kernels.values())),
            "layer_integers": LAYER_INTEGERS,
            "transposed": [int(backwards >= 0) for _, backwards in self.pointers.values()]
            if self.partial
            else [],
        }


@dataclass
class Network:
    """Everything about a network that the graphs depend on.

    Attributes:
        graph: its layers.
        kappa: κ, the number of connections.
        kernels: module name → weights that are prunable, in the order in which they are numbered.
        dense: parameter name (``module.weight`` of batch norms, ``module.bias``) → its place in
            ``dense.value``.
        statistics: batch-norm module name → its place in ``batchnorm.mean`` and ``batchnorm.variance``.
        batch_statistics: whether training normalises by the micro-batch, in the batch norms that are trained.
        part: what is trained, as the user names it. trained: what that is of this network.
        attacked: whether a training attacks it, so that gradients go through all of it.
        evaluation, attack, training: the passes with running statistics, with lists through which a gradient
            reaches the image, and with the statistics that training uses.

    Raises:
        EdgeBcsError: it has no such part, or no batch norm that is trained for batch statistics to be of.
    """

    graph: LayerGraph
    kappa: int
    kernels: Mapping[str, Kernel]
    dense: Mapping[str, Segment]
    statistics: Mapping[str, Segment]
    batch_statistics: bool = False
    part: Part = ALL
    attacked: bool = True
    trained: Trained = field(init=False)
    evaluation: Pass = field(init=False)
    attack: Pass = field(init=False)
    training: Pass = field(init=False)

    def __post_init__(self) -> None:
        counts = {name: kernel.connections for name, kernel in self.kernels.items()}
        self.trained = trained_of(self.part, self.graph, self.kernels, self.dense, counts)
        norms = [layer.module for layer in self.graph.layers if isinstance(layer, BatchNorm)]
        batch: frozenset[str] = self.trained.batch_norms(norms) if self.batch_statistics else frozenset()
        # Where norms alone are trained, folding them into convolutions would make these keep what they read.
        apart: frozenset[str] = self.trained.norms(norms) if self.part.text == "norm" else frozenset()
        self.evaluation = self._pass(frozenset(), frozenset())
        self.training = self._pass(batch, apart) if batch or apart else self.evaluation
        whole = replace(Lists.of(self.kernels, self.kernels), made=self.attack_apart)
        self.attack = replace(self.evaluation, lists=whole)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.graph.layers[0].geometry

    @property
    def num_classes(self) -> int:
        """K, the length of the logits."""
        return self.graph.num_classes

    @property
    def fewest_images(self) -> int:
        """Of a micro-batch: statistics need two."""
        return 2 if self.batch_statistics else 1

    @property
    def keeps_both(self) -> bool:
        """Whether the two branches of an objective are kept, if memory is no matter: statistics of a batch
        must not move twice, and where a part is trained little is kept, less than is worth a pass."""
        return self.batch_statistics or not self.part.everything

    @property
    def size(self) -> int:
        """N, the number of prunable weights."""
        return sum(kernel.size for kernel in self.kernels.values())

    @property
    def dense_size(self) -> int:
        """D, the number of all other trainable parameters."""
        return sum(segment.size for segment in self.dense.values())

    @property
    def statistics_size(self) -> int:
        """Channels of all batch norms."""
        return sum(segment.size for segment in self.statistics.values())

    @property
    def moving(self) -> tuple[str, ...]:
        """Of the connections and of the other parameters those of which any are trained, by their buffers."""
        if self.part.everything:
            return "coo.value", "dense.value"
        counts = {"coo.value": self.trained.kappa, "dense.value": self.trained.dense_size}
        return tuple(name for name, count in counts.items() if count)

    @property
    def attack_apart(self) -> bool:
        """Whether the attack, by which such a network is only evaluated, has lists of its own: those that are
        kept are the ones that training reads."""
        return not (self.attacked or self.part.everything)

    @cached_property
    def lists(self) -> Lists:
        """Where the lists of the kernels lie in ``coo.lists``."""
        if not self.attack_apart:
            return Lists.of(self.kernels, self.kernels)
        # A gradient goes through no layer before the first that is trained. From there on all have transpose
        # lists: connections may move from any of those that are trained to any other.
        names = {segment.name for segment in self.trained.dense}
        names |= {f"{kernel.name}.weight" for kernel in self.trained.kernels}
        first = next(i for i, layer in enumerate(self.graph.layers) if names.intersection(parameters(layer)))
        after = {layer.module for layer in self.graph.layers[first:] if isinstance(layer, Convolution)}
        return Lists.of(self.kernels, [name for name in self.kernels if name in after])

    @property
    def lists_length(self) -> int:
        """M, elements of ``coo.lists``."""
        return self.lists.length

    @cached_property
    def skips(self) -> Mapping[str, int]:
        """Trained kernel → connections before it that are not trained: so many places before the connection
        itself its gradient and its momentum lie."""
        found, skipped = {}, 0
        trained = {kernel.name for kernel in self.trained.kernels}
        for name, kernel in self.kernels.items():
            if name in trained:
                found[name] = skipped
            else:
                skipped += kernel.connections
        return found

    @property
    def spans(self) -> list[int]:
        """Three integers for each run of trained kernels, the attribute of RewireStep: where its positions
        begin and end, and the connections before it that are not trained; none where all are trained."""
        if self.part.everything:
            return []
        skip = {kernel.offset: self.skips[kernel.name] for kernel in self.trained.kernels}
        return [number for begin, end in merged(self.trained.kernels) for number in (begin, end, skip[begin])]

    @property
    def dense_spans(self) -> list[int]:
        """Two integers for each run of trained parameters, the attribute of DenseStep: where it begins in
        ``dense.value``, and its length; none where all are trained."""
        if self.part.everything:
            return []
        return [number for begin, end in merged(self.trained.dense) for number in (begin, end - begin)]

    @cached_property
    def connections(self) -> Mapping[int, int]:
        """First number of a layer, by which nodes know it → its connections when it was captured."""
        return {kernel.offset: kernel.connections for kernel in self.kernels.values()}

    def offsets(self, modules: Collection[str]) -> set[int]:
        """First numbers of the kernels of ``modules``, by which nodes know them."""
        return {self.kernels[module].offset for module in modules}

    def buffers(self, micro_batch: int = 1, two_branches: bool = False) -> dict[str, TensorType]:
        """Type of every buffer that the runtime binds to the graphs, see ``edge_bcs.runtime.buffers``."""
        buffers = bound_buffers(self, micro_batch, two_branches)
        return {name: TensorType(_SHORT[dtype], shape) for name, (dtype, shape) in buffers.items()}

    def _pass(self, batch: frozenset[str], apart: frozenset[str]) -> Pass:
        layers = fuse(self.graph, batch, apart)
        places = {name: parameter.offset for name, parameter in self.dense.items()}
        entries: list[int] = []
        gradients: list[int] = []
        shifts: set[int] = set()
        scales: set[int] = set()
        for fused in layers:
            if fused.slot is not None:
                entries += self._entry(fused.slot)
                wanted = self._offsets(fused.slot, self.trained.places)
                gradients += wanted
                if any(offset >= 0 for offset in wanted):
                    shifts.add(fused.affine)
                if wanted[1] >= 0:
                    scales.add(fused.affine)
        learned = Learned(
            frozenset(shifts),
            frozenset(scales),
            frozenset(kernel.offset for kernel in self.trained.kernels),
            frozenset(places[parameter.name] for parameter in self.trained.dense),
        )
        gradients = [] if self.part.everything else gradients
        return Pass(layers, entries, learned, self.graph.epsilon, gradients, self.lists)

    def _entry(self, slot: Slot) -> list[int]:
        """The six integers that describe ``slot`` to FoldAffine."""
        running = self.statistics.get(slot.norm) if slot.norm else None
        statistics = running.offset if running else -1
        places = {name: parameter.offset for name, parameter in self.dense.items()}
        return [slot.kind, slot.channels, *self._offsets(slot, places), statistics]

    @staticmethod
    def _offsets(slot: Slot, places: Mapping[str, int]) -> list[int]:
        """Where the bias, the scale and the shift of ``slot`` are among ``places``, −1 for what is not."""

        def offset(module: str | None, key: str) -> int:
            return places.get(f"{module}.{key}", -1) if module else -1

        gamma = offset(slot.norm, "weight") if slot.scale is None else places.get(slot.scale, -1)
        return [offset(slot.bias, "bias"), gamma, offset(slot.norm, "bias")]


def captured(sparse: SparseModel, input_shape: tuple[int, int, int]) -> LayerGraph:
    """The layers of ``sparse`` on images of ``input_shape`` = (C, H, W); the first one normalises pixels.

    Raises:
        EdgeBcsError: the network holds something that is not supported; the message names it.
    """
    graph = capture(sparse.network, input_shape)
    sparse.ending = graph.ending
    if sparse.normalize is not None:
        # What the network does to its pixels itself comes after it.
        mean, std = sparse.normalize.of_channels(input_shape[0])
        graph.layers = [
            layer.after(mean, std) if isinstance(layer, Input) else layer for layer in graph.layers
        ]
    return graph


def network_of(
    sparse: SparseModel,
    input_shape: tuple[int, int, int],
    batch_statistics: bool = False,
    part: Part = ALL,
    attacked: bool = True,
) -> Network:
    """Capture ``sparse``, number its parameters and choose each layer's kernel from its present density.

    Raises:
        EdgeBcsError: the network holds something that is not supported, which the message names, or has not
            the part that is to be trained.
    """
    graph = captured(sparse, input_shape)
    dense = sparse.dense_kernels
    graph.layers = [
        replace(layer, weights="dense") if isinstance(layer, Convolution) and layer.module in dense else layer
        for layer in graph.layers
    ]
    kernels = _numbered(graph, sparse)
    return Network(
        graph,
        sparse.kappa,
        kernels,
        {segment.name: segment for segment in sparse.dense},
        {segment.name: segment for segment in sparse.statistics},
        batch_statistics,
        part,
        attacked,
    )


def _unread(segment: Segment) -> Convolution:
    """The layer of a kernel that does not reach the logits, and so is none of the graph's."""
    linear = len(segment.shape) == 2
    return Convolution(
        segment.name, (), (), segment.name, (1, 1) if linear else (segment.shape[2], segment.shape[3])
    )


def _numbered(graph: LayerGraph, sparse: SparseModel) -> dict[str, Kernel]:
    """The kernels, in the order of their numbers."""
    convolutions = {layer.module: layer for layer in graph.layers if isinstance(layer, Convolution)}
    connections = sparse.layer_counts()
    kernels: dict[str, Kernel] = {}
    for segment in sparse.layers:
        layer = convolutions.get(segment.name) or _unread(segment)
        kernel = Kernel(
            segment.name,
            segment.shape,
            segment.offset,
            layer,
            connections[segment.name],
            cost_model.algorithm(connections[segment.name] / segment.size),
        )
        kernels[segment.name] = kernel
    return kernels
