"""The planner: the fastest way to train a network inside a byte budget.

It chooses the micro-batch, which activations are recomputed (or, where that is allowed, kept as bfloat16),
which layers do without the dense kernel's work memory, and whether the clean branch of a two-branch
objective is kept or computed again. Images lie side by side in the largest number that divides the
micro-batch: that costs no memory.

Micro-batches are tried in order of the time they would take if memory were free, until none can be faster
than the best that fits; `space` searches in one of them. What is smallest of all is searched for once,
independently of the budget, so that a budget is feasible exactly if it is not below that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from edge_bcs.targets.cost_model import lanes_of

from edge_bcs.core.objectives import PLAIN

from ..graphs import step_graphs
from ..network import Network
from .choice import Choice, Job
from .replay import Replay, replay
from .space import Figures, Space
from .storage import Storage

DEFAULT_MICRO_BATCH = 32
"""Images a run where no budget asks for fewer: 16, whole vectors, for each of two threads. More are hardly
faster, and what a micro-batch's statistics teach must not depend on the machine that compiles."""
_LARGEST = 128  # micro-batch
_HOPELESS = 1.25  # times the budget that the smallest choice may need there, for larger ones to be looked at


@dataclass(frozen=True)
class Planner:
    """The choices for one network. What was found out for one question is kept for the next."""

    network: Network
    _replays: dict[tuple[object, ...], dict[str, Replay]] = field(default_factory=dict)
    _spaces: dict[tuple[Job, Choice], Space] = field(default_factory=dict)
    _smallest: dict[tuple[Job, int], Figures] = field(default_factory=dict)

    def replays(self, job: Job, choice: Choice) -> dict[str, Replay]:
        """Phase → graph with the images and branches of ``choice``, in which everything is kept."""
        key = (choice.micro_batch, job.objective, job.beta, choice.keep_both)
        if key not in self._replays:
            graphs = step_graphs(self.network, *key)
            self._replays[key] = {
                phase: replay(graph, self.network.connections) for phase, graph in graphs.items()
            }
        return self._replays[key]

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
            orders = (True, False) if self.network.batch_statistics else (False, True)
        return [self.space(job, micro_batch, keep) for keep in orders]

    def micro_batches(self, job: Job) -> list[int]:
        """Numbers of images worth trying: all up to 16, beyond that those that fill vectors of 8 or more."""
        least = self.network.fewest_images
        most = max(least, min(job.batch_size, _LARGEST))
        sizes = [n for n in range(least, most + 1) if n <= 16 or (n % 8 == 0 and lanes_of(n) >= 8)]
        return sizes if most in sizes else [*sizes, most]

    def unlimited(self, job: Job, micro_batch: int | None = None) -> Choice:
        """What the backward pass reads is kept, or all of it as bfloat16 where the job allows that."""
        images = micro_batch or min(DEFAULT_MICRO_BATCH, max(self.network.fewest_images, job.batch_size))
        choice = Choice(images, job.objective.two_branches and self.network.batch_statistics)
        if not job.bfloat16:
            return choice
        stacks = self.space(job, images, choice.keep_both).stacks
        return replace(choice, storage=Storage(narrowed=frozenset(stacks)))

    def smallest(self, job: Job, micro_batch: int | None = None) -> Figures:
        """The smallest working set that is found for ``micro_batch`` images (default: as few as possible)."""
        images = micro_batch or self.network.fewest_images
        if (job, images) not in self._smallest:
            options = self._small(job, images)
            self._smallest[job, images] = min(options, key=lambda figures: figures.peak_bytes)
        return self._smallest[job, images]

    def _small(self, job: Job, images: int) -> Iterator[Figures]:
        if job.bfloat16:  # which is allowed, not asked for
            yield self.smallest(replace(job, bfloat16=False), images)
        of_one_branch = None
        if job.objective.two_branches:
            of_one_branch = self.smallest(replace(job, objective=PLAIN), images).choice.storage
        for space in self.spaces(job, images):
            yield space.smallest(of_one_branch)

    def fastest(self, job: Job, budget: int, micro_batch: int | None = None) -> Figures | None:
        """The fastest choice found inside ``budget`` bytes, None if there is none.

        Args:
            micro_batch: only this many images.
        """
        least = self.smallest(job, micro_batch)
        if budget < least.peak_bytes:
            return None
        looked_at: list[tuple[Space, Figures]] = []
        for images in [micro_batch] if micro_batch else self.micro_batches(job):
            carried = [(space, space.carried_over(least.choice)) for space in self.spaces(job, images)]
            looked_at += carried
            if min(figures.peak_bytes for _, figures in carried) > _HOPELESS * budget:
                break  # larger micro-batches are hopeless, too
        looked_at.sort(key=lambda entry: entry[0].unchanged.seconds)
        if looked_at[0][0].unchanged.peak_bytes <= budget:
            return looked_at[0][0].unchanged
        best = self.space(job, least.choice.micro_batch, least.choice.keep_both).prune(least, budget)
        for space, carried_over in looked_at:
            if space.unchanged.seconds >= best.seconds:
                break
            found = space.fastest(budget, carried_over)
            if found is not None and found.seconds < best.seconds:
                best = found
        return best
