"""The planner: the fastest way to train a network inside a byte budget.

It chooses the micro-batch, how many images are attacked at once, which activations are recomputed (or, where
that is allowed, kept as bfloat16), which layers do without the dense kernel's work memory, and whether the
clean branch of a two-branch objective is kept or computed again. Images lie side by side in the largest
number that divides the micro-batch: that costs no memory.

Micro-batches are tried in order of the time they would take if memory were free, until none can be faster
than the best that fits; `space` searches in one of them. What is smallest of all is searched for once,
independently of the budget, so that a budget is feasible exactly if it is not below that.

The searches add up what is alive at once, in whole units of the alignment, which no arena can undercut; what
they find is then placed, and its peak is the arena's. A plan whose holes bring it over the budget is passed
over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from edge_bcs.runtime.buffers import aligned
from edge_bcs.targets.cost_model import lanes_of
from edge_bcs.targets.plans import MemoryPlan

from edge_bcs.core.objectives import PLAIN

from ..graphs import attack_graph, evaluation_graph, other_graphs, training_graph
from ..network import Network
from ..nodes import Graph
from .choice import Choice, Job
from .replay import Replay, plan, replay_of
from .space import Figures, Space
from .storage import Storage, store, without_dense_kernels

DEFAULT_MICRO_BATCH = 32
"""Images a run where no budget asks for fewer: 16, whole vectors, for each of two threads. More are hardly
faster, and what a micro-batch's statistics teach must not depend on the machine that compiles."""
_LARGEST = 128  # micro-batch
_PLACINGS = 8  # plans that are placed to find one whose arena is inside the budget
_WORTH = 0.98  # of the time, which more images that are attacked at once must come to: they take memory
_SURE = 0.96  # of the time, which fewer images of the training graph must come to: predictions are not better
_HOPELESS = 1.25  # times the budget that the smallest choice may need there, for larger ones to be looked at


@dataclass(frozen=True)
class Planner:
    """The choices for one network. What was found out for one question is kept for the next."""

    network: Network
    _replays: dict[tuple[object, ...], Replay] = field(default_factory=dict)
    _spaces: dict[tuple[Job, Choice], Space] = field(default_factory=dict)
    _counted: dict[tuple[Job, int], Figures] = field(default_factory=dict)
    _smallest: dict[tuple[Job, int], Figures] = field(default_factory=dict)
    _memory: dict[tuple[Job, Choice], MemoryPlan] = field(default_factory=dict)

    def replays(self, job: Job, choice: Choice) -> dict[str, Replay]:
        """Phase → graph with the images and branches of ``choice``, in which everything is kept."""
        network, images = self.network, choice.images
        made = {
            "training": self._replay(
                training_graph, choice.micro_batch, job.objective, job.beta, choice.keep_both
            )
        }
        if not network.attack_apart:
            made["attack"] = self._replay(attack_graph, images)
        made["eval"] = self._replay(evaluation_graph, images)
        return made

    def _replay(self, make: Callable[..., Graph], *key: object) -> Replay:
        """Of the graph that ``make`` makes of the network and what decides it."""
        if (make, *key) not in self._replays:
            self._replays[(make, *key)] = replay_of(make(self.network, *key), self.network.connections)
        return self._replays[(make, *key)]

    def carried_out(self, job: Job, choice: Choice) -> dict[str, Replay]:
        """Phase → graph that ``choice`` makes, of all phases."""
        network = self.network
        made: dict[str, Replay] = {}
        for phase, replay in self.replays(job, choice).items():
            graph = without_dense_kernels(replay.graph, network.offsets(choice.sparse))
            if phase == "training":
                graph = store(graph, choice.storage)
            made[phase] = replay if graph is replay.graph else replay_of(graph, network.connections)
        for phase, graph in other_graphs(network, choice.images).items():
            made[phase] = replay_of(graph, network.connections)
        return made

    def memory(self, job: Job, choice: Choice) -> MemoryPlan:
        """Where everything lies with ``choice``."""
        if (job, choice) not in self._memory:
            buffers = self.network.buffers(choice.images, job.objective.two_branches)
            apart = {"attack"} if self.network.attack_apart else set()
            self._memory[job, choice] = plan(self.carried_out(job, choice), buffers, apart)
        return self._memory[job, choice]

    def _placed(self, job: Job, figures: Figures) -> Figures:
        """The same with the peak of the arena, which holes belong to."""
        return replace(figures, peak_bytes=self.memory(job, figures.choice).peak_bytes)

    def space(self, job: Job, micro_batch: int, keep_both: bool = False) -> Space:
        """All choices for so many images and one order of branches."""
        start = Choice(micro_batch, keep_both)
        if (job, start) not in self._spaces:
            self._spaces[job, start] = Space(self.network, job, start, self.replays(job, start))
        return self._spaces[job, start]

    def spaces(self, job: Job, micro_batch: int) -> list[Space]:
        """One for each order of branches, that which is the default first."""
        orders: tuple[bool, ...] = (False,)
        if job.objective.two_branches:
            orders = (True, False) if self.network.keeps_both else (False, True)
        return [self.space(job, micro_batch, keep) for keep in orders]

    def micro_batches(self, job: Job, micro_batch: int | None = None) -> list[int]:
        """Numbers of images worth trying: all up to 16, beyond that those that fill vectors of 8 or more; or
        ``micro_batch`` alone."""
        if micro_batch:
            return [micro_batch]
        least = self.network.fewest_images
        most = max(least, min(job.batch_size, _LARGEST))
        sizes = [n for n in range(least, most + 1) if n <= 16 or (n % 8 == 0 and lanes_of(n) >= 8)]
        return sizes if most in sizes else [*sizes, most]

    def unlimited(self, job: Job, micro_batch: int | None = None) -> Choice:
        """What the backward pass reads is kept, or all of it as bfloat16 where the job allows that."""
        micro_batch = micro_batch or min(DEFAULT_MICRO_BATCH, max(self.network.fewest_images, job.batch_size))
        choice = Choice(micro_batch, job.objective.two_branches and self.network.keeps_both)
        if not job.bfloat16:
            return choice
        space = self.space(job, micro_batch, choice.keep_both)
        return replace(choice, storage=Storage(narrowed=frozenset(space.stacks)))

    def smallest(self, job: Job, micro_batch: int | None = None) -> Figures:
        """The smallest arena that is found for ``micro_batch`` images (default: as few as possible)."""
        micro_batch = micro_batch or self.network.fewest_images
        if (job, micro_batch) not in self._smallest:
            counted = sorted(self._small(job, micro_batch), key=lambda figures: figures.peak_bytes)
            self._counted[job, micro_batch] = counted[0]
            found = self._placed(job, counted[0])
            for other in counted[1:]:
                if other.peak_bytes < found.peak_bytes:
                    found = min(found, self._placed(job, other), key=lambda figures: figures.peak_bytes)
            self._smallest[job, micro_batch] = found
        return self._smallest[job, micro_batch]

    def _smallest_counted(self, job: Job, micro_batch: int) -> Figures:
        """The smallest by what is alive at once."""
        self.smallest(job, micro_batch)
        return self._counted[job, micro_batch]

    def _small(self, job: Job, micro_batch: int) -> Iterator[Figures]:
        if job.bfloat16:  # which is allowed, not asked for
            yield self._smallest_counted(replace(job, bfloat16=False), micro_batch)
        of_one_branch = None
        if job.objective.two_branches:
            of_one_branch = self._smallest_counted(replace(job, objective=PLAIN), micro_batch).choice.storage
        for space in self.spaces(job, micro_batch):
            yield from space.smallest(of_one_branch)

    def fastest(self, job: Job, budget: int, micro_batch: int | None = None) -> Figures | None:
        """The fastest choice found whose arena has at most ``budget`` bytes, None if there is none.

        Args:
            micro_batch: only this many images.
        """
        found = self._fastest(job, budget, micro_batch)
        if found is None:
            return None
        best = self._wider(job, found, budget)
        if micro_batch is None and job.runs(1)["attack"]:
            # Most of a step is the attack's: what fewer images of the training graph leave may be worth more.
            for size in self._halves(found.choice.micro_batch):
                other = self._fastest(job, budget, size)
                if other is not None:
                    found = self._wider(job, other, budget)
                    best = found if found.seconds < _SURE * best.seconds else best
        return best

    def _halves(self, micro_batch: int) -> list[int]:
        """Halves of a micro-batch, and halves of these."""
        sizes = []
        while micro_batch // 2 >= self.network.fewest_images:
            micro_batch //= 2
            sizes.append(micro_batch)
        return sizes

    def _wider(self, job: Job, figures: Figures, budget: int) -> Figures:
        """The same with as many images at once in attacks and evaluation as are worth their memory."""
        replays = self.carried_out(job, figures.choice)
        best = replace(figures, seconds=_seconds(job, figures.choice, replays))
        size = figures.choice.micro_batch
        if not job.runs(size)["attack"]:
            return best
        for images in self.micro_batches(job):
            if images <= size or images % size:
                continue
            choice = replace(figures.choice, attack_micro_batch=images)
            buffers = self.network.buffers(images, job.objective.two_branches)
            bound = sum(aligned(buffer.bytes) for buffer in buffers.values())
            replays = self.carried_out(job, choice)
            if bound + max(max(replay.room, default=0) for replay in replays.values()) > budget:
                break
            seconds = _seconds(job, choice, replays)
            if seconds < _WORTH * best.seconds and (peak := self.memory(job, choice).peak_bytes) <= budget:
                best = replace(figures, choice=choice, peak_bytes=peak, seconds=seconds)
        return best

    def _fastest(self, job: Job, budget: int, micro_batch: int | None) -> Figures | None:
        least = self.smallest(job, micro_batch)
        if budget < least.peak_bytes:
            return None
        cap = budget
        for _ in range(_PLACINGS):
            figures = self.fastest_counted(job, cap, micro_batch)
            if figures is None:
                break
            placed = self._placed(job, figures)
            if placed.peak_bytes <= budget:
                return placed
            cap = min(cap + budget - placed.peak_bytes, figures.peak_bytes - 1)
        return least

    def fastest_counted(self, job: Job, budget: int, micro_batch: int | None = None) -> Figures | None:
        """The fastest choice found that has at most ``budget`` bytes alive at once; its arena may be
        larger."""
        least = self._smallest_counted(job, micro_batch or self.network.fewest_images)
        if budget < least.peak_bytes:
            return None
        spaces: list[Space] = []
        for size in self.micro_batches(job, micro_batch):
            spaces += self.spaces(job, size)
            if all(
                space.carried_over(least.choice).peak_bytes > _HOPELESS * budget
                for space in self.spaces(job, size)
            ):
                break  # larger micro-batches are hopeless, too
        spaces.sort(key=lambda space: space.unchanged.seconds)
        if spaces[0].unchanged.peak_bytes <= budget:
            return spaces[0].unchanged
        best = self.space(job, least.choice.micro_batch, least.choice.keep_both).prune(least, budget)
        for space in spaces:
            if space.unchanged.seconds >= best.seconds:
                break
            figures = space.fastest(budget, least.choice)
            if figures is not None and figures.seconds < best.seconds:
                best = figures
        return best


def _seconds(job: Job, choice: Choice, replays: Mapping[str, Replay]) -> float:
    """Predicted seconds an image, all phases of a step."""
    runs = job.runs(choice.micro_batch, choice.images)
    each = {
        name: sum(map(job.machine.seconds, replays[name].walks, replays[name].moved))
        for name, count in runs.items()
        if count
    }
    return sum(runs[name] * seconds for name, seconds in each.items()) / job.batch_size
