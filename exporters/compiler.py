"""The compiler, from top to bottom: a sparse network becomes graphs and a memory plan.

| pass | from | to | where |
| --- | --- | --- | --- |
| capture | a torch module | layers with shapes | `frontends` |
| number | layers, connections | `Network`: buffers, kernels, lists | `network` |
| fuse | layers | one forward operator for several layers | `fusion` |
| lower | forward operators | nodes of a graph | `forward`, `operators` |
| differentiate | forward nodes | nodes of the backward pass | `autodiff`, `operators` |
| replay | graphs | every tensor's life, and the peak | `memory.replay` |
| choose | replays, a budget | `Choice`: micro-batch, storage, kernels | `memory.planner`, `memory.space` |
| store | graphs, the choice | the same with activations recomputed or narrowed | `memory.storage` |
| replay | what was changed | the memory plan | `memory.replay` |
| place | the replays | `Program`: every tensor's address in one arena | `program` |

Nothing here is written or run; `artifact` does that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any

from edge_bcs.runtime.buffers import ALIGNMENT, aligned
from edge_bcs.targets.cost_model import lanes_of
from edge_bcs.targets.plans import MemoryPlan

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import PLAIN
from edge_bcs.core.part import Part
from edge_bcs.core.units import format_bytes

from .memory.choice import Choice, Job
from .memory.planner import Planner
from .memory.space import Figures
from .network import Kernel, Network
from .nodes import Graph
from .program import Program, place

PARTS = (Part.parse("head"), Part.parse("last:2"), Part.parse("last:4"))
"""What may be trained instead of all, where memory does not suffice."""
_BYTES_PER_CONNECTION = 28  # values, indices, momentum, gradients and the three lists:
_ROUNDING = 5 * ALIGNMENT  # five buffers, each in whole units of the alignment


@dataclass(frozen=True)
class Compiled:
    """Graphs and plan of one choice.

    Attributes:
        graphs: "training", "attack", "eval", "optimizer", "lists".
        program: the same with addresses.
    """

    network: Network
    choice: Choice
    graphs: dict[str, Graph]
    memory: MemoryPlan
    program: Program

    @property
    def micro_batch(self) -> int:
        """Images a run of the training graph."""
        return self.choice.micro_batch

    def described(self, budget: int | None, store: str) -> dict[str, Any]:
        """What the manifest says of it: the buffers' tables, the images of a run, the memory plan.

        Args:
            budget: the bytes, and store: the form of kept activations, that were asked for.
        """
        network, storage = self.network, self.choice.storage
        return {
            "kappa": network.kappa,
            "size": network.size,
            "layers": [kernel.described() for kernel in self.kernels],
            "dense": [
                {"name": segment.name, "shape": list(segment.shape), "offset": segment.offset}
                for segment in network.dense.values()
            ],
            "statistics": [
                {"name": segment.name, "channels": segment.size, "offset": segment.offset}
                for segment in network.statistics.values()
            ],
            "lists_length": network.lists_length,
            **({} if network.part.everything else {"train": _described(network)}),
            "micro_batch": self.micro_batch,
            **({} if self.choice.images == self.micro_batch else {"attack_micro_batch": self.choice.images}),
            "lanes": lanes_of(self.micro_batch),
            "memory": {
                **self.memory.to_json(budget),
                "choice": {
                    "store": store,
                    "keep_both": self.choice.keep_both,
                    "recomputed": sorted(storage.recomputed),
                    "narrowed": sorted(storage.narrowed),
                },
            },
        }

    @property
    def kernels(self) -> list[Kernel]:
        """Those of the network, with the algorithms of the choice."""
        return [
            replace(kernel, algorithm="sparse") if kernel.name in self.choice.sparse else kernel
            for kernel in self.network.kernels.values()
        ]


def _described(network: Network) -> dict[str, Any]:
    """What the manifest says of the part that is trained, and of transpose lists if not all have them."""
    lists = network.lists
    having = [name for name, (_, backwards) in lists.pointers.items() if backwards >= 0]
    transposed = {"transposed": {"layers": having, "kappa": lists.transposed}} if lists.partial else {}
    return {**network.trained.described(), **transposed}


def compile_network(
    network: Network, job: Job, micro_batch: int | None = None, budget: int | None = None
) -> Compiled:
    """Compile a network (`network.network_of`: captured, numbered, fused) the fastest way that fits.

    Args:
        network: the network. job: what a training step is, and for whom it is to be fast.
        micro_batch: images a run; default: what the planner finds fastest, without a budget
            ``DEFAULT_MICRO_BATCH``.
        budget: bytes of the working set, or None for no limit.

    Raises:
        EdgeBcsError: nothing fits; the message gives the smallest feasible budget in bytes, and what would
            help.
    """
    planner = Planner(network)
    if budget is None:
        return build(planner, job, planner.unlimited(job, micro_batch))
    compiled = compiled_inside(planner, job, budget, micro_batch)
    if compiled is None:
        raise EdgeBcsError(_refusal(planner, job, budget, micro_batch))
    return compiled


def compiled_inside(
    planner: Planner, job: Job, budget: int, micro_batch: int | None = None
) -> Compiled | None:
    """The fastest plan that is found whose arena has at most ``budget`` bytes; None if none fits."""
    figures = planner.fastest(job, budget, micro_batch)
    return None if figures is None else build(planner, job, figures.choice)


def build(planner: Planner, job: Job, choice: Choice) -> Compiled:
    """Carry a choice out on the graphs that it was made for."""
    network, replays = planner.network, planner.carried_out(job, choice)
    buffers = network.buffers(choice.images, job.objective.two_branches)
    memory = planner.memory(job, choice)
    program = place(replays, memory, buffers, job.objective.training_input)
    return Compiled(
        network, choice, {phase: replay.graph for phase, replay in replays.items()}, memory, program
    )


# What is said when nothing fits


def _refusal(planner: Planner, job: Job, budget: int, micro_batch: int | None) -> str:
    least = planner.smallest(job, micro_batch)
    advice = "" if micro_batch is None else f" with a micro-batch of {micro_batch}"
    changes = sorted(_changes(planner, job, budget, micro_batch, least))
    help_ = [f"{what}: {size} bytes" + (" (enough)" if size <= budget else "") for size, what in changes]
    if all(size > budget for size, _ in changes):
        help_.append("a smaller network or smaller images")
    return (
        f"{format_bytes(budget)} ({budget} bytes) is too little{advice}: the smallest feasible budget is "
        f"{least.peak_bytes} bytes ({format_bytes(least.peak_bytes)}, micro-batch "
        f"{least.choice.micro_batch}); what would help: {'; '.join(help_)}"
    )


def _changes(
    planner: Planner, job: Job, budget: int, micro_batch: int | None, least: Figures
) -> Iterator[tuple[int, str]]:
    """(smallest working set then, change) of what makes the smallest, ``least``, smaller."""
    network = planner.network
    options: list[tuple[str, Planner, Job, int | None]] = []
    if micro_batch is not None and micro_batch > network.fewest_images:
        options.append(("no --micro-batch", planner, job, None))
    if not job.bfloat16:
        options.append(("--store bf16", planner, replace(job, bfloat16=True), micro_batch))
    if network.batch_statistics:
        smaller = Planner(replace(network, batch_statistics=False))
        options.append(("--batch-norm frozen", smaller, job, micro_batch))
    if job.objective.two_branches:
        options.append((f"--objective {PLAIN.name}", planner, replace(job, objective=PLAIN), micro_batch))
    if network.part.everything:
        for part in PARTS:
            with contextlib.suppress(EdgeBcsError):  # of a network with fewer layers
                smaller = Planner(replace(network, part=part, batch_statistics=False))
                words = f"--train {part.text}{' --batch-norm frozen' * network.batch_statistics}"
                options.append((words, smaller, job, micro_batch))
    for what, changed, other, images in options:
        size = changed.smallest(other, images).peak_bytes
        if size < least.peak_bytes:
            yield size, what
    kappa = network.kappa + (budget - least.peak_bytes - _ROUNDING) // _BYTES_PER_CONNECTION
    if kappa > 0:
        sparsity = (1 - Decimal(kappa) / network.size).quantize(Decimal("0.0001"), ROUND_CEILING)
        kappa = int((1 - sparsity) * network.size)
        fewer, length = network.kappa - kappa, network.lists_length
        size = least.peak_bytes - 4 * (aligned(4 * network.kappa) - aligned(4 * kappa))
        size -= aligned(4 * length) - aligned(4 * (length - 3 * fewer))
        yield size, f"a new network of --sparsity {sparsity}"
