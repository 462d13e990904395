"""Whatever runs an artifact's graphs: bound buffers, the working set, and one run of a graph.

`sessions.py` does it with ONNX Runtime, `program.py` with our own runner, `ort/training.py` with the training
API of ONNX Runtime.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import BudgetExceeded
from edge_bcs.runtime.buffers import IMAGES, Shape, bound_buffers, buffer_behind
from edge_bcs.runtime.state import read_state

from edge_bcs.core.errors import EdgeBcsError

Array = np.ndarray[Any, Any]


def available_threads() -> int:
    """Number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkingSet(Protocol):
    """The memory of an engine, in bytes."""

    @property
    def cap(self) -> int | None:
        """What it may grow to, None for no limit."""
        ...

    @property
    def exact(self) -> bool:
        """Whether every tensor is counted."""
        ...

    @property
    def current(self) -> int:
        """In use now."""
        ...

    @property
    def peak(self) -> int:
        """At most in use since the beginning or `reset_peak`."""
        ...

    @property
    def placed(self) -> int:
        """The memory that is taken: the arena, or the blocks in which tensors without places lie."""
        ...

    @property
    def placed_peak(self) -> int:
        """The memory that was placed at most."""
        ...

    def reset_peak(self) -> None:
        """Measure the peaks anew from here."""
        ...


@dataclass(frozen=True)
class GraphRun:
    """One run of a graph, as `Engine.on_run` is told of it.

    Attributes:
        engine: what ran it, `Engine.name`.
        graph: "training", "attack", "eval" or "optimizer".
        images: those of the micro-batch that it ran on, without empty places; 0 for the optimizer.
        seconds: how long it took.
    """

    engine: str
    graph: str
    images: int
    seconds: float


class Engine:
    """Buffers and graphs of one artifact. A kind of engine says how by `open_graphs`, `close_graphs`,
    `run_graph` and `close`; it makes ``arrays`` and ``budget`` before its state is loaded.

    Attributes:
        name: what runs the graphs.
        arrays: name → numpy array of every bound buffer (runtime/buffers.py); writing to it is how inputs
            are given.
        budget: the working set.
        images: how many the micro-batch in the buffers has, see `load`.
        metadata: metadata of the state that was loaded ("step", "seed", …).
        bound_bytes: bytes of all bound buffers.
        half: whether attacks are in half precision.
        running: a lock, held while a graph runs; nothing is freed meanwhile.
        on_run: called with a `GraphRun` after every run of a graph; what it raises passes to whoever ran it.
    """

    name = ""
    budget: WorkingSet
    metadata: dict[str, str]

    def __init__(self, artifact: Artifact, threads: int | None, half: bool = False) -> None:
        if threads is not None and not 1 <= threads <= 1024:
            raise EdgeBcsError(f"threads must lie between 1 and 1024, not {threads}.")
        self.artifact, self.half = artifact, half
        self.threads = threads or available_threads()
        self.arrays: dict[str, Array] = {}
        self.images = 0
        self.bound_bytes = 0
        self.running = threading.RLock()
        self.on_run: Callable[[GraphRun], None] | None = None

    def table(self) -> dict[str, tuple[str, Shape]]:
        """Every bound buffer."""
        artifact = self.artifact
        return bound_buffers(artifact, artifact.attack_micro_batch, artifact.objective.two_branches)

    def load_state(self) -> dict[str, str]:
        """Fill the buffers of the state and return its metadata."""
        return read_state(self.artifact, self.arrays)[1]

    def bound_buffer(self, graph: str, name: str) -> str:
        """Name of the buffer behind a graph's input or output; EdgeBcsError if there is none."""
        buffer = buffer_behind(graph, name, self.arrays, self.artifact.objective.kind.training_input)
        if buffer not in self.arrays:
            raise EdgeBcsError(
                f"the {graph} graph has the unknown input or output {name}; export the artifact again."
            )
        return buffer

    def reload(self, fill: Callable[[dict[str, Array]], None]) -> None:
        """Replace the state by what ``fill`` writes into the buffers.

        What follows from the connections is made anew, inside the budget: in the place of the graphs, which
        are opened again.
        """
        with self.running:
            self.close_graphs()
            fill(self.arrays)
            self.open_graphs()

    def memory(self) -> dict[str, int | bool | None]:
        """What memory is in use, in bytes; see `Trainer.memory`."""
        budget = self.budget
        return {
            "bound_bytes": self.bound_bytes,
            "current_bytes": budget.current,
            "peak_bytes": budget.peak,
            "placed_bytes": budget.placed,
            "placed_peak_bytes": budget.placed_peak,
            "cap_bytes": budget.cap,
            "exact": budget.exact,
        }

    def require_room(self, graph: str) -> None:
        """Raises BudgetExceeded if a graph needs more than the cap."""
        needed, cap = self.artifact.peak_of(graph), self.budget.cap
        if cap is not None and needed > cap:
            bound = self.bound_bytes
            raise BudgetExceeded(f"the {graph} graph", needed - bound, bound, cap, needed)

    def load(self, x: Array, y: Array, weight: float | Array) -> None:
        """Put a micro-batch into the bound buffers; the places it leaves empty weigh nothing.

        Args:
            x: images f32 [m, C, H, W], at most a micro-batch of them. y: labels i64[m].
            weight: of all images in the loss, or of each, f32[m].
        """
        self.images = count = len(x)
        for name, given in (("input", x), ("labels", y), ("sample_weight", weight)):
            self.arrays[name][:count], self.arrays[name][count:] = given, 0

    def bring_forward(self, first: int, count: int) -> None:
        """Let the training graph, which takes what lies at the front, see the micro-batch that begins with
        image ``first`` of those in the buffers, and has ``count`` of them."""
        size = self.artifact.micro_batch
        self.images = count
        for name in IMAGES if first else ():
            self.arrays[name][:size] = self.arrays[name][first : first + size]

    def run(self, graph: str, done: Callable[[], None] | None = None) -> None:
        """Run one graph on the bound buffers.

        Args:
            graph: which one. done: called when it has run, before `on_run` is.

        Raises EdgeBcsError (BudgetExceeded over the cap) if an operator refuses, or the engine is closed.
        """
        with self.running:
            began = time.perf_counter()
            self.run_graph(graph)
            seconds = time.perf_counter() - began
        if done is not None:
            done()
        if self.on_run is not None:
            images = 0 if graph == "optimizer" else self.images
            self.on_run(GraphRun(self.name, graph, images, seconds))

    def open_graphs(self) -> None:
        """Make the graphs ready to run and build what follows from the connections; EdgeBcsError if one is
        damaged or does not fit."""
        raise NotImplementedError

    def close_graphs(self) -> None:
        """Undo `open_graphs`; EdgeBcsError if the engine is closed."""
        raise NotImplementedError

    def run_graph(self, graph: str) -> None:
        """Run a graph, and no more; see `run`."""
        raise NotImplementedError

    def close(self) -> None:
        """Free everything but ``arrays``. Safe to call twice, and from any thread: a graph that runs in
        another one is waited for."""
        raise NotImplementedError
