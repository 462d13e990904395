"""Forward nodes of one pass of the network, and the folded scale and shift that all passes share."""

from __future__ import annotations

from .fusion import FusedLayer
from .layers import AveragePool, BatchNorm, Convolution, MaxPool
from .network import Network
from .nodes import Graph, HaloOf, Node


class Branch:
    """One pass of the network over one batch of images; ``nodes`` are its forward nodes, ``logits`` their
    result.

    ``prefix`` makes the tensor names of several passes different. ``statistics`` are the current tensors of
    (running mean, running variance); a pass with batch statistics replaces them by its own.
    """

    def __init__(
        self,
        graph: Graph,
        network: Network,
        layers: list[FusedLayer],
        lanes: int,
        image: str,
        affine: FoldedAffine,
        prefix: str = "",
        statistics: list[str] | None = None,
        update: bool = True,
    ) -> None:
        self.graph, self.network, self.lanes = graph, network, lanes
        self.image, self.affine, self.prefix = image, affine, prefix
        self.statistics, self.update = statistics, update
        self.geometry: dict[str, tuple[int, int, int]] = {}
        self._tensors: dict[str, str] = {}
        first = len(graph.nodes)
        for layer in layers:
            self._emit(layer)
        self.nodes: list[Node] = graph.nodes[first:]
        self.logits = self._tensors[network.graph.output]
        graph.halos.zero(self.logits)

    def _emit(self, layer: FusedLayer) -> None:
        sources = [self._tensors[name] for name in layer.inputs]
        y = self.graph.unique(f"{self.prefix}{layer.name}")
        self._tensors[layer.name] = y
        self.geometry[y] = layer.geometry
        getattr(self, f"_{layer.kind}")(layer, sources, y)

    def _input(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        self._view(layer, y)
        self.graph.emit("PackInput", [self.image], [y], lanes=self.lanes, halo=HaloOf(y))

    def _view(self, layer: FusedLayer, y: str) -> None:
        """A tensor that is also read as a vector must have no halo."""
        if self.network.graph[layer.name].geometry != layer.geometry:
            self.graph.halos.zero(y)

    def _convolution(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        convolution = layer.layer
        assert isinstance(convolution, Convolution)
        (x,) = sources
        self.graph.halos.at_least(x, convolution.padding)
        residual = self._tensors[layer.residual] if layer.residual else ""
        if residual:
            self.graph.halos.equal(residual, y)
        module = convolution.module
        in_channels, in_height, in_width = layer.source_geometry
        out_channels, out_height, out_width = layer.geometry
        self.graph.emit(
            "Conv",
            [x, "coo.value", self.affine.tensor if layer.slot else "", residual, "coo.lists"],
            [y, ""],
            layer_offset=self.network.layout.prunable[module].offset,
            in_channels=in_channels,
            in_height=in_height,
            in_width=in_width,
            in_halo=HaloOf(x),
            out_channels=out_channels,
            out_height=out_height,
            out_width=out_width,
            out_halo=HaloOf(y),
            kernel=list(convolution.kernel),
            stride=convolution.stride,
            padding=convolution.padding,
            lanes=self.lanes,
            forward_pointer=self.network.lists.forward[module],
            transpose_pointer=self.network.lists.transpose[module],
            affine=self.affine.offset(layer),
            relu=int(layer.relu),
            algorithm=self.network.algorithms[module],
        )

    def _batch_norm(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        norm = layer.layer
        assert isinstance(norm, BatchNorm) and self.statistics is not None
        residual = self._tensors[layer.residual] if layer.residual else ""
        running = [self.graph.unique(f"{name}.running") for name in ("mean", "variance")]
        self.graph.emit(
            "BatchNorm",
            [sources[0], self.affine.tensor, "sample_weight", *self.statistics, residual],
            [y, "", *running, ""],
            **self._map(layer),
            in_halo=HaloOf(sources[0]),
            out_halo=HaloOf(y),
            residual_halo=HaloOf(residual) if residual else 0,
            affine=self.affine.offset(layer),
            statistics=self.network.layout.statistics[norm.module].offset,
            relu=int(layer.relu),
            momentum=float(norm.momentum),
            epsilon=float(norm.epsilon),
            update=int(self.update),
        )
        self.statistics[:] = running

    def _affine(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        self.graph.emit(
            "Affine",
            [sources[0], self.affine.tensor],
            [y, ""],
            **self._map(layer),
            in_halo=HaloOf(sources[0]),
            out_halo=HaloOf(y),
            affine=self.affine.offset(layer),
            relu=int(layer.relu),
        )

    def _add(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        halos = {"a_halo": HaloOf(sources[0]), "b_halo": HaloOf(sources[1]), "out_halo": HaloOf(y)}
        self.graph.emit("Add", sources, [y, ""], **self._map(layer), **halos, relu=int(layer.relu))

    def _max_pool(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        pool = layer.layer
        assert isinstance(pool, MaxPool)
        self._view(layer, y)
        attributes = self._pool(layer, sources[0], y, pool.kernel, pool.stride, pool.padding)
        self.graph.emit("MaxPool", sources, [y, ""], **attributes, relu=int(layer.relu))

    def _average_pool(self, layer: FusedLayer, sources: list[str], y: str) -> None:
        pool = layer.layer
        assert isinstance(pool, AveragePool)
        self._view(layer, y)
        self.graph.emit(
            "AveragePool", sources, [y], **self._pool(layer, sources[0], y, pool.kernel, pool.stride, 0)
        )

    def _map(self, layer: FusedLayer) -> dict[str, int]:
        channels, height, width = layer.geometry
        return {"channels": channels, "height": height, "width": width, "lanes": self.lanes}

    def _pool(
        self, layer: FusedLayer, x: str, y: str, kernel: int, stride: int, padding: int
    ) -> dict[str, int | HaloOf]:
        channels, in_height, in_width = layer.source_geometry
        _, out_height, out_width = layer.geometry
        return {
            "channels": channels,
            "in_height": in_height,
            "in_width": in_width,
            "in_halo": HaloOf(x),
            "out_height": out_height,
            "out_width": out_width,
            "out_halo": HaloOf(y),
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "lanes": self.lanes,
        }


class FoldedAffine:
    """The folded scale and shift: emits FoldAffine, knows each layer's slot, and folds the gradient back."""

    def __init__(self, graph: Graph, network: Network, layers: list[FusedLayer]) -> None:
        self.graph = graph
        self.entries: list[int] = []
        self._offsets: dict[str, int] = {}
        self.epsilon = network.epsilon
        self.learned: set[int] = set()
        position = 0
        for layer in layers:
            if layer.slot is None:
                continue
            self._offsets[layer.name] = position
            entry = network.entry(layer.slot)
            if any(offset >= 0 for offset in entry[2:5]):
                self.learned.add(position)
            self.entries += entry
            position += layer.slot.channels
        self.tensor = "affine" if self.entries else ""
        if self.entries:
            inputs = ["dense.value", "batchnorm.mean", "batchnorm.variance"]
            graph.emit("FoldAffine", inputs, ["affine"], entries=self.entries, epsilon=self.epsilon)

    def offset(self, layer: FusedLayer) -> int:
        """First channel of the layer's slot, or −1."""
        return self._offsets.get(layer.name, -1)

    def start_gradient(self) -> str:
        """Emit the zeros that the gradient of scales and shifts accumulates into."""
        if not self.entries:
            return ""
        self.graph.emit("ZeroAffine", ["affine"], ["affine_grad"])
        return "affine_grad"

    def fold_gradient(self, affine_grad: str, dense_grad: str, statistics: list[str]) -> str:
        """Emit the chain rule from scales and shifts to the dense parameters; returns the accumulated
        gradient.
        """
        if not self.entries:
            return dense_grad
        result = "dense.value_grad.accumulated"
        inputs = [affine_grad, "dense.value", *statistics, dense_grad]
        self.graph.emit("FoldAffineGrad", inputs, [result], entries=self.entries, epsilon=self.epsilon)
        return result
