"""The planner: the fastest way to train a network inside a byte budget.

It chooses the micro-batch, which activations are recomputed (or, where that is allowed, kept as bfloat16),
which layers do without the dense kernel's work memory, and whether the clean branch of a two-branch
objective is kept or computed again. A choice is worth its predicted seconds an image (`cost_model`)
and is allowed if its predicted peak, by the replay that the artifact's plan comes from, does not exceed the
budget. Images lie side by side in the largest number that divides the micro-batch: that costs no memory.

For one micro-batch the search is greedy: while the peak is too high, of all changes that touch it, it makes
the one with the least time for each byte·operator that it brings under the budget; then it takes back what
turned out not to be needed. Micro-batches are tried in order of the time they would take if memory were free,
until none can be faster than the best that fits. What is smallest of all is searched for once, independently
of the budget, so that a budget is feasible exactly if it is not below that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from edge_bcs.runtime.buffers import bound_buffers, bytes_of

from edge_bcs.objectives import Objective
from edge_bcs.objectives import get as objective_named

from .cost_model import TYPICAL_BOARD, Machine, Walk
from .graphs import attack_graph, evaluation_graph, lanes_of, training_graph
from .network import Network
from .nodes import Graph, Node
from .operators import OPERATORS
from .plan import replay, tensor_types
from .storage import Storage, kept_stacks, repeated, store

Shape = tuple[int, ...]
_LARGEST = 128  # micro-batch
_LARGE = 32  # stacks, beyond which a space is searched in larger steps
_AT_A_TIME = 12  # changes that are compared there
_TRIALS = 400  # single changes that are tried on the smallest choice


@dataclass(frozen=True)
class Job:
    """What is to be fast.

    Attributes:
        objective, beta: the loss. batch_size: images an optimizer step. attack_steps: of the training attack.
        bfloat16: whether activations may be kept as bfloat16, which rounds gradients.
        machine: for whom.
    """

    objective: Objective
    beta: float = 0.0
    batch_size: int = 128
    attack_steps: int = 10
    bfloat16: bool = False
    machine: Machine = TYPICAL_BOARD

    def runs(self, micro_batch: int) -> dict[str, int]:
        """How often each graph runs in one step (Algorithm 1: craft, accumulate, update)."""
        parts = -(-self.batch_size // micro_batch)
        half = -(-(self.batch_size // 2) // micro_batch)
        attacked = {"natural": 0, "mixed": half}.get(self.objective.name, parts)
        crafted = attacked if self.objective.attack_loss == "kl" else 0
        return {"training": parts, "attack": attacked * self.attack_steps, "eval": crafted}


@dataclass(frozen=True)
class Choice:
    """How to compile.

    Attributes:
        micro_batch: images a run of a graph.
        keep_both: both branches of a two-branch objective are kept (always False for one branch).
        storage: what is recomputed or narrowed. sparse: modules that do without the dense kernel.
    """

    micro_batch: int
    keep_both: bool = False
    storage: Storage = field(default_factory=Storage)
    sparse: frozenset[str] = frozenset()

    def network(self, network: Network) -> Network:
        """``network`` with the kernels of this choice."""
        kernels = dict(network.algorithms) | dict.fromkeys(self.sparse, "sparse")
        return replace(network, algorithms=kernels) if self.sparse else network


@dataclass(frozen=True)
class Figures:
    """What a choice is predicted to need.

    Attributes:
        choice: the choice. peak_bytes: the working set. seconds: an image, all phases.
        totals: phase → bytes in use while each node runs, bound buffers included.
    """

    choice: Choice
    peak_bytes: int
    seconds: float
    totals: Mapping[str, np.ndarray]

    def excess(self, cap: int) -> int:
        """Bytes above ``cap``, summed over all nodes of all graphs."""
        return sum(int(np.maximum(total - cap, 0).sum()) for total in self.totals.values())


def network_buffers(network: Network, objective: Objective, micro_batch: int) -> dict[str, tuple[str, Shape]]:
    """The bound buffers of an artifact, see ``edge_bcs.runtime.buffers``."""
    buffers: dict[str, tuple[str, Shape]] = bound_buffers(
        kappa=network.kappa,
        lists_length=network.lists.length,
        dense_size=network.layout.dense_size,
        statistics_size=network.layout.statistics_size,
        micro_batch=micro_batch,
        input_shape=network.image,
        num_classes=network.classes,
        two_branches=objective.two_branches,
        batch_statistics=network.batch_statistics,
    )
    return buffers


class Space:
    """All choices for one micro-batch and one order of branches; ``measure`` predicts what each needs."""

    def __init__(self, network: Network, job: Job, micro_batch: int, keep_both: bool = False) -> None:
        self.network, self.job = network, job
        self.start = Choice(micro_batch, keep_both)
        bound = network_buffers(network, job.objective, micro_batch).values()
        self.bound_bytes = sum(bytes_of(dtype, shape) for dtype, shape in bound)
        self.modules = {segment.offset: name for name, segment in network.layout.prunable.items()}
        graphs = {
            "training": training_graph(network, micro_batch, job.objective.name, job.beta, keep_both),
            "attack": attack_graph(network, micro_batch),
            "eval": evaluation_graph(network, micro_batch),
        }
        self.training = graphs["training"]
        self.stacks = kept_stacks(self.training)
        self._by_worth: list[str] = []
        self._sizes: dict[str, int] = {}
        self._work: dict[str, list[tuple[int, str, int]]] = {}  # phase → (node, module, bytes)
        self._totals: dict[str, np.ndarray] = {}
        self._seconds: dict[str, dict[str, float]] = {}  # phase → node → seconds
        self._saving: dict[str, dict[str, float]] = {}  # phase → node → seconds less without the dense kernel
        self._module: dict[str, str] = {}  # node → its dense layer
        for phase, graph in graphs.items():
            self._prepare(phase, graph)
        seconds = self._seconds["training"]
        self._by_worth = sorted(self.stacks, key=lambda name: -self._sizes[name] / seconds[name])

    def _prepare(self, phase: str, graph: Graph) -> None:
        types = tensor_types(graph)
        plan = replay(graph, self.network.connections)
        self._totals[phase] = np.array(plan.totals, np.int64)
        self._seconds[phase], self._saving[phase], self._work[phase] = {}, {}, []
        if phase == "training":
            self._sizes = {name: tensor.bytes for name, tensor in types.items()}
        for index, node in enumerate(graph.nodes):
            dense = node.attributes.get("algorithm") == "dense"
            taken = self._time(plan.walks[index], plan.moved[index])
            self._seconds[phase][node.name] = taken
            if dense:
                module = self.modules[node.attributes["layer_offset"]]
                rule, other = OPERATORS[node.operator], _sparse(node)
                work = rule.work_bytes(node, types)
                self._totals[phase][index] -= work
                self._work[phase].append((index, module, work))
                self._module[f"{phase} {node.name}"] = module
                walks = rule.walks(other, types, self._connections)
                frugal = self._time(walks, rule.bytes_moved(other, types, self._connections))
                self._saving[phase][node.name] = taken - frugal
            if phase == "training" and node.outputs[0] in self.stacks:
                self._seconds[phase][node.outputs[0]] = taken
        self._totals[phase] += self.bound_bytes

    def _connections(self, node: Node) -> int:
        return self.network.connections[node.attributes["layer_offset"]]

    def _time(self, walks: tuple[Walk, ...], moved: int) -> float:
        return self.job.machine.seconds(walks, moved)

    def measure(self, choice: Choice) -> Figures:
        """What ``choice``, one of this space, needs."""
        nodes = store(self.training, choice.storage).nodes
        totals = {phase: self._fixed(phase, choice) for phase in ("attack", "eval")}
        totals["training"], training = self._sketch(nodes, choice)
        seconds = {phase: self._phase_seconds(phase, choice) for phase in ("attack", "eval")}
        seconds["training"] = training
        runs = self.job.runs(choice.micro_batch)
        each = sum(count * seconds[phase] for phase, count in runs.items()) / self.job.batch_size
        peak = max(self.bound_bytes, *(int(total.max()) for total in totals.values()))
        return Figures(choice, peak, each, totals)

    def _fixed(self, phase: str, choice: Choice) -> np.ndarray:
        totals = self._totals[phase].copy()
        for index, module, work in self._work[phase]:
            if module not in choice.sparse:
                totals[index] += work
        return totals

    def _phase_seconds(self, phase: str, choice: Choice) -> float:
        less = sum(
            saving
            for node, saving in self._saving[phase].items()
            if self._module[f"{phase} {node}"] in choice.sparse
        )
        return sum(self._seconds[phase].values()) - less

    def _sketch(self, nodes: list[Node], choice: Choice) -> tuple[np.ndarray, float]:
        """(bytes in use at each node, seconds of all) of a rewritten training graph; `replay` in short."""
        seconds, saving = self._seconds["training"], self._saving["training"]
        root: dict[str, str] = {}
        birth: dict[str, int] = {}
        death: dict[str, int] = {}
        change = np.zeros(len(nodes) + 1, np.int64)
        outputs = self.training.outputs
        taken = 0.0
        for index, node in enumerate(nodes):
            for name in node.inputs:
                owner = root.get(name)
                if owner:
                    death[owner] = index
            aliases = OPERATORS[node.operator].aliases
            for position, name in enumerate(node.outputs):
                if not name:
                    continue
                if position in aliases:
                    root[name] = owner = root.get(node.inputs[aliases[position]], "")
                    if owner:
                        death[owner] = index
                elif name not in outputs:
                    root[name] = name
                    birth[name] = death[name] = index
            original = repeated(node)
            taken += seconds.get(original) or self._inserted(node)
            module = self._module.get(f"training {original}")
            if module is not None:
                if module in choice.sparse:
                    taken -= saving[original]
                else:
                    work = OPERATORS[node.operator].work_bytes(node, {})
                    change[index] += work
                    change[index + 1] -= work
        for name, index in birth.items():
            size = self._size(name)
            change[index] += size
            change[death[name] + 1] -= size
        return np.cumsum(change)[:-1] + self.bound_bytes, taken

    def _size(self, name: str) -> int:
        known = self._sizes.get(name)
        if known is None:
            stem, _, kind = name.rpartition(".")
            if kind.isdigit():  # the second and further repetitions
                stem, _, kind = stem.rpartition(".")
            known = self._sizes[stem] // (2 if kind == "bf16" else 1)
            self._sizes[name] = known
        return known

    def _inserted(self, node: Node) -> float:
        """Seconds of an operator that `store` inserted and that repeats none."""
        size = self._size(node.outputs[0]) if node.operator in ("Narrow", "Widen") else 0
        wide = 2 if node.operator == "Narrow" else 1
        return self._time((), 3 * size * wide // 2)

    def moves(self, figures: Figures) -> Iterator[Choice]:
        """Every choice that is one change away and touches the peak of ``figures``; what saves most for its
        time comes first.
        """
        choice = figures.choice
        phase = max(figures.totals, key=lambda name: int(figures.totals[name].max()))
        node = int(figures.totals[phase].argmax())
        if phase != "training":
            for index, module, _ in self._work[phase]:
                if index == node and module not in choice.sparse:
                    yield replace(choice, sparse=choice.sparse | {module})
            return
        nodes = store(self.training, choice.storage).nodes
        dense = self._module.get(f"training {repeated(nodes[node])}")
        if dense is not None and dense not in choice.sparse:
            yield replace(choice, sparse=choice.sparse | {dense})
        storage = choice.storage
        written = {name for earlier in nodes[: node + 1] for name in earlier.outputs}
        for tensor in self._by_worth:
            if tensor in written and tensor not in storage.recomputed | storage.narrowed:
                yield replace(choice, storage=replace(storage, recomputed=storage.recomputed | {tensor}))
                if self.job.bfloat16:
                    yield replace(choice, storage=replace(storage, narrowed=storage.narrowed | {tensor}))

    def _improved(self, figures: Figures, cap: int, price: bool) -> Figures | None:
        """The best change of ``figures`` that brings it nearer to ``cap``, or None if none does.

        "Best" is the least time for what it gains, or, without ``price``, the largest gain. In a large space
        the changes are tried a few at a time, and several are made at once where that gains more.
        """
        excess = figures.excess(cap)
        large = len(self.stacks) > _LARGE
        moves = list(self.moves(figures))
        size = _AT_A_TIME if large else max(1, len(moves))
        for first in range(0, len(moves), size):
            ranked: list[tuple[float, int, Figures]] = []
            for choice in moves[first : first + size]:
                changed = self.measure(choice)
                gain = excess - changed.excess(cap)
                if gain > 0:
                    worth = (changed.seconds - figures.seconds) / gain if price else -gain
                    ranked.append((worth, len(ranked), changed))
            if ranked:
                ranked.sort()
                best = ranked[0][2]
                if not large:
                    return best
                several = self.measure(_together([entry[2].choice for entry in ranked[: size // 3]]))
                return several if several.excess(cap) < best.excess(cap) else best
        return None

    def fit(self, cap: int, figures: Figures | None = None) -> Figures | None:
        """The fastest choice found whose peak is at most ``cap``, or None; see the module."""
        found: Figures | None = figures or self.measure(self.start)
        while found is not None and found.peak_bytes > cap:
            found = self._improved(found, cap, price=True)
        return None if found is None else self.prune(found, cap)

    def prune(self, figures: Figures, cap: int) -> Figures:
        """Take changes back, the dearest first, as long as the peak stays under ``cap``."""
        dearest = sorted(
            (self.measure(choice).seconds, index, change)
            for index, (change, choice) in enumerate(_less(figures.choice))
        )
        for _, _, change in dearest:
            fewer = next((choice for name, choice in _less(figures.choice) if name == change), None)
            if fewer is not None:
                changed = self.measure(fewer)
                if changed.peak_bytes <= cap and changed.seconds < figures.seconds:
                    figures = changed
        return figures

    def smallest(self, like: Storage | None = None) -> Figures:
        """The choice with the least peak that is found, whatever it costs.

        Args:
            like: what is smallest for one branch; the search for two then begins there, in each of them.
        """
        frugal = frozenset(module for phase in self._work.values() for _, module, _ in phase)
        start = replace(self.start, sparse=frugal)
        fixed = self.measure(start)
        floor = max(self.bound_bytes, *(int(fixed.totals[phase].max()) for phase in ("attack", "eval")))
        best = fixed
        if like is None:
            made = {node.outputs[0]: node.operator for node in self.training.nodes}
            kinds = ((), ("Affine", "Add"), ("Affine", "Add", "BatchNorm", "MaxPool"))
            starts = [Storage(frozenset(t for t in self.stacks if made[t] in kind)) for kind in kinds]
        else:
            starts = [Storage(self._in_branches(like.recomputed), self._in_branches(like.narrowed))]
        for storage in starts:
            found = self._descend(self.measure(replace(start, storage=storage)), floor)
            found = self._polish(found, floor)
            if found.peak_bytes < best.peak_bytes:
                best = found
        return best

    def _in_branches(self, tensors: frozenset[str]) -> frozenset[str]:
        return frozenset(tensor for tensor in self.stacks if tensor.partition(".")[2] in tensors)

    def _descend(self, figures: Figures, floor: int) -> Figures:
        best, now = figures, self._improved(figures, floor, price=False)
        while now is not None:
            if now.peak_bytes < best.peak_bytes:
                best = now
            now = self._improved(now, floor, price=False)
        return best

    def _polish(self, best: Figures, floor: int) -> Figures:
        """Changes that looked good early may be bad now, and the other way round."""
        trials = _TRIALS
        while trials > 0:
            options = [*self.moves(best), *(choice for _, choice in _less(best.choice))]
            before = best.peak_bytes, best.excess(floor)
            for choice in options[:trials]:
                trials -= 1
                found = self.measure(choice)
                if (found.peak_bytes, found.excess(floor)) < before:
                    best = found
                    break
            else:
                break
        return best


def _together(choices: list[Choice]) -> Choice:
    """All changes of choices with one origin; what one recomputes and another narrows is recomputed."""
    recomputed = frozenset().union(*(choice.storage.recomputed for choice in choices))
    narrowed = frozenset().union(*(choice.storage.narrowed for choice in choices))
    sparse = frozenset().union(*(choice.sparse for choice in choices))
    return replace(choices[0], storage=Storage(recomputed, narrowed - recomputed), sparse=sparse)


def _sparse(node: Node) -> Node:
    return replace(node, attributes={**node.attributes, "algorithm": "sparse"})


def _less(choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(change, choice without it) of every change."""
    storage = choice.storage
    for tensor in sorted(storage.recomputed):
        fewer = replace(storage, recomputed=storage.recomputed - {tensor})
        yield f"recomputed {tensor}", replace(choice, storage=fewer)
    for tensor in sorted(storage.narrowed):
        fewer = replace(storage, narrowed=storage.narrowed - {tensor})
        yield f"narrowed {tensor}", replace(choice, storage=fewer)
    for module in sorted(choice.sparse):
        yield f"sparse {module}", replace(choice, sparse=choice.sparse - {module})


def micro_batches(network: Network, job: Job) -> list[int]:
    """Numbers of images worth trying: all up to 16, beyond that those that fill vectors of 8 or more."""
    least = 2 if network.batch_statistics else 1
    most = max(least, min(job.batch_size, _LARGEST))
    sizes = [n for n in range(least, most + 1) if n <= 16 or (n % 8 == 0 and lanes_of(n) >= 8)]
    return sizes if most in sizes else [*sizes, most]


def branch_orders(network: Network, job: Job) -> tuple[bool, ...]:
    """Values of ``keep_both`` that differ; the one that is the default comes first."""
    if not job.objective.two_branches:
        return (False,)
    return (True, False) if network.batch_statistics else (False, True)


def smallest(network: Network, job: Job, micro_batch: int | None = None) -> Figures:
    """The smallest working set that is found for ``micro_batch`` images (default: as few as possible)."""
    images = micro_batch or (2 if network.batch_statistics else 1)
    options = []
    if job.bfloat16:  # which is allowed, not asked for
        options.append(smallest(network, replace(job, bfloat16=False), micro_batch))
    like = None
    if job.objective.two_branches:
        like = smallest(network, replace(job, objective=objective_named("at")), micro_batch).choice.storage
    options += [Space(network, job, images, keep).smallest(like) for keep in branch_orders(network, job)]
    return min(options, key=lambda figures: figures.peak_bytes)


def fastest(
    network: Network, job: Job, budget: int, micro_batch: int | None = None, least: Figures | None = None
) -> Figures | None:
    """The fastest choice found inside ``budget`` bytes, None if there is none.

    Args:
        micro_batch: only this many images.
        least: what ``smallest`` gave for the same arguments, if it is there already.
    """
    spaces: list[tuple[Figures, Space]] = []
    for images in [micro_batch] if micro_batch else micro_batches(network, job):
        for keep in branch_orders(network, job):
            space = Space(network, job, images, keep)
            spaces.append((space.measure(space.start), space))
        if spaces[-1][1].bound_bytes > budget:  # and so are those of larger micro-batches
            break
    spaces.sort(key=lambda pair: pair[0].seconds)
    if spaces[0][0].peak_bytes <= budget:
        return spaces[0][0]
    least = least or smallest(network, job, micro_batch)
    if budget < least.peak_bytes:
        return None
    home = Space(network, job, least.choice.micro_batch, least.choice.keep_both)
    best = home.prune(least, budget)
    for free, space in spaces:
        if free.seconds >= best.seconds:
            break
        found = free if free.peak_bytes <= budget else _squeeze(space, free, least, budget)
        if found is not None and found.seconds < best.seconds:
            best = found
    return best


def _squeeze(space: Space, free: Figures, least: Figures, budget: int) -> Figures | None:
    """What fits of a space that does not without changes, None if nothing seems to."""
    frugal = replace(least.choice, micro_batch=space.start.micro_batch, keep_both=space.start.keep_both)
    known = frozenset(space.stacks)
    storage = frugal.storage
    frugal = replace(frugal, storage=Storage(storage.recomputed & known, storage.narrowed & known))
    tight = space.measure(frugal)
    found = space.fit(budget, free) if _promising(tight, budget) else None
    if tight.peak_bytes <= budget:
        tight = space.prune(tight, budget)
        if found is None or tight.seconds < found.seconds:
            return tight
    return found


def _promising(tight: Figures, budget: int) -> bool:
    """Whether the smallest choice of another micro-batch comes near the budget in this one."""
    return tight.peak_bytes <= 1.05 * budget
