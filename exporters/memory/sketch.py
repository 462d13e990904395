"""What a rewritten training graph needs, without writing it: `storage.store` and `plan.replay` in short.

The planner asks this thousands of times. Only what differs from the graph in which everything is kept is
looked at: the gradient operators that read a recomputed or narrowed tensor, and what is inserted before them.
A node of the graph is known by its position there; a step is a position in the rewritten graph.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from edge_bcs.runtime.buffers import aligned

from ..nodes import Node
from ..operators import OPERATORS
from .replay import Replay
from .storage import Storage, kept_stacks, makers

Array = np.ndarray[Any, Any]


@dataclass
class Rewritten:
    """What ``Sketch.rewritten`` finds.

    Attributes:
        totals: bytes that are alive at each step, without work memory; each tensor in whole units of the
            alignment.
        steps: node → its step.
        repeats: (step, tensor that is made again) of each repetition.
        narrowed, widened: bytes in f32 of what each inserted Narrow and Widen works on.
        after: number of inserted After nodes.
    """

    totals: Array
    steps: Array
    repeats: list[tuple[int, str]] = field(default_factory=list)
    narrowed: list[int] = field(default_factory=list)
    widened: list[int] = field(default_factory=list)
    after: int = 0


class Sketch:
    """A training graph, prepared for the question."""

    def __init__(self, replay: Replay) -> None:
        graph = replay.graph
        self.nodes, self.types = graph.nodes, replay.types
        self.makers = makers(graph)
        self.kept = kept_stacks(self.makers)
        self.owner: dict[
            str, int
        ] = {}  # tensor → number of the allocation it lies in; bound ones are missing
        self.size: list[int] = []
        self.birth: list[int] = []
        self.death: list[int] = []
        self.forward_death: list[int] = []  # the last reader that is no gradient operator
        self.unread: set[int] = set()  # alive to the end, see `plan`, unless an inserted operator reads it
        self.readers: dict[str, list[int]] = defaultdict(list)  # kept stack → gradient operators
        kept = set(self.kept)
        for index, node in enumerate(graph.nodes):
            rule = OPERATORS[node.operator]
            for tensor in dict.fromkeys(node.inputs):
                if rule.backward and tensor in kept:
                    self.readers[tensor].append(index)
                self._touch(self.owner.get(tensor), index, rule.backward)
            for position, tensor in enumerate(node.outputs):
                if tensor and position in rule.aliases:
                    owner = self.owner.get(node.inputs[rule.aliases[position]])
                    if owner is not None:
                        self.owner[tensor] = owner
                        self._touch(owner, index, rule.backward)
                elif tensor and tensor not in graph.outputs:
                    self.owner[tensor] = len(self.size)
                    self.unread.add(len(self.size))
                    self.size.append(aligned(self.types[tensor].bytes))
                    self.birth.append(index)
                    self.death.append(len(graph.nodes) - 1)
                    self.forward_death.append(index)
        # What each operator reads of the stacks that could be made again.
        self.stacks = [self._stacks(node) for node in graph.nodes]
        # What an inserted operator is tied to: the last output that could not have been written long ago.
        self.token: list[int | None] = []
        last: int | None = None
        for node in graph.nodes:
            if not OPERATORS[node.operator].early:
                last = self.owner.get(next(tensor for tensor in node.outputs if tensor))
            self.token.append(last)
        self.arrays = tuple(np.array(numbers, np.int64) for numbers in (self.size, self.birth, self.death))

    @cached_property
    def again(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Stack → what making it again reads: of the stacks that could be made again, and of all other
        allocations."""
        return {
            tensor: (self._stacks(maker.node), self._others(maker.node))
            for tensor, maker in self.makers.items()
        }

    def _stacks(self, node: Node) -> tuple[str, ...]:
        return tuple(tensor for tensor in node.inputs if tensor in self.makers)

    def _others(self, node: Node) -> tuple[int, ...]:
        return tuple(
            {
                self.owner[tensor]
                for tensor in node.inputs
                if tensor in self.owner and tensor not in self.makers
            }
        )

    def _touch(self, owner: int | None, index: int, late: bool) -> None:
        if owner is not None:
            self.unread.discard(owner)
            self.death[owner] = index
            if not late:
                self.forward_death[owner] = index

    def bytes_of(self, tensor: str) -> int:
        """Bytes of a kept stack, in whole units of the alignment."""
        return self.size[self.owner[tensor]]

    def rewritten(self, storage: Storage) -> Rewritten:
        """What becomes of the graph with ``storage``."""
        return Pass(self, storage).result()


class Pass:
    """One walk over the operators that change; new allocations are numbered on from those of the graph."""

    def __init__(self, sketch: Sketch, storage: Storage) -> None:
        self.sketch, self.storage = sketch, storage
        self.kept = {*sketch.kept} - storage.recomputed
        self.gaps: list[int] = []  # of each inserted step: the node before which it comes
        self.size: list[int] = []
        self.birth: list[int] = []
        # Allocation → the last step known to read it: steps are looked at in ascending order. None stands for
        # bound memory.
        self.last: dict[int | None, int] = {}
        self.again: dict[str, int] = {}
        self.narrow: dict[str, int] = {}
        self.token: int | None = None
        self.found = Rewritten(np.zeros(0), np.zeros(0))

    def result(self) -> Rewritten:
        """What becomes of the graph."""
        sketch, storage = self.sketch, self.storage
        changed = {g for tensor in storage.recomputed | storage.narrowed for g in sketch.readers[tensor]}
        after: dict[int, list[str]] = defaultdict(list)
        for tensor in sketch.kept:  # in the order of their making
            if tensor in storage.narrowed:
                after[sketch.makers[tensor].position + 1].append(tensor)
        for gap in sorted(changed | after.keys()):
            for tensor in after.get(gap, ()):
                self._narrow(tensor, gap)
            if gap in changed:
                self._gradient(gap)
        return self.summed()

    def _step(self, gap: int, *read: int | None) -> int:
        """Insert an operator before node ``gap`` that reads allocations; returns its step."""
        step = gap + len(self.gaps)
        self.gaps.append(gap)
        for allocation in read:
            self.last[allocation] = step
        return step

    def _allocate(self, size: int, step: int) -> int:
        number = len(self.sketch.size) + len(self.size)
        self.size.append(size)
        self.birth.append(step)
        self.last[number] = step
        return number

    def _narrow(self, tensor: str, gap: int) -> None:
        owner = self.sketch.owner[tensor]
        size = self.sketch.size[owner]
        self.narrow[tensor] = self._allocate(aligned(size // 2), self._step(gap, owner))
        self.found.narrowed.append(size)
        if not self.sketch.makers[tensor].aside:
            self._step(gap, owner, self.narrow[tensor])
            self.found.after += 1

    def _gradient(self, gap: int) -> None:
        self.token = self.sketch.token[gap - 1]
        passing: dict[str, int] = {}
        read = [self._late(tensor, passing, gap) for tensor in self.sketch.stacks[gap]]
        step = gap + len(self.gaps)
        for allocation in read:
            self.last[allocation] = step

    def _late(self, tensor: str, passing: dict[str, int], gap: int) -> int:
        """The allocation from which the backward pass reads ``tensor``; see ``storage``."""
        known = self.again.get(tensor, passing.get(tensor))
        if known is not None:
            return known
        if tensor in self.storage.narrowed:
            step = self._step(gap, self.narrow[tensor], self.token)
            size = self.sketch.bytes_of(tensor)
            self.token = self.again[tensor] = self._allocate(size, step)
            self.found.widened.append(size)
            return self.token
        if tensor in self.kept:
            return self.sketch.owner[tensor]
        names = self.again if tensor in self.storage.recomputed else passing
        names[tensor] = self._repeat(tensor, passing, gap)
        return names[tensor]

    def _repeat(self, tensor: str, passing: dict[str, int], gap: int) -> int:
        stacks, others = self.sketch.again[tensor]
        read = [self._late(stack, passing, gap) for stack in stacks]
        self._step(gap, self.token)  # After, on the first of those that the operator itself reads next
        self.found.after += 1
        step = self._step(gap, *read, *others)
        self.found.repeats.append((step, tensor))
        self.token = self._allocate(self.sketch.size[self.sketch.owner[tensor]], step)
        return self.token

    def summed(self) -> Rewritten:
        """Add up what lives at each step, when the walk is done."""
        sketch, found = self.sketch, self.found
        nodes = np.arange(len(sketch.nodes))
        found.steps = nodes + np.searchsorted(np.array(self.gaps, np.int64), nodes, side="right")
        size, birth, last = sketch.arrays
        size, last = size.copy(), last.copy()
        for tensor in self.storage.recomputed | self.storage.narrowed:
            owner = sketch.owner[tensor]
            last[owner] = sketch.forward_death[owner]
            if tensor in self.storage.recomputed and sketch.makers[tensor].aside:
                size[owner] = 0
        end = found.steps[last]
        first = len(sketch.size)
        for allocation, step in self.last.items():
            if allocation is not None and allocation < first:
                end[allocation] = step if allocation in sketch.unread else max(end[allocation], step)
        change = np.zeros(len(nodes) + len(self.gaps) + 1, np.int64)
        np.add.at(change, found.steps[birth], size)
        np.subtract.at(change, end + 1, size)
        own = np.array(self.size, np.int64)
        np.add.at(change, np.array(self.birth, np.int64), own)
        death = np.array([self.last[first + number] for number in range(len(own))], np.int64)
        np.subtract.at(change, death + 1, own)
        found.totals = np.cumsum(change)[:-1]
        return found
