"""Forward nodes of one pass of the network, and the folded scale and shift that all passes share."""

from __future__ import annotations

from .fusion import FusedLayer
from .network import Network, Pass
from .nodes import Graph, Node
from .operators import OPERATORS
from .operators.folding import FoldAffine, FoldAffineGrad, ZeroAffine


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
        for fused in affine.passed.layers:
            self._lower(fused)
        self.nodes: list[Node] = graph.nodes[first:]
        self.logits = self._tensors[network.graph.output]
        graph.halos.zero(self.logits)

    def _lower(self, fused: FusedLayer) -> None:
        sources = [self._tensors[name] for name in fused.inputs]
        y = self.graph.unique(f"{self.prefix}{fused.name}")
        self._tensors[fused.name] = y
        self.geometry[y] = fused.geometry
        OPERATORS[fused.operator].lower(fused, sources, y, self)

    # What operators ask for when they are lowered

    def residual(self, fused: FusedLayer) -> str:
        """The tensor that is added, or ''."""
        return self._tensors[fused.residual] if fused.residual else ""

    def as_vector(self, fused: FusedLayer, y: str) -> None:
        """A tensor that is also read as a vector must have no halo."""
        if self.network.graph[fused.name].geometry != fused.geometry:
            self.graph.halos.zero(y)

    def map(self, fused: FusedLayer) -> dict[str, int]:
        """Attributes of an operator whose output has the shape of its input."""
        channels, height, width = fused.geometry
        return {"channels": channels, "height": height, "width": width, "lanes": self.lanes}


class FoldedAffine:
    """The folded scale and shift: emits FoldAffine, knows each layer's slot, and folds the gradient back."""

    def __init__(self, graph: Graph, passed: Pass) -> None:
        self.graph, self.passed = graph, passed
        self.tensor = "affine" if passed.entries else ""
        self._attributes = {"entries": passed.entries, "epsilon": passed.epsilon}
        if self.tensor:
            inputs = {"dense": "dense.value", "mean": "batchnorm.mean", "variance": "batchnorm.variance"}
            FoldAffine.emit(graph, inputs, {"affine": self.tensor}, self._attributes)

    @property
    def learned(self) -> frozenset[int]:
        """Slots that have parameters."""
        return self.passed.learned

    def offset(self, layer: FusedLayer) -> int:
        """First channel of the layer's slot, or −1."""
        return self.passed.offsets.get(layer.name, -1)

    def start_gradient(self) -> str:
        """Emit the zeros that the gradient of scales and shifts accumulates into."""
        if not self.tensor:
            return ""
        ZeroAffine.emit(self.graph, {"affine": "affine"}, {"affine_grad": "affine_grad"})
        return "affine_grad"

    def fold_gradient(self, affine_grad: str, dense_grad: str, statistics: list[str]) -> str:
        """Emit the chain rule from scales and shifts to the dense parameters; returns the accumulated
        gradient.
        """
        if not self.tensor:
            return dense_grad
        result = "dense.value_grad.accumulated"
        mean, variance = statistics
        inputs = {"affine_grad": affine_grad, "dense": "dense.value", "dense_grad": dense_grad}
        inputs |= {"mean": mean, "variance": variance}
        FoldAffineGrad.emit(self.graph, inputs, {"dense_grad_out": result}, self._attributes)
        return result
