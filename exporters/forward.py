"""The forward nodes of a network in a graph."""

from __future__ import annotations

from .fusion import FusedLayer
from .network import Network, Pass
from .nodes import Graph, Node
from .operators import OPERATORS
from .operators.folding import FoldAffine
from .operators.lists import MakeLists


class Lowering:
    """A network on its way into a graph: what all its branches there share.

    Attributes:
        graph: it receives the nodes.
        network, passed: the network, and which of its passes it is.
        lanes: images that lie innermost in a stack.
        affine: the tensor of the folded scale and shift, which is emitted here; '' if there is none.
        fold: attributes of the operators that fold it and its gradient.
        statistics: the current tensors of (running mean, running variance); a branch with batch statistics
            replaces them by its own.
    """

    def __init__(self, graph: Graph, network: Network, passed: Pass, lanes: int) -> None:
        """Emit what all branches read: lists that are not kept, and the folded scale and shift."""
        self.graph, self.network, self.passed, self.lanes = graph, network, passed, lanes
        if passed.lists.made:
            MakeLists.emit(
                graph,
                {"index": passed.lists.buffer},
                {"lists": passed.lists.tensor},
                passed.lists.attributes,
            )
        self.affine = "affine" if passed.entries else ""
        self.fold = {"entries": passed.entries, "epsilon": passed.epsilon}
        self.statistics = ["batchnorm.mean", "batchnorm.variance"]
        if self.affine:
            inputs = {"dense": "dense.value", "mean": "batchnorm.mean", "variance": "batchnorm.variance"}
            FoldAffine.emit(graph, inputs, {"affine": self.affine}, self.fold)


class Branch:
    """One pass over one batch of images.

    Attributes:
        graph, network, lanes, affine, statistics: those of the ``lowering``.
        image: the input that it reads. update: whether it moves the running statistics.
        nodes: its forward nodes. logits: their result. geometry: stack → its (channels, height, width).
    """

    def __init__(self, lowering: Lowering, image: str, prefix: str = "", update: bool = True) -> None:
        """Emit the nodes; ``prefix`` makes the tensor names of several branches different."""
        self.lowering, self.image, self.prefix, self.update = lowering, image, prefix, update
        self.graph, self.network, self.lanes = lowering.graph, lowering.network, lowering.lanes
        self.affine, self.statistics = lowering.affine, lowering.statistics
        self.geometry: dict[str, tuple[int, int, int]] = {}
        self._tensors: dict[str, str] = {}
        first = len(self.graph.nodes)
        for fused in lowering.passed.layers:
            self._lower(fused)
        self.nodes: list[Node] = self.graph.nodes[first:]
        self.logits = self._tensors[self.network.graph.output]
        self.graph.halos.zero(self.logits)

    @property
    def seed(self) -> str:
        """Name of the gradient of the logits."""
        return f"d.{self.logits}"

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
