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

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from edge_bcs.targets.cost_model import TYPICAL_BOARD, Machine, Walk

from edge_bcs.core.objectives import PLAIN, Objective

from ..graphs import attack_graph, evaluation_graph, lanes_of, training_graph
from ..network import Network
from ..nodes import Graph, Node
from ..operators import OPERATORS
from ..operators.base import Repetition
from .replay import replay, tensor_types
from .sketch import Rewritten, Sketch
from .storage import Storage

_LARGEST = 128  # micro-batch
_LARGE = 32  # stacks, beyond which a space is searched in larger steps
_AT_A_TIME = 12  # changes that are compared there
_TRIALS = 400  # single changes that are tried on the smallest choice
# The smallest choice of one micro-batch, in another one, may be above the budget by this factor for that one
# to be looked at, and by this factor for larger ones to be.
_PROMISING, _HOPELESS = 1.05, 1.25


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
        runs = self.objective.runs(self.batch_size, micro_batch, self.attack_steps)
        return {graph: runs[graph] for graph in ("training", "attack", "eval")}


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
        kernels = {
            name: replace(kernel, algorithm="sparse") if name in self.sparse else kernel
            for name, kernel in network.kernels.items()
        }
        return replace(network, kernels=kernels) if self.sparse else network


@dataclass(frozen=True)
class Figures:
    """What a choice is predicted to need.

    Attributes:
        choice: the choice. peak_bytes: the working set. seconds: an image, all phases.
        totals: phase → bytes in use while each node runs, bound buffers included.
        rewritten: the training graph of a choice that rewrites it.
    """

    choice: Choice
    peak_bytes: int
    seconds: float
    totals: Mapping[str, np.ndarray]
    rewritten: Rewritten | None = None

    def excess(self, cap: int) -> int:
        """Bytes above ``cap``, summed over all nodes of all graphs."""
        return sum(int(np.maximum(total - cap, 0).sum()) for total in self.totals.values())


@dataclass(frozen=True)
class _Dense:
    """An operator that runs the dense kernel: its work memory, and the seconds that the sparse one would take
    less."""

    module: str
    work: int
    saving: float


@dataclass(frozen=True)
class _Phase:
    """A graph in which everything is kept: bytes at each node without work memory, seconds of each node."""

    totals: np.ndarray
    seconds: list[float]
    dense: Mapping[int, _Dense]
    total_seconds: float

    def with_kernels(self, sparse: frozenset[str]) -> tuple[np.ndarray, float]:
        """(bytes at each node, seconds of all) if the modules ``sparse`` do without the dense kernel."""
        totals, seconds = self.totals.copy(), self.total_seconds
        for node, dense in self.dense.items():
            if dense.module in sparse:
                seconds -= dense.saving
            else:
                totals[node] += dense.work
        return totals, seconds


class Space:
    """All choices for one micro-batch and one order of branches; ``measure`` predicts what each needs."""

    def __init__(self, network: Network, job: Job, micro_batch: int, keep_both: bool = False) -> None:
        self.network, self.job = network, job
        self.start = Choice(micro_batch, keep_both)
        bound = network.buffers(micro_batch, job.objective.two_branches)
        self.bound_bytes = sum(buffer.bytes for buffer in bound.values())
        self.modules = {kernel.offset: name for name, kernel in network.kernels.items()}
        training = training_graph(network, micro_batch, job.objective.name, job.beta, keep_both)
        self.sketch = Sketch(training)
        self.stacks = self.sketch.kept
        self.large = len(self.stacks) > _LARGE
        self.phases = {
            "training": self._phase(training),
            "attack": self._phase(attack_graph(network, micro_batch)),
            "eval": self._phase(evaluation_graph(network, micro_batch)),
        }
        self.start = replace(self.start, sparse=self._faster_without_dense())
        seconds = self.phases["training"].seconds
        self._by_worth = sorted(
            self.stacks, key=lambda t: -self.sketch.bytes_of(t) / seconds[self.sketch.producer[t]]
        )

    def _phase(self, graph: Graph) -> _Phase:
        types = tensor_types(graph)
        plan = replay(graph, self.network.connections)
        totals = np.array(plan.totals, np.int64) + self.bound_bytes
        seconds = [self._time(*of_node) for of_node in zip(plan.walks, plan.moved, strict=True)]
        dense: dict[int, _Dense] = {}
        for index, node in enumerate(graph.nodes):
            rule = OPERATORS[node.operator]
            other = rule.without_work(node)
            if other is not None:
                walks = rule.walks(other, types, self._connections)
                seconds_without = self._time(walks, rule.bytes_moved(other, types, self._connections))
                module = self.modules[node.attributes["layer_offset"]]
                dense[index] = _Dense(module, rule.work_bytes(node, types), seconds[index] - seconds_without)
                totals[index] -= dense[index].work
        return _Phase(totals, seconds, dense, sum(seconds))

    def _faster_without_dense(self) -> frozenset[str]:
        """Layers dense enough for the dense kernels that this machine nevertheless runs faster without."""
        saved: dict[str, float] = defaultdict(float)
        for name, runs in self.job.runs(self.start.micro_batch).items():
            for dense in self.phases[name].dense.values():
                saved[dense.module] += runs * dense.saving
        return frozenset(module for module, seconds in saved.items() if seconds > 0)

    def _connections(self, node: Node) -> int:
        return self.network.connections[node.attributes["layer_offset"]]

    def _time(self, walks: tuple[Walk, ...], moved: int) -> float:
        return self.job.machine.seconds(walks, moved)

    def measure(self, choice: Choice) -> Figures:
        """What ``choice``, one of this space, needs."""
        totals, seconds, found = {}, {}, None
        for name, phase in self.phases.items():
            totals[name], seconds[name] = phase.with_kernels(choice.sparse)
        if choice.storage:
            found = self.sketch.rewritten(choice.storage)
            totals["training"], more = self._rewritten(choice, found)
            seconds["training"] += more
        runs = self.job.runs(choice.micro_batch)
        each = sum(count * seconds[phase] for phase, count in runs.items()) / self.job.batch_size
        peak = max(self.bound_bytes, *(int(total.max()) for total in totals.values()))
        return Figures(choice, peak, each, totals, found)

    def _rewritten(self, choice: Choice, found: Rewritten) -> tuple[np.ndarray, float]:
        """(bytes at each step, seconds of what is inserted) of the training graph that ``choice`` makes."""
        phase = self.phases["training"]
        totals = found.totals + self.bound_bytes
        seconds = found.after * self._time((), 0)
        seconds += sum(self._time((), 3 * size // 2) for size in (*found.narrowed, *found.widened))
        seconds += sum(phase.seconds[node] for _, node in found.repeats)
        repeats = [(step, phase.dense[node]) for step, node in found.repeats if node in phase.dense]
        for step, dense in repeats:
            if dense.module in choice.sparse:
                seconds -= dense.saving
            else:
                totals[step] += dense.work
        for node, dense in phase.dense.items():
            if dense.module not in choice.sparse:
                totals[found.steps[node]] += dense.work
        return totals, seconds

    def moves(self, figures: Figures) -> Iterator[Choice]:
        """Every choice that is one change away and touches the peak of ``figures``; what saves most for its
        time comes first.
        """
        choice, storage = figures.choice, figures.choice.storage
        name = max(figures.totals, key=lambda name: int(figures.totals[name].max()))
        step = int(figures.totals[name].argmax())
        phase, node, steps = self.phases[name], step, np.arange(len(self.phases[name].seconds))
        if name == "training" and figures.rewritten is not None:
            found = figures.rewritten
            steps = found.steps
            node = dict(found.repeats).get(step, int(np.searchsorted(steps, step)))
        dense = phase.dense.get(node)
        if dense is not None and dense.module not in choice.sparse:
            yield replace(choice, sparse=choice.sparse | {dense.module})
        if name != "training":
            return
        for tensor in self._by_worth:
            written = steps[self.sketch.producer[tensor]] <= step
            if written and tensor not in storage.recomputed | storage.narrowed:
                yield replace(choice, storage=replace(storage, recomputed=storage.recomputed | {tensor}))
                if self.job.bfloat16:
                    yield replace(choice, storage=replace(storage, narrowed=storage.narrowed | {tensor}))

    def _improved(self, figures: Figures, cap: int, price: bool, large: bool) -> Figures | None:
        """The best change of ``figures`` that brings it nearer to ``cap``, or None if none does.

        "Best" is the least time for what it gains, or, without ``price``, the largest gain. If the space
        counts as ``large``, the changes are tried a few at a time, and several are made at once where that
        gains more.
        """
        excess = figures.excess(cap)
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
            found = self._improved(found, cap, price=True, large=self.large)
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

    def smallest(self, of_one_branch: Storage | None = None) -> Figures:
        """The choice with the least peak that is found, whatever it costs.

        Args:
            of_one_branch: what is smallest for one branch; the search for two then begins there, in each.
        """
        without_dense = frozenset(
            dense.module for phase in self.phases.values() for dense in phase.dense.values()
        )
        start = replace(self.start, sparse=without_dense)
        fixed = self.measure(start)
        floor = max(self.bound_bytes, *(int(fixed.totals[phase].max()) for phase in ("attack", "eval")))
        best = fixed
        if of_one_branch is None:
            costs = {tensor: self._repetition(tensor) for tensor in self.stacks}
            kinds: tuple[tuple[Repetition, ...], ...] = ((), ("elements",), ("elements", "pass"))
            starts = [Storage(frozenset(t for t in self.stacks if costs[t] in kind)) for kind in kinds]
        else:
            starts = [
                Storage(
                    self._in_branches(of_one_branch.recomputed), self._in_branches(of_one_branch.narrowed)
                )
            ]
        # In a large space neither the large steps nor the small ones always find the less; with bfloat16,
        # which doubles the changes, the small ones take too long.
        both = self.large and of_one_branch is None and not self.job.bfloat16
        ways = (True, False) if both else (self.large,)
        for storage, large in product(starts, ways):
            found = self._descend(self.measure(replace(start, storage=storage)), floor, large)
            found = self._polish(found, floor)
            if found.peak_bytes < best.peak_bytes:
                best = found
        return best

    def _repetition(self, tensor: str) -> Repetition:
        """What it costs to make a stack once more."""
        return OPERATORS[self.sketch.nodes[self.sketch.producer[tensor]].operator].repetition

    def _in_branches(self, tensors: frozenset[str]) -> frozenset[str]:
        return frozenset(tensor for tensor in self.stacks if tensor.partition(".")[2] in tensors)

    def _descend(self, figures: Figures, floor: int, large: bool) -> Figures:
        best, now = figures, self._improved(figures, floor, price=False, large=large)
        while now is not None:
            if now.peak_bytes < best.peak_bytes:
                best = now
            now = self._improved(now, floor, price=False, large=large)
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


Found = dict[tuple[bool, str, bool, int], Figures]
"""(batch statistics, objective, bfloat16 allowed, images) → the smallest choice of one network."""


def smallest(
    network: Network, job: Job, micro_batch: int | None = None, known: Found | None = None
) -> Figures:
    """The smallest working set that is found for ``micro_batch`` images (default: as few as possible).

    Args:
        known: keeps what is found, for other questions about the same network, machine and batch.
    """
    known = {} if known is None else known
    images = micro_batch or (2 if network.batch_statistics else 1)
    key = (network.batch_statistics, job.objective.name, job.bfloat16, images)
    if key in known:
        return known[key]
    options = []
    if job.bfloat16:  # which is allowed, not asked for
        options.append(smallest(network, replace(job, bfloat16=False), micro_batch, known))
    of_one_branch = None
    if job.objective.two_branches:
        simple = replace(job, objective=PLAIN)
        of_one_branch = smallest(network, simple, micro_batch, known).choice.storage
    options += [
        Space(network, job, images, keep).smallest(of_one_branch) for keep in branch_orders(network, job)
    ]
    known[key] = min(options, key=lambda figures: figures.peak_bytes)
    return known[key]


def fastest(
    network: Network,
    job: Job,
    budget: int,
    micro_batch: int | None = None,
    least: Figures | None = None,
    known: dict[tuple[int, bool], Space] | None = None,
) -> Figures | None:
    """The fastest choice found inside ``budget`` bytes, None if there is none.

    Args:
        micro_batch: only this many images.
        least: what ``smallest`` gave for the same arguments, if it is there already.
        known: keeps what is the same for other budgets of the same network and job.
    """
    known = {} if known is None else known

    def space_of(images: int, keep: bool) -> Space:
        if (images, keep) not in known:
            known[images, keep] = Space(network, job, images, keep)
        return known[images, keep]

    spaces: list[tuple[Figures, Space, Figures]] = []
    least = least or smallest(network, job, micro_batch)
    for images in [micro_batch] if micro_batch else micro_batches(network, job):
        tried = [space_of(images, keep) for keep in branch_orders(network, job)]
        found = [
            (space.measure(space.start), space, space.measure(_carried_over(least.choice, space)))
            for space in tried
        ]
        spaces += found
        if min(least_here.peak_bytes for _, _, least_here in found) > _HOPELESS * budget:
            break  # larger micro-batches are hopeless, too
    spaces.sort(key=lambda entry: entry[0].seconds)
    if spaces[0][0].peak_bytes <= budget:
        return spaces[0][0]
    if budget < least.peak_bytes:
        return None
    best = space_of(least.choice.micro_batch, least.choice.keep_both).prune(least, budget)
    for unchanged, space, least_here in spaces:
        if unchanged.seconds >= best.seconds:
            break
        fits = unchanged.peak_bytes <= budget
        squeezed = unchanged if fits else _squeeze(space, unchanged, least_here, budget)
        if squeezed is not None and squeezed.seconds < best.seconds:
            best = squeezed
    return best


def _carried_over(choice: Choice, space: Space) -> Choice:
    """``choice`` with the images and the branches of ``space``."""
    known, storage = frozenset(space.stacks), choice.storage
    storage = Storage(storage.recomputed & known, storage.narrowed & known)
    return replace(space.start, storage=storage, sparse=choice.sparse)


def _squeeze(space: Space, unchanged: Figures, least_here: Figures, budget: int) -> Figures | None:
    """What fits of a space that does not without changes, None if nothing seems to.

    Args:
        unchanged: without changes. least_here: with those of the smallest choice of all.
    """
    found = space.fit(budget, unchanged) if least_here.peak_bytes <= _PROMISING * budget else None
    if least_here.peak_bytes <= budget:
        pruned = space.prune(least_here, budget)
        if found is None or pruned.seconds < found.seconds:
            return pruned
    return found
