"""The choices for one micro-batch and one order of branches: what each needs, and the search among them.

A choice is worth its predicted seconds an image (`cost_model`) and is allowed if its predicted peak, by the
replay that the artifact's plan comes from, does not exceed the budget.

The search is greedy: while the peak is too high, of all changes that touch it, it makes the one with the
least time for each byte·operator that it brings under the budget; then it takes back what turned out not to
be needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
from edge_bcs.runtime.buffers import aligned
from edge_bcs.targets.cost_model import Walk

from ..network import Network
from ..operators import OPERATORS
from ..operators.base import Repetition
from .choice import Choice, Job, together
from .replay import Replay
from .sketch import Rewritten, Sketch
from .storage import Storage

_LARGE = 32  # stacks, beyond which a space is searched in larger steps
_AT_A_TIME = 12  # changes that are compared there
_TRIALS = 400  # single changes that are tried on the smallest choice
_PROMISING = 1.05  # times the budget that the smallest choice of all may need here, for a closer look


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
    """All choices for one micro-batch and one order of branches; ``measure`` predicts what each needs.

    Attributes:
        unchanged: the fastest choice, if memory were free. stacks: the tensors that may be stored otherwise.
    """

    def __init__(self, network: Network, job: Job, start: Choice, replays: Mapping[str, Replay]) -> None:
        """Prepare the replays of the graphs in which everything is kept."""
        self.network, self.job, self.micro_batch = network, job, start.micro_batch
        self.sketch = Sketch(replays["training"])
        self.stacks = self.sketch.kept
        self.large = len(self.stacks) > _LARGE
        self.phases = {name: self._phase(replay) for name, replay in replays.items()}
        self.unchanged = self.measure(replace(start, sparse=self._faster_without_dense()))

    @cached_property
    def bound_bytes(self) -> int:
        """Bytes of the bound buffers, one behind the other."""
        buffers = self.network.buffers(self.micro_batch, self.job.objective.two_branches)
        return sum(aligned(buffer.bytes) for buffer in buffers.values())

    @cached_property
    def _seconds_again(self) -> dict[str, float]:
        """Stack → seconds that it takes to make it once more."""
        return {tensor: self._again(tensor) for tensor in self.sketch.makers}

    @cached_property
    def _by_worth(self) -> list[str]:
        """The stacks, those first whose bytes cost the least time."""
        return sorted(self.stacks, key=lambda t: -self.sketch.bytes_of(t) / self._seconds_again[t])

    def _again(self, tensor: str) -> float:
        node = self._repeats(tensor)
        if node is not None:
            return self.phases["training"].seconds[node]
        again = self.sketch.makers[tensor].node
        moved = OPERATORS[again.operator].bytes_moved(again, self.sketch.types, lambda _: 0)
        return self._time((), moved)

    def _repeats(self, tensor: str) -> int | None:
        """The node that runs again where a stack is made once more; None if another, smaller one does."""
        maker = self.sketch.makers[tensor]
        return maker.position if maker.node.operator == self.sketch.nodes[maker.position].operator else None

    def _phase(self, replay: Replay) -> _Phase:
        modules = {kernel.offset: name for name, kernel in self.network.kernels.items()}
        totals = np.array(replay.room, np.int64) + self.bound_bytes
        seconds = [self._time(*of_node) for of_node in zip(replay.walks, replay.moved, strict=True)]
        dense: dict[int, _Dense] = {}
        for index, (size, walks, moved) in replay.without_work.items():
            work = aligned(size)
            module = modules[replay.graph.nodes[index].attributes["layer_offset"]]
            dense[index] = _Dense(module, work, seconds[index] - self._time(walks, moved))
            totals[index] -= work
        return _Phase(totals, seconds, dense, sum(seconds))

    def _faster_without_dense(self) -> frozenset[str]:
        """Layers dense enough for the dense kernels that this machine nevertheless runs faster without."""
        saved: dict[str, float] = defaultdict(float)
        runs = self.job.runs(self.micro_batch)
        for name in self.phases:
            for dense in self.phases[name].dense.values():
                saved[dense.module] += runs[name] * dense.saving
        return frozenset(module for module, seconds in saved.items() if seconds > 0)

    def _time(self, walks: tuple[Walk, ...], moved: int) -> float:
        return self.job.machine.seconds(walks, moved)

    def measure(self, choice: Choice) -> Figures:
        """What ``choice``, one of this space, needs."""
        totals, seconds, rewritten = {}, {}, None
        for name, phase in self.phases.items():
            totals[name], seconds[name] = phase.with_kernels(choice.sparse)
        if choice.storage:
            rewritten = self.sketch.rewritten(choice.storage)
            totals["training"], seconds["training"] = self._rewritten(choice, rewritten, seconds["training"])
        runs = self.job.runs(self.micro_batch)
        each = sum(runs[name] * seconds[name] for name in self.phases) / self.job.batch_size
        peak = max(self.bound_bytes, *(int(total.max()) for total in totals.values()))
        return Figures(choice, peak, each, totals, rewritten)

    def _rewritten(self, choice: Choice, rewritten: Rewritten, kept: float) -> tuple[np.ndarray, float]:
        """(bytes at each step, seconds) of the training graph that ``choice`` makes, of one of ``kept``."""
        phase = self.phases["training"]
        totals = rewritten.totals + self.bound_bytes
        seconds = rewritten.after * self._time((), 0)
        seconds += sum(self._time((), 3 * size // 2) for size in (*rewritten.narrowed, *rewritten.widened))
        seconds += sum(self._seconds_again[tensor] for _, tensor in rewritten.repeats)
        for step, tensor in rewritten.repeats:
            node = self._repeats(tensor)
            dense = None if node is None else phase.dense.get(node)
            if dense is None:
                continue
            if dense.module in choice.sparse:
                seconds -= dense.saving
            else:
                totals[step] += dense.work
        for node, dense in phase.dense.items():
            if dense.module not in choice.sparse:
                totals[rewritten.steps[node]] += dense.work
        return totals, kept + seconds

    def moves(self, figures: Figures) -> Iterator[Choice]:
        """Every choice that is one change away and touches the peak of ``figures``; what saves most for its
        time comes first.
        """
        choice, storage = figures.choice, figures.choice.storage
        name = max(figures.totals, key=lambda name: int(figures.totals[name].max()))
        step = int(figures.totals[name].argmax())
        phase, steps = self.phases[name], np.arange(len(self.phases[name].seconds))
        node: int | None = step
        if name == "training" and figures.rewritten is not None:
            found = figures.rewritten
            steps = found.steps
            again = dict(found.repeats).get(step)
            node = int(np.searchsorted(steps, step)) if again is None else self._repeats(again)
        dense = None if node is None else phase.dense.get(node)
        if dense is not None and dense.module not in choice.sparse:
            yield replace(choice, sparse=choice.sparse | {dense.module})
        if name != "training":
            return
        for tensor in self._by_worth:
            written = steps[self.sketch.makers[tensor].position] <= step
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
                several = self.measure(together([entry[2].choice for entry in ranked[: size // 3]]))
                return several if several.excess(cap) < best.excess(cap) else best
        return None

    def fit(self, cap: int) -> Figures | None:
        """The fastest choice found whose peak is at most ``cap``, or None; see the module."""
        found: Figures | None = self.unchanged
        while found is not None and found.peak_bytes > cap:
            found = self._improved(found, cap, price=True, large=self.large)
        return None if found is None else self.prune(found, cap)

    def prune(self, figures: Figures, cap: int) -> Figures:
        """Take changes back, the dearest first, as long as the peak stays under ``cap``."""
        dearest = sorted(
            (self.measure(figures.choice.without(change)).seconds, index, change)
            for index, change in enumerate(figures.choice.changes)
        )
        for _, _, change in dearest:
            changed = self.measure(figures.choice.without(change))
            if changed.peak_bytes <= cap and changed.seconds < figures.seconds:
                figures = changed
        return figures

    def smallest(self, of_one_branch: Storage | None = None) -> list[Figures]:
        """The choices with the least peak that are found, whatever they cost, each by another way.

        Args:
            of_one_branch: what is smallest for one branch; the search for two then begins there, in each.
        """
        without_dense = frozenset(
            dense.module for phase in self.phases.values() for dense in phase.dense.values()
        )
        start = replace(self.unchanged.choice, sparse=without_dense)
        fixed = self.measure(start)
        others = self.phases.keys() - {"training"}
        floor = max(self.bound_bytes, *(int(fixed.totals[phase].max()) for phase in others))
        smallest = {start: fixed}
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
            smallest[found.choice] = found
        return sorted(smallest.values(), key=lambda figures: figures.peak_bytes)

    def _repetition(self, tensor: str) -> Repetition:
        """What it costs to make a stack once more."""
        return OPERATORS[self.sketch.makers[tensor].node.operator].repetition

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
            options = [*self.moves(best), *map(best.choice.without, best.choice.changes)]
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

    def carried_over(self, choice: Choice) -> Figures:
        """What ``choice`` needs with the images and the branches of this space."""
        known, storage = frozenset(self.stacks), choice.storage
        storage = Storage(storage.recomputed & known, storage.narrowed & known)
        return self.measure(replace(self.unchanged.choice, storage=storage, sparse=choice.sparse))

    def fastest(self, budget: int, smallest: Choice) -> Figures | None:
        """The fastest choice found inside ``budget`` bytes; None if nothing seems to fit.

        Args:
            smallest: the smallest choice of all, whose changes are carried over.
        """
        if self.unchanged.peak_bytes <= budget:
            return self.unchanged
        least = self.carried_over(smallest)
        found = self.fit(budget) if least.peak_bytes <= _PROMISING * budget else None
        if least.peak_bytes <= budget:
            pruned = self.prune(least, budget)
            if found is None or pruned.seconds < found.seconds:
                return pruned
        return found
