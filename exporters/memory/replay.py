"""The memory plan: a replay of each graph's schedule that yields every tensor's life and the peak by
category.

The model of execution is ONNX Runtime's with its arena, memory patterns and buffer reuse switched off: nodes
run in file order, each output is one allocation of its own size, made when its node runs and given back after
its last reader; what nobody reads is given back when the run ends. Outputs that alias an input and graph
outputs (which are bound) allocate nothing. Everything comes from the graph alone; nothing is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from edge_bcs.runtime.buffers import aligned
from edge_bcs.targets.cost_model import Walk
from edge_bcs.targets.layout import assign
from edge_bcs.targets.plans import HOLES, Allocation, MemoryPlan, Phase, live

from ..nodes import Graph, Node, TensorType
from ..operators import OPERATORS
from ..operators.base import ACTIVATIONS, KEPT, WORKSPACE, Types

BOUND_CATEGORIES = {
    "coo.value": "values",
    "coo.index": "indices",
    "coo.lists": "lists",
    "coo.momentum": "momentum",
    "dense.momentum": "momentum",
    "coo.value_grad.accumulation.buffer": "gradients",
    "dense.value_grad.accumulation.buffer": "gradients",
    "dense.value": "dense parameters",
    "batchnorm.mean": "dense parameters",
    "batchnorm.variance": "dense parameters",
    "rollback.mean": "dense parameters",
    "rollback.variance": "dense parameters",
    "adversarial": "attack buffers",
    "target": "attack buffers",
    "step_size": "attack buffers",
    "epsilon": "attack buffers",
}
"""Bound buffer → category; what is not listed is "data" (images, labels, logits, scalars)."""


@dataclass
class Replay:
    """The replay of one graph.

    Attributes:
        graph, types: the graph, and the type of each of its tensors.
        allocations: all of them, in order of birth; work memory lives for one node.
        nodes: name of each node; flops, moved, walks: its arithmetic, the bytes that it reads and writes, and
            its products.
        without_work: node that could do without work memory → (bytes of that, walks and bytes moved then).
        peak_bytes: the largest total; peak_node: where.
        categories: bytes by category at the peak.
    """

    graph: Graph
    types: Types
    allocations: list[Allocation]
    nodes: list[str]
    flops: list[int]
    moved: list[int]
    walks: list[tuple[Walk, ...]]
    without_work: dict[int, tuple[int, tuple[Walk, ...], int]]

    @cached_property
    def totals(self) -> list[int]:
        """Bytes allocated while each node runs."""
        return self._alive(lambda size: size)

    @cached_property
    def room(self) -> list[int]:
        """The same in whole units of the alignment: what an arena without holes has in use."""
        return self._alive(aligned)

    def _alive(self, room_for: Callable[[int], int]) -> list[int]:
        totals = [0] * len(self.nodes)
        for life in self.allocations:
            size = room_for(life.bytes)
            for node in range(life.birth, life.death + 1):
                totals[node] += size
        return totals

    @property
    def peak_bytes(self) -> int:
        """Bytes allocated at the peak, without the bound buffers."""
        return max(self.totals, default=0)

    @property
    def peak_node(self) -> int:
        """The first node during which the peak is reached."""
        return self.totals.index(self.peak_bytes) if self.totals else 0

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return self.categories_at(self.peak_node)

    def categories_at(self, node: int) -> dict[str, int]:
        """Bytes by category while ``node`` runs, largest first."""
        counter: Counter[str] = Counter()
        for life in self.allocations:
            if life.birth <= node <= life.death:
                counter[life.category] += life.bytes
        return dict(counter.most_common())


def tensor_types(graph: Graph) -> Types:
    """The type of every tensor of the graph, from the types of its inputs and the operators' shape rules."""
    types = dict(graph.inputs)
    for node in graph.nodes:
        for tensor, kind in zip(
            node.outputs, OPERATORS[node.operator].output_types(node, types), strict=False
        ):
            if tensor:
                types[tensor] = kind
    return types


def replay_of(graph: Graph, connections: Mapping[int, int]) -> Replay:
    """Replay the schedule of ``graph``, whose layers have ``connections`` (see ``Network``).

    Raises:
        AssertionError: a node reads a tensor that no earlier node wrote (the file order is not an order of
            execution).
    """
    types = tensor_types(graph)
    work = [OPERATORS[node.operator].work_bytes(node, types) for node in graph.nodes]

    def layer(node: Node) -> int:
        return connections[node.attributes["layer_offset"]]

    without_work = {}
    for index, node in enumerate(graph.nodes):
        rule = OPERATORS[node.operator]
        other = rule.without_work(node)
        if other is not None:
            costs = rule.walks(other, types, layer), rule.bytes_moved(other, types, layer)
            without_work[index] = (work[index], *costs)
    return Replay(
        graph,
        types,
        _allocations(graph, types, work),
        [node.name for node in graph.nodes],
        [OPERATORS[node.operator].flops(node, types, layer) for node in graph.nodes],
        [OPERATORS[node.operator].bytes_moved(node, types, layer) for node in graph.nodes],
        [OPERATORS[node.operator].walks(node, types, layer) for node in graph.nodes],
        without_work,
    )


def _allocations(graph: Graph, types: Types, work: Sequence[int]) -> list[Allocation]:
    """Everything that is allocated while the graph runs, ``work`` bytes by each node among it, in order of
    birth; what gradient operators read of the forward pass, or what stands for it, is kept."""
    owner = dict.fromkeys(graph.inputs, "")  # → the allocation it lives in, "" if it is bound
    category: dict[str, str] = {}
    births: dict[str, int] = {}
    deaths: dict[str, int] = {}
    unread: set[str] = set()
    for index, node in enumerate(graph.nodes):
        rule = OPERATORS[node.operator]
        for tensor in filter(None, node.inputs):
            assert tensor in owner, f"node {node.name} reads {tensor} before it is written"
            if rule.backward and category.get(tensor) == ACTIVATIONS:
                category[tensor] = KEPT
            if owner[tensor]:
                deaths[owner[tensor]] = index
                unread.discard(owner[tensor])
        for position, tensor in enumerate(node.outputs):
            if not tensor:
                continue
            category[tensor] = rule.category
            if position in rule.aliases:
                owner[tensor] = owner[node.inputs[rule.aliases[position]]]
                if owner[tensor]:
                    deaths[owner[tensor]] = index
            elif tensor in graph.outputs:
                owner[tensor] = ""
            else:
                owner[tensor] = tensor
                births[tensor] = deaths[tensor] = index
                unread.add(tensor)
    deaths |= dict.fromkeys(unread, len(graph.nodes) - 1)
    lives = [
        Allocation(tensor, types[tensor].bytes, category[tensor], birth, deaths[tensor], str(types[tensor]))
        for tensor, birth in births.items()
    ]
    lives += [
        Allocation(f"{node.name}.work", size, WORKSPACE, index, index, f"u8[{size}]")
        for index, (node, size) in enumerate(zip(graph.nodes, work, strict=True))
        if size
    ]
    return sorted(lives, key=lambda life: (life.birth, life.name))


def plan(
    replays: Mapping[str, Replay], buffers: Mapping[str, TensorType], apart: Collection[str] = ()
) -> MemoryPlan:
    """Plan an artifact: give every tensor its place.

    Args:
        replays: phase → what its graph needs.
        buffers: those that are bound to the graphs, see ``Network.buffers``.
        apart: phases that no training runs, and whose peak is not its.
    """
    sizes = {name: buffer.bytes for name, buffer in buffers.items()}
    phases = {name: _phase(name, replay, sizes, name in apart) for name, replay in replays.items()}
    return MemoryPlan(max(phase.peak_bytes for phase in phases.values() if not phase.apart), sizes, phases)


@lru_cache(maxsize=256)
def placed(allocations: tuple[Allocation, ...]) -> tuple[Allocation, ...]:
    """The same with addresses in the smallest block that is found."""
    layout = assign(allocations)
    return tuple(
        replace(tensor, address=address)
        for tensor, address in zip(layout.tensors, layout.addresses, strict=True)
    )


def _phase(name: str, replay: Replay, sizes: Mapping[str, int], apart: bool) -> Phase:
    """A replay with the bound buffers, which are alive all the time."""
    allocations = placed(tuple(replay.allocations))
    bound = sum(map(aligned, sizes.values()))
    steps = live(allocations, len(replay.nodes))
    most = max((step.total() for step in steps), default=0)
    peak = next((number for number, step in enumerate(steps) if step.total() == most), 0)
    categories: Counter[str] = Counter()
    for buffer, size in sizes.items():
        categories[BOUND_CATEGORIES.get(buffer, "data")] += size
    categories[HOLES] = bound - sum(sizes.values())
    if steps:
        categories.update(steps[peak])
    return Phase(
        name=name,
        peak_bytes=bound + most,
        peak_node=replay.nodes[peak] if replay.nodes else "",
        categories={category: size for category, size in categories.most_common() if size},
        nodes=tuple(replay.nodes),
        flops=tuple(replay.flops),
        moved=tuple(replay.moved),
        allocations=allocations,
        walks=tuple(replay.walks),
        apart=apart,
    )
