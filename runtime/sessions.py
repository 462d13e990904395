"""The engine over ONNX Runtime: four sessions over one set of bound buffers.

Every input and output of the graphs is bound once to memory that numpy owns, and graphs that update in place
have one buffer bound to both ends. Running a graph therefore copies nothing and asks only for its
intermediate tensors, all of which have a place in the arena of the artifact's program.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.budget import Budget
from edge_bcs.runtime.buffers import IMAGES, Shape, aligned, allocate, arena_for, bound_in, bytes_of
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.manifest import PROGRAM
from edge_bcs.runtime.onnx_file import require_operators
from edge_bcs.runtime.program import arena_of

from edge_bcs.core.errors import EdgeBcsError

Array = np.ndarray[Any, Any]


def session_options(
    threads: int, budget: Budget | None = None, *, apart: bool = False
) -> onnxruntime.SessionOptions:
    """Options under which the graphs run as the compiler ordered them and every tensor comes from the
    budget; where ``budget`` cannot count each (before 1.23), from the arena that it limits. ``apart``: from
    outside the budget of whichever Trainer is open in this process, but for what operators work in."""
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
    shared = not apart and (budget is None or budget.exact or budget.arena is not None)
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


class SessionEngine(Engine):
    """Buffers, sessions and budget of one artifact. One may be open in a process.

    An engine over other sessions overrides `allocate`, `make_buffer`, `load_state`, `open_graph`, `run_graph`
    and `close`.
    """

    name = "onnxruntime"
    budget: Budget

    def __init__(self, artifact: Artifact, cap: int | None, threads: int | None, half: bool = False) -> None:
        super().__init__(artifact, threads, half)
        self._values: dict[str, onnxruntime.OrtValue] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bindings: dict[str, onnxruntime.IOBinding] = {}
        self._placed = False  # whether the tensors of the graphs have places in an arena
        self.budget = Budget(cap, artifact.predicted_peak_bytes)
        try:
            self.allocate()
            self.metadata = self.load_state()
            self.open_graphs()
        except BaseException:
            self.close()
            raise

    def open_graphs(self) -> None:
        """See `Engine`."""
        # Needed once: lists are kept up to date by the optimizer graph from here on. The memory of this
        # session is free again before the others ask for theirs.
        self.open_graph("lists")
        self.budget.warn_unless_exact()
        self.run("lists")
        del self._bindings["lists"], self._sessions["lists"]
        for graph in ("training", "attack", "eval", "optimizer"):
            self.open_graph(graph)

    def close_graphs(self) -> None:
        """See `Engine`."""
        if not self._sessions:
            raise EdgeBcsError("this Trainer is closed.")
        self._bindings.clear()
        self._sessions.clear()

    def allocate(self) -> None:
        """Make every bound buffer, inside the budget: in the program's arena, where ONNX Runtime lets the
        library place its tensors there, too."""
        if self.artifact.placed and self.budget.owns_allocations():
            self._allocate_arena(self.artifact.read_file(PROGRAM))
        else:
            self.allocate_apart()

    def _allocate_arena(self, program: bytes) -> None:
        bound = sum(aligned(bytes_of(dtype, shape)) for dtype, shape in self.table().values())
        self.budget.reserve(bound, "the buffers")
        # Pages of it that nothing touches are not resident, so that a graph takes no more than its own part.
        arena = arena_for(arena_of(self.artifact, program))
        refused = self.budget.place(program, arena, bound)
        file = self.artifact.path / PROGRAM
        if refused:
            raise EdgeBcsError(f"{file} cannot be used: {refused}; export the artifact again.")
        self.arrays, self.bound_bytes = bound_in(arena, self.table(), self.budget.place_of, file)
        for name, array in self.arrays.items():
            self._values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._placed = True

    def allocate_apart(self) -> None:
        """Make every bound buffer by itself, inside the budget."""
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

    def make_buffer(self, name: str, dtype: str, shape: Shape) -> tuple[Array, onnxruntime.OrtValue]:
        """Return one buffer as numpy and as ONNX Runtime see it: the same memory."""
        array = allocate(dtype, shape)
        return array, onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def value(self, graph: str, name: str) -> onnxruntime.OrtValue:
        """The buffer behind a graph's input or output, as ONNX Runtime sees it: of images the training graph
        sees the micro-batch at the front."""
        buffer, size = self.bound_buffer(graph, name), self.artifact.micro_batch
        if graph != "training" or buffer not in IMAGES or size == len(self.arrays[buffer]):
            return self._values[buffer]
        return onnxruntime.OrtValue.ortvalue_from_numpy(self.arrays[buffer][:size])

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
        from edge_bcs.runtime.library import half_precision

        content = self.artifact.read_graph(graph)
        require_operators(content, "edge_bcs", str(self.artifact.graph(graph)))
        try:
            options = session_options(self.threads, self.budget)
            with half_precision(self.half and graph == "attack"):
                session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            session._model_bytes = b""  # kept for a change of providers, which never comes
            binding = self.bind(session, graph)
        except EdgeBcsError:
            raise
        except Exception as error:
            if not is_onnxruntimes(error):
                raise
            raise self.budget.explain(error, graph) from None
        self._sessions[graph], self._bindings[graph] = session, binding

    def run_graph(self, graph: str) -> None:
        """Run a graph, and no more; see `run`."""
        if graph not in self._sessions:
            raise EdgeBcsError("this Trainer is closed.")
        if self._placed:
            self.require_room(graph)
        try:
            with self.budget.running(graph) if self._placed else nullcontext():
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
