"""How long a training step should take on a board: a roofline over the nodes of the plan.

Each node takes the longer of its arithmetic at a fraction of the cores' peak and its traffic at a
fraction of the memory's bandwidth (Williams, Waterman & Patterson, "Roofline", CACM 2009), plus a fixed
time to start it. The fractions are assumptions, carried in the result and printed with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.engine import available_threads

from edge_bcs.roofline import Efficiency, Machine

from .boards import Cluster, Target
from .plans import Phase, Plan

_FLOPS_PER_CYCLE = {"avx512": 64.0, "avx2": 32.0, "neon": 16.0, "scalar": 2.0}
_VECTOR = {"avx512": 16, "avx2": 8, "neon": 4, "scalar": 1}  # float32 numbers in a register


@dataclass(frozen=True)
class StepTime:
    """Expected duration of one optimizer step over a whole batch.

    Attributes:
        seconds: of the step. phases: graph → seconds of all its runs; runs: graph → runs a step.
        memory_bound: share of the time in nodes that the bandwidth limits.
        assumptions: sentences.
    """

    seconds: float
    phases: Mapping[str, float]
    runs: Mapping[str, int]
    flops: int
    memory_bound: float
    threads: int
    assumptions: tuple[str, ...] = field(default=())


def step_runs(artifact: Artifact, micro_batch: int | None = None) -> dict[str, int]:
    """How often each graph runs in one step over a batch (Algorithm 1: craft, accumulate, update)."""
    objective, size = artifact.objective, micro_batch or artifact.micro_batch
    parts = -(-artifact.batch_size // size)
    attacked = {"natural": 0, "mixed": -(-(artifact.batch_size // 2) // size)}.get(objective.name, parts)
    return {
        "attack": attacked * objective.attack_steps,
        "eval": attacked if objective.attack_loss == "kl" else 0,
        "training": parts,
        "optimizer": 1,
    }


def peak_flops(target: Target, threads: int) -> float:
    """Float32 operations per second of the fastest ``threads`` cores."""
    cores = sorted(
        (
            cluster.frequency * cluster.flops_per_cycle
            for cluster in target.clusters
            for _ in range(cluster.cores)
        ),
        reverse=True,
    )
    return sum(cores[:threads])


def machine_of(target: Target, threads: int | None = None) -> Machine:
    """The board as the planner sees it; ``threads`` default to its cores."""
    return Machine(peak_flops(target, threads or target.cores), target.bandwidth, _VECTOR[target.isa])


def step_time(
    plan: Plan,
    runs: Mapping[str, int],
    target: Target,
    threads: int,
    lanes: int,
    efficiency: Efficiency | None = None,
) -> StepTime | None:
    """Expected duration of a step, or None if the plan does not tell the cost of its nodes.

    Args:
        runs: graph → runs a step (see ``step_runs``).
        threads: threads of each graph; more than the board's cores count as its cores.
        lanes: images that lie side by side in memory.
    """
    assumed = efficiency or Efficiency()
    threads = max(1, min(threads, target.cores))
    machine = machine_of(target, threads)
    filled = machine.filled(lanes, assumed)
    phases: dict[str, float] = {}
    flops, bound = 0, 0.0
    for name, count in runs.items():
        phase = plan.phases.get(name)
        if phase is None or not count:
            continue
        if len(phase.flops) != len(phase.nodes) or len(phase.moved) != len(phase.nodes):
            return None
        seconds = 0.0
        dense = _dense_nodes(phase)
        for node, operations, moved in zip(phase.nodes, phase.flops, phase.moved, strict=True):
            compute, transfer = machine.seconds(operations, moved, node in dense, lanes, assumed)
            seconds += max(compute, transfer) + assumed.node_seconds
            bound += count * transfer if transfer > compute else 0.0
        phases[name] = count * seconds
        flops += count * sum(phase.flops)
    total = sum(phases.values())
    return StepTime(
        seconds=total,
        phases=phases,
        runs=dict(runs),
        flops=flops,
        memory_bound=bound / total if total else 0.0,
        threads=threads,
        assumptions=_assumptions(target, threads, filled * machine.arithmetic, filled, assumed),
    )


def _dense_nodes(phase: Phase) -> set[str]:
    """Nodes with work memory: the blocked dense kernels, which unpack the weights of their layer into it."""
    return {tensor.name.removesuffix(".work") for tensor in phase.tensors if tensor.name.endswith(".work")}


def _assumptions(
    target: Target, threads: int, arithmetic: float, filled: float, assumed: Efficiency
) -> tuple[str, ...]:
    return (
        f"{threads} of {target.cores} cores, {arithmetic / 1e9:.0f} GFLOP/s of peak arithmetic, "
        f"{100 * filled:.0f} % of vectors filled; sparse kernels reach {100 * assumed.sparse:.0f} % "
        f"and dense ones {100 * assumed.dense:.0f} % of it",
        f"{target.bandwidth / 1e9:.1f} GB/s of memory bandwidth, {100 * assumed.bandwidth:.0f} % reached; "
        "every tensor comes from memory once a node, as if caches kept nothing between nodes",
        f"{1e6 * assumed.node_seconds:.0f} µs to start a node; connections lie as when compiled; "
        "no throttling, no time for reading data",
    )


def this_host(isa: str) -> Target:
    """This machine as a board, as far as it can be known; bandwidth is an assumption.

    Args:
        isa: the kernel variant that the operator library chose here.
    """
    cores = available_threads()
    available = _meminfo("MemAvailable")
    return Target(
        name="this host",
        title=f"this host ({platform.machine()})",
        total=_meminfo("MemTotal"),
        usable=available,
        default_budget=available,
        bandwidth=12e9,
        isa=isa,
        clusters=(
            Cluster(core=isa, cores=cores, frequency=_frequency(), flops_per_cycle=_FLOPS_PER_CYCLE[isa]),
        ),
        sources={
            "memory": "/proc/meminfo; bandwidth assumed",
            "cpu": "kernel variant; frequency of /proc/cpuinfo",
        },
    )


def _frequency() -> float:
    """Hertz of the first core; 2 GHz where the system does not tell."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("cpu MHz"):
            return 1e6 * float(line.split(":")[1])
    maximum = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return 1e3 * float(maximum) if maximum.isdigit() else 2e9


def _meminfo(name: str) -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
