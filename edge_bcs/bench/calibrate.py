"""`edge-bcs bench --calibrate`: measures this machine for the compiler's cost model.

The graphs of a few networks run on one thread with ONNX Runtime's profiler; each operator's median time, what
it computes and what it moves are one sample, and `cost_model.fit` finds the constants that explain them. How
much each further core adds is told by the time of the same graphs on all threads.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.bench import machine as roof

# Network, distribution, sparsity, images: long and short rows of connections, large and small planes,
# strides, 1×1 kernels, layers dense enough for the dense kernels, few and many images side by side.
SETTINGS = (
    ("vgg16", "uniform", 0.99, 16),
    ("vgg16", "paper", 0.99, 8),
    ("resnet18", "uniform", 0.9, 16),
    ("wrn28_2", "uniform", 0.98, 8),
    ("vgg16", "uniform", 0.3, 2),
)
_PHASES = ("attack", "training")


def calibrate(threads: int, *, runs: int = 5, progress: Callable[[str], None] = lambda message: None) -> Any:
    """Measure this machine with ``threads`` threads; returns an `edge_bcs.exporters.cost_model.Machine`.

    Args:
        threads: cores in use.
        runs: of each graph; an operator's time is the median of them.
        progress: called with a sentence before each part.
    """
    from edge_bcs.exporters.cost_model import COSTS, Machine, fit

    progress("peak arithmetic and bandwidth")
    peak = roof.measure(threads)
    start = Machine(
        peak.isa, peak.core_arithmetic, peak.memory_bandwidth, COSTS[peak.isa], processor=peak.processor
    )
    samples, seconds = [], {1: 0.0, threads: 0.0}
    for model, distribution, sparsity, images in SETTINGS:
        progress(f"{model}, {distribution}, {100 * sparsity:g} % sparse, {images} images")
        setting = _Setting(model, distribution, sparsity, images)
        for phase in _PHASES:
            samples += setting.samples(phase, runs)
            for count in seconds:
                seconds[count] += setting.seconds(phase, runs, count)
    fitted = fit(samples, start)
    if threads == 1:
        return fitted
    gained = (seconds[1] / seconds[threads] - 1) * peak.core_arithmetic[0] / sum(peak.core_arithmetic[1:])
    return replace(fitted, costs=replace(fitted.costs, scaling=float(np.clip(gained, 0.05, 1.0))))


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
        session = self._session("lists", 1)
        (lists,) = session.run(None, {"coo.index": self.state["coo.index"], "coo.lists": lists})
        self.state["coo.lists"] = lists

    def _session(self, phase: str, threads: int, profile: str | None = None) -> Any:
        import onnxruntime

        from edge_bcs.runtime.engine import session_options

        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        model = self.compiled.graphs[phase].to_onnx().SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _feeds(self, session: Any) -> dict[str, Any]:
        random = np.random.default_rng(0)
        feeds: dict[str, Any] = {}
        for item in session.get_inputs():
            if item.name in self.state:
                feeds[item.name] = self.state[item.name]
            elif "bool" in item.type:
                feeds[item.name] = np.ones(item.shape, bool)
            elif "int64" in item.type:
                feeds[item.name] = random.integers(0, 10, item.shape)
            else:
                feeds[item.name] = random.random(item.shape, dtype=np.float32) / 2
        return feeds

    def seconds(self, phase: str, runs: int, threads: int) -> float:
        """Median seconds of a run of a graph."""
        session = self._session(phase, threads)
        feeds, taken = self._feeds(session), []
        for _ in range(runs + 1):
            start = time.perf_counter()
            session.run(None, feeds)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def samples(self, phase: str, runs: int) -> list[Any]:
        """Every operator of a graph, timed on one thread."""
        from edge_bcs.exporters.cost_model import Sample
        from edge_bcs.exporters.operators import OPERATORS
        from edge_bcs.exporters.plan import tensor_types

        with tempfile.TemporaryDirectory() as folder:
            session = self._session(phase, 1, str(Path(folder) / "profile"))
            feeds = self._feeds(session)
            for _ in range(runs + 1):
                session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        taken: dict[str, list[float]] = {}
        for event in events:
            name = event.get("name", "")
            if name.endswith("_kernel_time"):
                taken.setdefault(name.removesuffix("_kernel_time"), []).append(event["dur"] * 1e-6)
        graph = self.compiled.graphs[phase]
        types = tensor_types(graph)

        def connections(node: Any) -> int:
            return int(self.network.connections[node.attributes["layer_offset"]])

        return [
            Sample(
                OPERATORS[node.operator].walks(node, types, connections),
                OPERATORS[node.operator].bytes_moved(node, types, connections),
                statistics.median(taken[node.name][1:]),
            )
            for node in graph.nodes
        ]
