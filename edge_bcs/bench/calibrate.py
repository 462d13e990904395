"""`edge-bcs bench --calibrate`: measures this machine for the compiler's cost model.

The graphs of a few networks, with few images and with many, run with ONNX Runtime's profiler on one thread
and on all. Each operator's time, what it computes and what it moves are one sample: `cost_model.fit` finds
the constants that explain those of one thread, `cost_model.fit_threads` what further threads bring and cost.

The graphs take turns, and before the runs that count each makes one that does not: in a training, too, a
graph runs many times in a row, with its numbers in the caches and its threads awake.

Other work on the machine only ever adds time, and comes and goes. How long a run's threads waited for a core
is known (`waited_for_cores`), so rounds go on until every graph had enough runs that nothing disturbed, or
until a limit. Of those the median counts. Where there are too few, the lower quartile of all runs on one
thread must do; of several threads such runs tell nothing, and what is assumed stays.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_bcs.bench import machine as roof
from edge_bcs.bench.profiler import operator_seconds
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.runtime.board.process import waited_for_cores

# Network, distribution, sparsity, images: long and short rows of connections, large and small planes,
# strides, 1×1 kernels, layers dense enough for the dense kernels; few images side by side, whole vectors of
# them, and so many that each of two threads has whole vectors of its own.
SETTINGS = (
    ("vgg16", "uniform", 0.99, (2, 16)),
    ("vgg16", "paper", 0.99, (4, 32)),
    ("resnet18", "uniform", 0.9, (16,)),
    ("resnet18", "uniform", 0.99, (2,)),
    ("wrn28_2", "uniform", 0.98, (4, 32)),
    ("vgg16", "uniform", 0.3, (2,)),
)
_PHASES = ("attack", "training", "optimizer")
QUIET, USELESS = 0.95, 0.5
"""Shares of the cores' time: from which a run counts as undisturbed, and below which nothing is believed."""
IN_A_ROW = 2  # runs of a graph that count, after one that does not
_ENOUGH = 3  # undisturbed runs of a graph
_PROBE = 0.05  # seconds


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        machine: an `edge_bcs.targets.cost_model.Machine`.
        available: share of the cores' time that other work left to the runs, in (0, 1].
        quiet: whether every graph had undisturbed runs, so that times are medians of them and what further
            cores bring was measured, not assumed.
    """

    machine: Any
    available: float
    quiet: bool


def calibrate(
    threads: int,
    *,
    runs: int = 9,
    seconds: float = 120.0,
    progress: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Measure this machine with ``threads`` threads.

    Args:
        threads: cores in use.
        runs: undisturbed ones of each graph that are waited for.
        seconds: after which no further round begins, whatever is missing.
        progress: called with a sentence before each part.

    Raises:
        EdgeBcsError: other work leaves less than half of the cores' time, before or meanwhile.
    """
    from edge_bcs.targets.cost_model import COSTS, Machine, fit, fit_threads

    _require(statistics.fmean(cores_share(threads) for _ in range(5)))
    progress("peak arithmetic and bandwidth")
    peak = roof.measure(threads)
    start = Machine(
        peak.isa, peak.core_arithmetic, peak.memory_bandwidth, COSTS[peak.isa], processor=peak.processor
    )
    with tempfile.TemporaryDirectory() as folder:
        graphs = timed_graphs(threads, folder, progress)
        began, number = time.monotonic(), 0
        while number == 0 or (
            min(graph.undisturbed for graph in graphs) < runs and time.monotonic() - began < seconds
        ):
            number += 1
            progress(
                f"round {number}: {sum(graph.undisturbed >= runs for graph in graphs)} of {len(graphs)} done"
            )
            for graph in graphs:
                graph.run()
        available = _require(statistics.fmean(share for graph in graphs for share in graph.shares))
        fitted = fit([sample for graph in graphs for sample in graph.samples(1)], start)
        quiet = all(graph.undisturbed >= _ENOUGH for graph in graphs)
        if quiet and threads > 1:
            fitted = fit_threads([sample for graph in graphs for sample in graph.samples(threads)], fitted)
    return Calibration(fitted, available, quiet)


def typical(seconds: Sequence[float], shares: Sequence[float]) -> float:
    """The median of the runs that nothing disturbed; of too few of them, the time that a quarter of all
    runs undercut or meet.

    Args:
        seconds: of each run. shares: of the cores' time that each run had.
    """
    alone = [taken for taken, share in zip(seconds, shares, strict=True) if share >= QUIET]
    return statistics.median(alone) if len(alone) >= _ENOUGH else sorted(seconds)[(len(seconds) - 1) // 4]


def _require(available: float) -> float:
    """The share, if it is enough to measure anything."""
    if available < USELESS:
        raise EdgeBcsError(
            f"other work takes {100 * (1 - available):.0f} % of the cores' time, so that no time can be "
            "measured: calibrate when nothing else runs."
        )
    return available


def cores_share(threads: int) -> float:
    """Share of the time of ``threads`` cores that this process gets if it asks for all of it."""
    busy, *_ = roof.probes()

    def share(_: int) -> float:
        wall, own = time.perf_counter(), time.thread_time()
        busy(_PROBE)
        return (time.thread_time() - own) / (time.perf_counter() - wall)

    with ThreadPoolExecutor(threads) as pool:
        return min(1.0, statistics.fmean(pool.map(share, range(threads))))


def timed_graphs(threads: int, folder: str, progress: Callable[[str], None]) -> list[_Timed]:
    """All graphs of all settings, ready to run; profiles are written to ``folder``."""
    graphs: list[_Timed] = []
    for model, distribution, sparsity, sizes in SETTINGS:
        for images in sizes:
            progress(f"compiling {model}, {distribution}, {100 * sparsity:g} % sparse, {images} images")
            setting = _Setting(model, distribution, sparsity, images)
            graphs += [_Timed(setting, phase, threads, f"{folder}/{len(graphs)}") for phase in _PHASES]
    return graphs


class _Setting:
    """One network's graphs and inputs for them."""

    def __init__(self, model: str, distribution: str, sparsity: float, images: int) -> None:
        from edge_bcs import models
        from edge_bcs.core.objectives import PLAIN
        from edge_bcs.exporters.compiler import compile_network
        from edge_bcs.exporters.memory.choice import Job
        from edge_bcs.exporters.network import network_of
        from edge_bcs.method import connectivity

        sparse = connectivity.sparsify(
            models.create(model), sparsity=sparsity, seed=0, distribution=distribution
        )
        self.network = network_of(sparse, (3, 32, 32), False)
        self.compiled = compile_network(self.network, Job(PLAIN), images)
        self.state = sparse.state()
        lists = np.zeros(self.network.lists_length, np.int32)
        session = self.session("lists", 1)
        (lists,) = session.run(None, {"coo.index": self.state["coo.index"], "coo.lists": lists})
        self.state["coo.lists"] = lists

    def session(self, phase: str, threads: int, profile: str | None = None) -> Any:
        """A session of a graph; with ``profile``, a path, each operator's time is written there."""
        import onnxruntime

        from edge_bcs.runtime.sessions import session_options

        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        model = self.compiled.graphs[phase].to_onnx().SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def feeds(self, session: Any) -> dict[str, Any]:
        """Inputs of a session; an update of length zero, but with noise, changes no connection."""
        random = np.random.default_rng(0)
        feeds: dict[str, Any] = {}
        for item in session.get_inputs():
            if item.name in self.state:
                feeds[item.name] = self.state[item.name]
            elif item.name == "hyper":
                feeds[item.name] = np.array([0, 0, 0.9, 1e-6], np.float32)
            elif "bool" in item.type:
                feeds[item.name] = np.ones(item.shape, bool)
            elif "int64" in item.type:
                feeds[item.name] = random.integers(0, 10, item.shape)
            else:
                feeds[item.name] = random.random(item.shape, dtype=np.float32) / 2
        return feeds


class _Timed:
    """A graph with the profiler, on one thread and on all; its sides are known by their threads."""

    def __init__(self, setting: _Setting, phase: str, threads: int, prefix: str) -> None:
        self.setting, self.phase = setting, phase
        self.sides = {
            count: _Side(setting.session(phase, count, f"{prefix}.{phase}.{count}"), count)
            for count in sorted({1, threads})
        }
        self.feeds = setting.feeds(self.sides[1].session)

    def run(self) -> None:
        """A few times in a row on one thread, and on all."""
        for side in self.sides.values():
            side.run(self.feeds)

    @property
    def undisturbed(self) -> int:
        """Undisturbed runs of the side that has fewer."""
        return min(sum(share >= QUIET for share in side.shares) for side in self.sides.values())

    @property
    def shares(self) -> list[float]:
        """Of the cores' time, of every run."""
        return [share for side in self.sides.values() for share in side.shares]

    def samples(self, threads: int) -> list[Any]:
        """Every operator of the graph, timed on so many threads. Ends the profiling of that side."""
        from edge_bcs.exporters.memory.replay import tensor_types
        from edge_bcs.exporters.operators import OPERATORS
        from edge_bcs.targets.cost_model import Sample

        taken = self.sides[threads].operator_seconds()
        graph = self.setting.compiled.graphs[self.phase]
        types = tensor_types(graph)

        def connections(node: Any) -> int:
            return int(self.setting.network.connections[node.attributes["layer_offset"]])

        return [
            Sample(
                OPERATORS[node.operator].walks(node, types, connections),
                OPERATORS[node.operator].bytes_moved(node, types, connections),
                taken[node.name],
            )
            for node in graph.nodes
        ]


class _Side:
    """A session that is timed.

    Attributes:
        shares: of each run that counts: what its threads did not spend waiting for a core.
    """

    def __init__(self, session: Any, threads: int) -> None:
        self.session, self.threads = session, threads
        self.shares: list[float] = []

    def run(self, feeds: Mapping[str, Any]) -> None:
        """Once to warm up, then the runs that count."""
        self.session.run(None, feeds)
        for _ in range(IN_A_ROW):
            waited, began = waited_for_cores(), time.perf_counter()
            self.session.run(None, feeds)
            seconds = time.perf_counter() - began
            self.shares.append(max(0.0, 1 - (waited_for_cores() - waited) / seconds / self.threads))

    def operator_seconds(self) -> dict[str, float]:
        """Operator → its typical time. Ends the profiling."""
        cycle = IN_A_ROW + 1
        return {
            name: typical([second for run, second in enumerate(taken) if run % cycle], self.shares)
            for name, taken in operator_seconds(self.session).items()
        }
