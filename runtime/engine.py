"""Four ONNX Runtime sessions over one set of bound buffers.

Every input and output of the graphs is bound once to memory that numpy owns, and graphs that update in place
have one buffer bound to both ends. Running a graph therefore copies nothing and allocates only its
intermediate tensors, all of them from the budget.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import Budget
from edge_bcs.runtime.buffers import allocate, bound_buffers, bytes_of
from edge_bcs.runtime.onnx_file import require_operators
from edge_bcs.runtime.state import read_state

from edge_bcs.core.errors import EdgeBcsError

Array = np.ndarray[Any, Any]


def available_threads() -> int:
    """Number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def session_options(threads: int, budget: Budget | None = None) -> onnxruntime.SessionOptions:
    """Options under which the graphs run as the compiler ordered them and every tensor comes from the
    budget; where ``budget`` cannot count each (before 1.23), from the arena that it limits."""
    from edge_bcs.runtime.library import register

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    options.enable_mem_reuse = False  # a tensor is given back when its last reader is done, as the plan says
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # the order of the file
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # a refused step is reported once, by the exception
    if budget is not None and budget.arena is not None:
        options.enable_cpu_mem_arena = True
    # An arena that another Trainer of the process limited is not for one that has no such limit.
    shared = budget is None or budget.exact or budget.arena is not None
    options.add_session_config_entry("session.use_env_allocators", str(int(shared)))
    # Each session has its own threads; those of the session that just ran must not keep a core from the next
    # one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register(options)
    return options


def is_onnxruntimes(error: Exception) -> bool:
    """Whether an exception comes from ONNX Runtime, and not from the handler of a signal (such as a time
    limit's) that ran while a call of it was returning: those are the user's, and pass."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("onnxruntime")


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
    """Buffers, sessions and budget of one artifact. An engine of another kind overrides `allocate`,
    `make_buffer`, `load_state`, `open_graph`, `run_graph` and `close`.

    Attributes:
        name: what runs the graphs.
        arrays: name → numpy array of every bound buffer (runtime/buffers.py); writing to it is how inputs
            are given.
        images: how many the micro-batch in the buffers has, see `load`.
        metadata: metadata of the state that was loaded ("step", "seed", …).
        bound_bytes: bytes of all bound buffers.
        running: a lock, held while a graph runs; nothing is freed meanwhile.
        on_run: called with a `GraphRun` after every run of a graph; what it raises passes to whoever ran it.
    """

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, cap: int | None, threads: int | None) -> None:
        if threads is not None and not 1 <= threads <= 1024:
            raise EdgeBcsError(f"threads must lie between 1 and 1024, not {threads}.")
        self.artifact = artifact
        self.threads = threads or available_threads()
        self.arrays: dict[str, Array] = {}
        self.images = 0
        self.bound_bytes = 0
        self.running = threading.RLock()
        self.on_run: Callable[[GraphRun], None] | None = None
        self._values: dict[str, onnxruntime.OrtValue] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bindings: dict[str, onnxruntime.IOBinding] = {}
        self.budget = Budget(cap, artifact.predicted_peak_bytes)
        try:
            self.allocate()
            self.metadata = self.load_state()
            self._open_graphs()
        except BaseException:
            self.close()
            raise

    def _open_graphs(self) -> None:
        # Needed once: lists are kept up to date by the optimizer graph from here on. The memory of this
        # session is free again before the others ask for theirs.
        self.open_graph("lists")
        self.budget.warn_unless_exact()
        self.run("lists")
        del self._bindings["lists"], self._sessions["lists"]
        for graph in ("training", "attack", "eval", "optimizer"):
            self.open_graph(graph)

    def reload(self, fill: Callable[[dict[str, Array]], None]) -> None:
        """Replace the state by what ``fill`` writes into the buffers.

        What follows from the connections is made anew, inside the budget: in the place of the graphs, which
        are opened again.
        """
        with self.running:
            if not self._sessions:
                raise EdgeBcsError("this Trainer is closed.")
            self._bindings.clear()
            self._sessions.clear()
            fill(self.arrays)
            self._open_graphs()

    def allocate(self) -> None:
        """Make every bound buffer, inside the budget."""
        table = self.table()
        self.budget.limit_arena(sum(bytes_of(dtype, shape) for dtype, shape in table.values()))
        for name, (dtype, shape) in table.items():
            size = bytes_of(dtype, shape)
            self.budget.reserve(size, f"the buffer {name}")
            try:
                self.arrays[name], self._values[name] = self.make_buffer(name, dtype, shape)
            except (MemoryError, ValueError):  # numpy's, for more than there is or than can be addressed
                raise EdgeBcsError(
                    f"this machine does not have the {size} bytes of memory for the buffer {name}."
                ) from None
            self.bound_bytes += size

    def table(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every bound buffer."""
        artifact = self.artifact
        return bound_buffers(artifact, artifact.micro_batch, artifact.objective.two_branches)

    def make_buffer(
        self, name: str, dtype: str, shape: tuple[int, ...]
    ) -> tuple[Array, onnxruntime.OrtValue]:
        """Return one buffer as numpy and as ONNX Runtime see it: the same memory."""
        array = allocate(dtype, shape)
        return array, onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def load_state(self) -> dict[str, str]:
        """Fill the buffers of the state and return its metadata."""
        return read_state(self.artifact, self.arrays)[1]

    def bound_buffer(self, graph: str, name: str) -> str:
        """Name of the buffer behind a graph's input or output; EdgeBcsError if there is none."""
        buffer = name
        if name.endswith(".out") and name not in self._values:
            buffer = name.removesuffix(".out")  # updated in place: the input's own memory
        if graph == "training" and name == "input":
            buffer = self.artifact.objective.kind.training_input
        if buffer not in self._values:
            raise EdgeBcsError(
                f"the {graph} graph has the unknown input or output {name}; export the artifact again."
            )
        return buffer

    def value(self, graph: str, name: str) -> onnxruntime.OrtValue:
        """The buffer behind a graph's input or output, as ONNX Runtime sees it."""
        return self._values[self.bound_buffer(graph, name)]

    def bind(self, session: onnxruntime.InferenceSession, graph: str) -> onnxruntime.IOBinding:
        """Bind a session of a graph to the buffers: what it updates in place is not copied."""
        binding = session.io_binding()
        for item in session.get_inputs():
            binding.bind_ortvalue_input(item.name, self.value(graph, item.name))
        for item in session.get_outputs():
            binding.bind_ortvalue_output(item.name, self.value(graph, item.name))
        return binding

    def open_graph(self, graph: str) -> None:
        """Make a graph ready to run; EdgeBcsError if it is damaged or does not fit."""
        content = self.artifact.read_graph(graph)
        require_operators(content, "edge_bcs", str(self.artifact.graph(graph)))
        try:
            session = onnxruntime.InferenceSession(
                content,
                session_options(self.threads, self.budget),
                providers=["CPUExecutionProvider"],
            )
            session._model_bytes = b""  # kept for a change of providers, which never comes
            binding = self.bind(session, graph)
        except EdgeBcsError:
            raise
        except Exception as error:
            if not is_onnxruntimes(error):
                raise
            raise self.budget.explain(error, graph) from None
        self._sessions[graph], self._bindings[graph] = session, binding

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

    def load(self, x: Array, y: Array, weight: float | Array) -> None:
        """Put a micro-batch into the bound buffers; the places it leaves empty weigh nothing.

        Args:
            x: images f32 [m, C, H, W], at most a micro-batch of them. y: labels i64[m].
            weight: of all images in the loss, or of each, f32[m].
        """
        self.images = count = len(x)
        for name, given in (("input", x), ("labels", y), ("sample_weight", weight)):
            self.arrays[name][:count], self.arrays[name][count:] = given, 0

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

    def run_graph(self, graph: str) -> None:
        """Run a graph, and no more; see `run`."""
        if graph not in self._sessions:
            raise EdgeBcsError("this Trainer is closed.")
        try:
            self._sessions[graph].run_with_iobinding(self._bindings[graph])
        except Exception as error:
            if not is_onnxruntimes(error):
                raise
            raise self.budget.explain(error, graph) from None

    def close(self) -> None:
        """Free the sessions and give the budget back. Safe to call twice, and from any thread: a graph that
        runs in another one is waited for."""
        with self.running:
            self._bindings.clear()
            self._sessions.clear()
            self._values = {}
            self.budget.close()
