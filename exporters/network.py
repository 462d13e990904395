"""Everything about a network that its graphs depend on: layers, numbering, connections, kernels, lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_bcs.targets import cost_model

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.sparse_model import SparseModel

from .frontends.torch import capture
from .fusion import FusedLayer, Slot, fuse
from .layers import Convolution, LayerGraph
from .layout import Layout, layout_of


@dataclass(frozen=True)
class ListsLayout:
    """Where the pointers of each layer lie in ``coo.lists``.

    Attributes:
        length: M, elements of ``coo.lists``.
        forward, transpose: module name → offset of the layer's pointers.
        layers: seven integers a layer (offset, O, I, kh, kw, stride, padding), the attribute of BuildLists.
    """

    length: int
    forward: dict[str, int]
    transpose: dict[str, int]
    layers: list[int]


@dataclass(frozen=True)
class Pass:
    """The network as it is computed: operators in order, and the scale and shift that they share.

    Attributes:
        layers: the forward operators. entries: six integers a slot, the attribute of FoldAffine.
        offsets: operator → first channel of its slot. learned: those of slots with parameters.
        epsilon: of the batch norms.
    """

    layers: list[FusedLayer]
    entries: list[int]
    offsets: Mapping[str, int]
    learned: frozenset[int]
    epsilon: float


@dataclass
class Network:
    """Everything about a network that the graphs depend on.

    Attributes:
        graph: its layers.
        layout: the numbering of its parameters.
        kappa: κ, the number of connections.
        algorithms: module name of a prunable layer → "sparse" or "dense".
        batch_statistics: whether training normalises by the micro-batch.
        connections: first number of a prunable layer → its connections when it was captured; the estimate of
            its arithmetic comes from these.
        evaluation, training: the passes with running statistics, and with those that training uses.
    """

    graph: LayerGraph
    layout: Layout
    kappa: int
    algorithms: Mapping[str, str]
    batch_statistics: bool = False
    connections: Mapping[int, int] = field(default_factory=dict)
    lists: ListsLayout = field(init=False)
    evaluation: Pass = field(init=False)
    training: Pass = field(init=False)

    def __post_init__(self) -> None:
        self.lists = _lists_layout(self)
        epsilon = self.graph.epsilon
        self.evaluation = self._pass(epsilon, batch_statistics=False)
        self.training = self._pass(epsilon, True) if self.batch_statistics else self.evaluation

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return self.graph.layers[0].geometry

    @property
    def classes(self) -> int:
        """K, the length of the logits."""
        return self.graph.num_classes

    def _pass(self, epsilon: float, batch_statistics: bool) -> Pass:
        layers = fuse(self.graph, batch_statistics)
        entries: list[int] = []
        offsets: dict[str, int] = {}
        learned: set[int] = set()
        position = 0
        for layer in layers:
            if layer.slot is None:
                continue
            offsets[layer.name] = position
            entry = self._entry(layer.slot)
            if any(offset >= 0 for offset in entry[2:5]):
                learned.add(position)
            entries += entry
            position += layer.slot.channels
        return Pass(layers, entries, offsets, frozenset(learned), epsilon)

    def _entry(self, slot: Slot) -> list[int]:
        """The six integers that describe ``slot`` to FoldAffine."""

        def offset(module: str | None, key: str) -> int:
            segment = self.layout.dense.get(f"{module}.{key}") if module else None
            return segment.offset if segment else -1

        statistics = self.layout.statistics[slot.norm].offset if slot.norm else -1
        gamma, beta = offset(slot.norm, "weight"), offset(slot.norm, "bias")
        return [slot.kind, slot.channels, offset(slot.bias, "bias"), gamma, beta, statistics]


def _lists_layout(network: Network) -> ListsLayout:
    convolutions = {layer.module: layer for layer in network.graph.layers if isinstance(layer, Convolution)}
    position = 3 * network.kappa
    forward: dict[str, int] = {}
    transpose: dict[str, int] = {}
    layers: list[int] = []
    for name, segment in network.layout.prunable.items():
        forward[name] = position
        position += segment.shape[0] + 1
    for name, segment in network.layout.prunable.items():
        convolution = convolutions.get(name)
        kernel = convolution.kernel if convolution else (1, 1)
        stride, padding = (convolution.stride, convolution.padding) if convolution else (1, 0)
        out_channels = segment.shape[0]
        in_channels = segment.size // (out_channels * kernel[0] * kernel[1])
        transpose[name] = position
        position += in_channels * stride * stride + 1
        layers += [segment.offset, out_channels, in_channels, *kernel, stride, padding]
    return ListsLayout(position, forward, transpose, layers)


def network_of(
    sparse: SparseModel, input_shape: tuple[int, int, int], batch_statistics: bool = False
) -> Network:
    """Capture ``sparse`` and choose each layer's kernel from its present density.

    Raises:
        EdgeBcsError: the network holds something that is not supported; the message names it.
    """
    layout = layout_of(sparse)
    counts = sparse.layer_counts()
    algorithms = {
        name: cost_model.algorithm(counts[name] / segment.size) for name, segment in layout.prunable.items()
    }
    connections = {segment.offset: counts[name] for name, segment in layout.prunable.items()}
    graph = capture(sparse.network, input_shape)
    if sparse.dense_kernels:
        raise EdgeBcsError(
            f"the kernel of '{sparse.dense_kernels[0]}' stays dense, and export takes networks whose kernels "
            "are all sparse"
        )
    return Network(graph, layout, sparse.kappa, algorithms, batch_statistics, connections)
