"""`edge-bcs bench --calibrate`: measures this machine for the compiler's cost model.

The graphs of a few networks run on one thread with ONNX Runtime's profiler; each operator's time, what it
computes and what it moves are one sample, and `cost_model.fit` finds the constants that explain them. How
much each further core adds is told by the time of the same graphs on all threads.

Other work on the machine only ever adds time, and comes and goes: so the graphs take turns, and of each
figure's repetitions the lower quartile counts. How much of the cores' time was to be had is measured beside
it; where it was too little, several threads tell nothing, and what is assumed of further cores stays.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_bcs.bench import machine as roof
from edge_bcs.bench.profiler import operator_seconds
from edge_bcs.errors import EdgeBcsError

# Network, distribution, sparsity, images: long and short rows of connections, large and small planes,
# strides, 1×1 kernels, layers dense enough for the dense kernels, few and many images side by side.
SETTINGS = (
    ("vgg16", "uniform", 0.99, 16),
    ("vgg16", "paper", 0.99, 8),
    ("resnet18", "uniform", 0.9, 16),
    ("wrn28_2", "uniform", 0.98, 8),
    ("vgg16", "uniform", 0.3, 2),
)
_PHASES = ("attack", "training", "optimizer")
QUIET, USELESS = 0.9, 0.5
"""Shares of the cores' time: from which times of several threads are believed, and from which any are."""
_PROBE = 0.05  # seconds


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        machine: an `edge_bcs.exporters.cost_model.Machine`.
        available: share of the cores' time that other work left while it was measured, in (0, 1].
    """

    machine: Any
    available: float

    @property
    def quiet(self) -> bool:
        """Whether so little else ran that what each further core adds was measured, not assumed."""
        return self.available >= QUIET


def calibrate(
    threads: int, *, runs: int = 9, progress: Callable[[str], None] = lambda message: None
) -> Calibration:
    """Measure this machine with ``threads`` threads.

    Args:
        threads: cores in use.
        runs: of each graph.
        progress: called with a sentence before each part.

    Raises:
        EdgeBcsError: other work leaves less than half of the cores' time, before or meanwhile.
    """
    from edge_bcs.exporters.cost_model import COSTS, Machine, fit

    _require([_available(threads) for _ in range(5)])
    progress("peak arithmetic and bandwidth")
    peak = roof.measure(threads)
    start = Machine(
        peak.isa, peak.core_arithmetic, peak.memory_bandwidth, COSTS[peak.isa], processor=peak.processor
    )
    settings = []
    for model, distribution, sparsity, images in SETTINGS:
        progress(f"compiling {model}, {distribution}, {100 * sparsity:g} % sparse, {images} images")
        settings.append(_Setting(model, distribution, sparsity, images))
    with tempfile.TemporaryDirectory() as folder:
        graphs = [
            _Timed(setting, phase, threads, f"{folder}/{number}")
            for number, setting in enumerate(settings)
            for phase in _PHASES
        ]
        available = [_available(threads)]
        for number in range(runs + 1):  # the first warms up
            progress(f"round {number} of {runs}" if number else "warming up")
            for graph in graphs:
                graph.run()
            available.append(_available(threads))
        fitted = fit([sample for graph in graphs for sample in graph.samples()], start)
    found = _require(available)
    if threads > 1 and found >= QUIET:
        alone = sum(lower_quartile(graph.alone[1:]) for graph in graphs)
        together = sum(lower_quartile(graph.together[1:]) for graph in graphs)
        gained = (alone / together - 1) * peak.core_arithmetic[0] / sum(peak.core_arithmetic[1:])
        fitted = replace(fitted, costs=replace(fitted.costs, scaling=float(np.clip(gained, 0.05, 1.0))))
    return Calibration(fitted, found)


def lower_quartile(seconds: Sequence[float]) -> float:
    """The time that a quarter of the repetitions undercut or meet."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _require(available: Sequence[float]) -> float:
    """The mean share, if it is enough to measure anything."""
    found = statistics.fmean(available)
    if found < USELESS:
        raise EdgeBcsError(
            f"other work takes {100 * (1 - found):.0f} % of the cores' time, so that no time can be "
            "measured: calibrate when nothing else runs."
        )
    return found


def _available(threads: int) -> float:
    """Share of the time of ``threads`` cores that this process gets if it asks for all of it."""
    busy, *_ = roof.probes()

    def share(_: int) -> float:
        wall, own = time.perf_counter(), time.thread_time()
        busy(_PROBE)
        return (time.thread_time() - own) / (time.perf_counter() - wall)

    with ThreadPoolExecutor(threads) as pool:
        return min(1.0, statistics.fmean(pool.map(share, range(threads))))


class _Setting:
    """One network's graphs and inputs for them."""

    def __init__(self, model: str, distribution: str, sparsity: float, images: int) -> None:
        from edge_bcs import connectivity, models, objectives
        from edge_bcs.exporters.artifact import compile_network
        from edge_bcs.exporters.network import network_of

        sparse = connectivity.sparsify(
            models.create(model), sparsity=sparsity, seed=0, distribution=distribution
        )
        self.network = network_of(sparse, (3, 32, 32), False)
        self.compiled = compile_network(self.network, objectives.get("at"), 0.0, images)
        self.state = sparse.state()
        lists = np.zeros(self.network.lists.length, np.int32)
        session = self.session("lists", 1)
        (lists,) = session.run(None, {"coo.index": self.state["coo.index"], "coo.lists": lists})
        self.state["coo.lists"] = lists

    def session(self, phase: str, threads: int, profile: str | None = None) -> Any:
        """A session of a graph; with ``profile``, a path, each operator's time is written there."""
        import onnxruntime

        from edge_bcs.runtime.engine import session_options

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
    """A graph on one thread, with the profiler, and on all."""

    def __init__(self, setting: _Setting, phase: str, threads: int, folder: str) -> None:
        self.setting, self.phase = setting, phase
        self.sessions = [setting.session(phase, 1, f"{folder}.{phase}"), setting.session(phase, threads)]
        self.feeds = setting.feeds(self.sessions[0])
        self.alone: list[float] = []
        self.together: list[float] = []

    def run(self) -> None:
        """Once on one thread and once on all."""
        for session, taken in zip(self.sessions, (self.alone, self.together), strict=True):
            start = time.perf_counter()
            session.run(None, self.feeds)
            taken.append(time.perf_counter() - start)

    def samples(self) -> list[Any]:
        """Every operator of the graph, timed on one thread."""
        from edge_bcs.exporters.cost_model import Sample
        from edge_bcs.exporters.operators import OPERATORS
        from edge_bcs.exporters.plan import tensor_types

        taken = operator_seconds(self.sessions[0])
        graph = self.setting.compiled.graphs[self.phase]
        types = tensor_types(graph)

        def connections(node: Any) -> int:
            return int(self.setting.network.connections[node.attributes["layer_offset"]])

        return [
            Sample(
                OPERATORS[node.operator].walks(node, types, connections),
                OPERATORS[node.operator].bytes_moved(node, types, connections),
                lower_quartile(taken[node.name][1:]),
            )
            for node in graph.nodes
        ]
