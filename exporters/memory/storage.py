"""A choice carried out: graphs in which everything is kept become those in which it is otherwise.

Dense layers can do without the dense kernel and its work memory; activations that the backward pass reads can
be recomputed, or kept as bfloat16.

`store` rewrites a finished training graph. A recomputed tensor is given back after its last reader of the
forward pass; right before the first gradient operator that reads it, its operator runs once more, on tensors
that are kept or are recomputed themselves, and the same arithmetic on the same numbers gives the same bits. A
narrowed tensor lies in memory as bfloat16 between its two uses, so that gradients change by its rounding. The
tokens of After and Widen tie every inserted operator to the one before it in the file, so that no engine runs
it earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from ..nodes import Graph, Node
from ..operators import OPERATORS
from ..operators.base import Operator
from ..operators.order import After
from ..operators.storage import Narrow, Widen

_AGAIN = ".again."


@dataclass(frozen=True)
class Storage:
    """Tensors of a training graph that are not simply kept.

    Attributes:
        recomputed: computed a second time. narrowed: kept as bfloat16 (the gradient is then not exact).
    """

    recomputed: frozenset[str] = frozenset()
    narrowed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.recomputed or self.narrowed)

    def without(self, tensor: str) -> Storage:
        """The same with ``tensor`` kept."""
        return Storage(self.recomputed - {tensor}, self.narrowed - {tensor})


@dataclass
class Maker:
    """What makes a stack of the forward pass.

    Attributes:
        position: of the node that makes it. node: what can make it once more.
        aside: whether only gradient operators read the stack (what an activation is applied to).
        kept: whether gradient operators read it, so that it is kept for them.
    """

    position: int
    node: Node
    aside: bool
    kept: bool = False


def makers(graph: Graph) -> dict[str, Maker]:
    """Stack of the forward pass → what makes it, in order of their making."""
    found: dict[str, Maker] = {}
    for position, node in enumerate(graph.nodes):
        for tensor, again in OPERATORS[node.operator].makers(node).items():
            found[tensor] = Maker(position, again, tensor != node.outputs[0])
        if OPERATORS[node.operator].backward:
            for tensor in found.keys() & {*node.inputs}:
                found[tensor].kept = True
    return found


def kept_stacks(makers: Mapping[str, Maker]) -> list[str]:
    """The stacks of the forward pass that gradient operators read, in order of their making: what `store` can
    treat otherwise."""
    return [tensor for tensor, maker in makers.items() if maker.kept]


def store(graph: Graph, storage: Storage) -> Graph:
    """A graph that computes the same with the tensors of ``storage`` recomputed or narrowed.

    Args:
        graph: a training graph whose halos are resolved; it is not changed.
        storage: names among ``kept_stacks(makers(graph))``.
    """
    return _Rewriting(graph, storage).result() if storage else graph


def without_dense_kernels(graph: Graph, offsets: Set[int]) -> Graph:
    """A graph that computes the same to rounding, in which the layers at ``offsets`` visit only connections.

    Args:
        graph: a graph whose halos are resolved; it is not changed.
        offsets: first number of each such layer.
    """

    def rewritten(node: Node) -> Node:
        if node.attributes.get("layer_offset") not in offsets:
            return node
        return OPERATORS[node.operator].without_work(node) or node

    return replace(graph, nodes=[rewritten(node) for node in graph.nodes]) if offsets else graph


class _Rewriting:
    def __init__(self, graph: Graph, storage: Storage) -> None:
        self.graph, self.storage = graph, storage
        self.nodes: list[Node] = []
        self.makers = makers(graph)
        self.kept: Set[str] = {*kept_stacks(self.makers)} - storage.recomputed
        self.now: dict[str, str] = {}  # tensor → the name under which the forward pass reads it
        self.again: dict[str, str] = {}  # tensor → the name under which the backward pass reads it
        self.count: dict[str, int] = {}
        self.statistics: list[str] = []  # the newest tensors of the running averages

    def result(self) -> Graph:
        for node in self.graph.nodes:
            self._visit(node)
        return replace(self.graph, nodes=self.nodes)

    def _visit(self, node: Node) -> None:
        rule = OPERATORS[node.operator]
        if rule.backward:
            passing: dict[str, str] = {}
            inputs = [self._late(name, passing) for name in node.inputs]
        else:
            inputs = [self.now.get(name, name) for name in node.inputs]
        # What nobody would read until it is made again is not made before.
        unread = [name in self.storage.recomputed and self.makers[name].aside for name in node.outputs]
        outputs = ["" if gone else name for name, gone in zip(node.outputs, unread, strict=True)]
        changed = inputs != node.inputs or outputs != node.outputs
        self.nodes.append(replace(node, inputs=inputs, outputs=outputs) if changed else node)
        self.statistics = rule.running_statistics(node) or self.statistics
        for tensor in node.outputs:
            if tensor not in self.makers or tensor not in self.storage.narrowed:
                continue
            self._emit(Narrow, [tensor], [f"{tensor}.bf16"])
            if not self.makers[tensor].aside:
                # The forward pass goes on only when the narrow copy is there.
                self.now[tensor] = f"{tensor}.now"
                self._emit(After, [tensor, f"{tensor}.bf16"], [self.now[tensor]])

    def _late(self, tensor: str, passing: dict[str, str]) -> str:
        """The name under which the backward pass reads ``tensor``; what has to be done for it is emitted.

        ``passing`` holds recomputed tensors that no gradient operator reads; they live for one of them.
        """
        if tensor not in self.makers:
            return tensor
        known = self.again.get(tensor) or passing.get(tensor)
        if known:
            return known
        if tensor in self.storage.narrowed:
            name = self.again[tensor] = f"{tensor}.wide"
            self._emit(Widen, [f"{tensor}.bf16", self._token()], [name])
            return name
        if tensor in self.kept:
            return tensor
        names = self.again if tensor in self.storage.recomputed else passing
        names[tensor] = self._repeat(self.makers[tensor].node, passing)
        return names[tensor]

    def _repeat(self, node: Node, passing: dict[str, str]) -> str:
        inputs = [self._late(name, passing) for name in node.inputs]
        late = self._unique(f"{inputs[0]}.late")
        self._emit(After, [inputs[0], self._token()], [late])
        name = self._unique(f"{node.outputs[0]}.again")
        outputs = [name] + [""] * (len(node.outputs) - 1)
        inputs, attributes = OPERATORS[node.operator].repeated(node, [late, *inputs[1:]], self.statistics)
        again = f"{node.name}{_AGAIN}{len(self.nodes)}"
        self.nodes.append(Node(node.operator, inputs, outputs, attributes, again))
        return name

    def _token(self) -> str:
        """An output of the last operator that could not have run long ago."""
        last = next(node for node in reversed(self.nodes) if not OPERATORS[node.operator].early)
        return next(name for name in last.outputs if name)

    def _unique(self, base: str) -> str:
        count = self.count[base] = self.count.get(base, 0) + 1
        return base if count == 1 else f"{base}.{count}"

    def _emit(self, operator: type[Operator], inputs: list[str], outputs: list[str]) -> None:
        name = operator.__name__
        self.nodes.append(Node(name, inputs, outputs, {}, f"{name}.{outputs[0]}"))
