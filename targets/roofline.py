"""How long a training step should take on a board: the cost model over the nodes of the plan.

Each node takes the time to start it, its traffic with memory, and what the kernels make of the cores' peak
arithmetic (`edge_bcs.targets.cost_model`), a roofline (Williams, Waterman & Patterson, CACM 2009) whose
fractions depend on the shapes. They are assumptions unless the machine was calibrated, carried in the result
and printed with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.engine import available_threads
from edge_bcs.runtime.manifest import PrunableLayer
from edge_bcs.targets import cost_model
from edge_bcs.targets.cost_model import COSTS, UPDATES, VECTOR, Machine

from edge_bcs.core.objectives import PLAIN
from edge_bcs.core.units import format_seconds

from .boards import Cluster, Gpu, Target
from .plans import MemoryPlan

_FLOPS_PER_CYCLE = {"avx512": 64.0, "avx2": 32.0, "neon": 16.0, "scalar": 2.0}


@dataclass(frozen=True)
class StepTime:
    """Expected duration of one optimizer step over a whole batch.

    Attributes:
        seconds: of the step. phases: graph → seconds of all its runs; runs: graph → runs a step.
        memory_bound: share of the time in traffic with memory.
        assumptions: sentences.
    """

    seconds: float
    phases: Mapping[str, float]
    runs: Mapping[str, int]
    flops: int
    memory_bound: float
    threads: int
    assumptions: tuple[str, ...] = field(default=())


def step_runs(
    artifact: Artifact, micro_batch: int | None = None, plain: bool = False, images: int | None = None
) -> dict[str, int]:
    """How often each graph runs in one step over a batch (Algorithm 1: craft, accumulate, update).

    Args:
        micro_batch: default: the artifact's.
        plain: with plain adversarial training instead of the artifact's objective.
        images: that are attacked at once; default: the artifact's, or another ``micro_batch``.
    """
    objective, kind = artifact.objective, PLAIN if plain else artifact.objective.kind
    if micro_batch is None:
        micro_batch, images = artifact.micro_batch, artifact.attack_micro_batch
    return kind.runs(artifact.batch_size, micro_batch, objective.attack.steps_taken, images)


def machine_of(target: Target, threads: int | None = None) -> Machine:
    """The fastest ``threads`` cores of the board (default: all) as the cost model sees them: as measured if
    it was calibrated, else with the costs that are assumed of its instruction set."""
    machine = target.calibration or Machine(
        target.isa,
        tuple(
            sorted(
                (
                    cluster.frequency * cluster.flops_per_cycle
                    for cluster in target.clusters
                    for _ in range(cluster.cores)
                ),
                reverse=True,
            )
        ),
        target.bandwidth,
        COSTS[target.isa],
    )
    return machine.on(threads or target.cores)


def step_time(plan: MemoryPlan, runs: Mapping[str, int], target: Target, threads: int) -> StepTime | None:
    """Expected duration of a step, or None if the plan does not tell the cost of its nodes.

    Args:
        runs: graph → runs a step (see ``step_runs``).
        threads: threads of each graph; more than the board's cores count as its cores.
    """
    threads = max(1, min(threads, target.cores))
    machine = machine_of(target, threads)
    phases: dict[str, float] = {}
    flops, traffic = 0, 0.0
    for name, count in runs.items():
        phase = plan.phases.get(name)
        if phase is None or not count:
            continue
        if not len(phase.flops) == len(phase.moved) == len(phase.walks) == len(phase.nodes):
            return None
        nodes = list(zip(phase.walks, phase.moved, strict=True))
        phases[name] = count * sum(machine.seconds(walks, moved) for walks, moved in nodes)
        traffic += count * sum(machine.traffic_seconds(moved, bool(walks)) for walks, moved in nodes)
        flops += count * sum(phase.flops)
    total = sum(phases.values())
    return StepTime(
        seconds=total,
        phases=phases,
        runs=dict(runs),
        flops=flops,
        memory_bound=traffic / total if total else 0.0,
        threads=threads,
        assumptions=_assumptions(target, machine),
    )


def _assumptions(target: Target, machine: Machine) -> tuple[str, ...]:
    costs = machine.costs
    together = machine.arithmetic[0] * machine.cores
    shared = (
        f" and {1e6 * costs.fork:.0f} µs to share it among threads" if len(machine.arithmetic) > 1 else ""
    )
    source = f"measured by `edge-bcs bench --calibrate` on {machine.processor or 'it'}"
    return (
        "costs of the kernels "
        + (source if target.calibration else f"assumed for {target.isa}, not measured"),
        f"{len(machine.arithmetic)} of {target.cores} cores, together {together / 1e9:.0f} GFLOP/s at their "
        f"peak (each beyond the first adds {100 * costs.scaling:.0f} % of itself)",
        f"in long rows sparse kernels reach {_share(costs.sparse.vector)} of that and dense ones "
        f"{_share(costs.dense.vector)}; small maps and few images fill the {VECTOR[machine.isa]} numbers of "
        "a vector and the registers less",
        f"{machine.bandwidth / 1e9:.1f} GB/s of memory bandwidth, of which all cores reach "
        f"{_share(max(costs.stack / machine.cores, min(costs.stack, 1.0)))} in convolutions; every tensor "
        "is moved once a node",
        f"{1e6 * costs.node:.0f} µs to start a node{shared}; connections lie as when compiled; no "
        "throttling, no time for reading data",
    )


def beside_gpu(gpu: Gpu, plan: MemoryPlan, runs: Mapping[str, int], layers: Sequence[PrunableLayer]) -> str:
    """A sentence about the GPU that is not used: how long the same step of the dense network takes there at
    least, by its arithmetic alone; without that time where the plan does not tell the layers apart."""
    sentence = f"the GPU ({gpu.name}) is not used"
    flops = dense_flops(plan, runs, layers)
    if flops is None:
        return sentence
    return (
        f"{sentence}: the dense network's arithmetic takes it {format_seconds(flops / gpu.flops)} at least, "
        f"at its peak of {gpu.flops / 1e12:.2g} TFLOP/s in float32"
    )


def dense_flops(plan: MemoryPlan, runs: Mapping[str, int], layers: Sequence[PrunableLayer]) -> float | None:
    """Floating-point operations of the same step with all weights, of the products alone.

    A walk over connections is that of a layer with as many; None if layers of different sizes have as many.
    """
    sizes: dict[int, set[int]] = {}
    for layer in layers:
        sizes.setdefault(round(layer.density * layer.size), set()).add(layer.size)
    found = 0.0
    for name, count in runs.items():
        for walk in (walk for walks in plan.phases[name].walks for walk in walks):
            if walk.kernel in UPDATES:
                continue
            size = {walk.entries} if not walk.kernel.startswith("sparse") else sizes.get(walk.entries, set())
            if len(size) != 1:
                return None
            found += count * 2.0 * next(iter(size)) * walk.rows * walk.floats
    return found


def _share(cost: float) -> str:
    return f"{100 / cost:.0f} %" if cost else "all"


def this_host(isa: str) -> Target:
    """This machine as a board, as far as it can be known; bandwidth is assumed unless it was calibrated.

    Args:
        isa: the kernel variant that the operator library chose here.
    """
    cores = available_threads()
    calibration = cost_model.load()
    if calibration is not None and (calibration.isa != isa or len(calibration.arithmetic) < cores):
        calibration = None  # of another processor, or of fewer cores than there are now
    available = _meminfo("MemAvailable")
    return Target(
        name="this host",
        title=f"this host ({platform.machine()})",
        total=_meminfo("MemTotal"),
        usable=available,
        default_budget=available,
        bandwidth=calibration.bandwidth if calibration else 12e9,
        isa=isa,
        clusters=(
            Cluster(core=isa, cores=cores, frequency=_frequency(), flops_per_cycle=_FLOPS_PER_CYCLE[isa]),
        ),
        sources={
            "memory": "/proc/meminfo; bandwidth " + ("calibrated" if calibration else "assumed"),
            "cpu": "kernel variant; frequency of /proc/cpuinfo",
        },
        calibration=calibration,
    )


def _frequency() -> float:
    """Hertz of the first core; 2 GHz where the system does not tell."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("cpu MHz"):
            return 1e6 * float(line.split(":")[1])
    maximum = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return 1e3 * float(maximum) if maximum.isdigit() else 2e9


def _meminfo(name: str) -> int:
    from edge_bcs.core.machine import ThisMachine

    physical = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return ThisMachine().memory().get(name, physical)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
