"""The compiler, from top to bottom: a sparse network becomes graphs and a memory plan.

| pass | from | to | where |
| --- | --- | --- | --- |
| capture | a torch module | layers with shapes | `frontends` |
| number | layers, connections | `Network`: buffers, kernels, lists | `network` |
| fuse | layers | one forward operator for several layers | `fusion` |
| lower | forward operators | nodes of a graph | `forward`, `operators` |
| differentiate | forward nodes | nodes of the backward pass | `autodiff`, `operators` |
| choose | a budget | micro-batch, storage, kernels | `memory.planner` |
| store | a training graph | the same with activations recomputed or narrowed | `memory.storage` |
| replay | graphs | every tensor's life, and the peak | `memory.replay` |

Nothing here is written or run; `artifact` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal

from edge_bcs.targets.plans import MemoryPlan

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import PLAIN
from edge_bcs.core.units import format_bytes

from .graphs import attack_graph, evaluation_graph, lists_graph, optimizer_graph, training_graph
from .memory.planner import Choice, Found, Job, fastest, smallest
from .memory.replay import plan
from .memory.storage import Storage, kept_stacks, store
from .network import Network
from .nodes import Graph

DEFAULT_MICRO_BATCH = 32
"""Images a run where no budget asks for fewer: 16, whole vectors, for each of two threads. More are hardly
faster, and what a micro-batch's statistics teach must not depend on the machine that compiles."""
_BYTES_PER_CONNECTION = 28  # values, indices, momentum, gradients and the three lists


@dataclass(frozen=True)
class Compiled:
    """Graphs and plan of one choice.

    Attributes:
        network: with the kernels of the choice. graphs: "training", "attack", "eval", "optimizer", "lists".
    """

    network: Network
    choice: Choice
    graphs: dict[str, Graph]
    memory: MemoryPlan

    @property
    def micro_batch(self) -> int:
        """Images a run of a graph."""
        return self.choice.micro_batch


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
    return build(network, job, choose(network, job, micro_batch, budget))


def choose(network: Network, job: Job, micro_batch: int | None, budget: int | None) -> Choice:
    """The choice of the fastest plan inside the budget; without one, `keep_everything`.

    Raises:
        EdgeBcsError: nothing fits.
    """
    if budget is None:
        return keep_everything(network, job, micro_batch)
    known: Found = {}
    least = smallest(network, job, micro_batch, known)
    found = fastest(network, job, budget, micro_batch, least) if least.peak_bytes <= budget else None
    if found is None:
        raise EdgeBcsError(_refusal(network, job, budget, micro_batch, known))
    return found.choice


def keep_everything(network: Network, job: Job, micro_batch: int | None = None) -> Choice:
    """What the backward pass reads is kept, or all of it as bfloat16 where the job allows that."""
    fewest = 2 if network.batch_statistics else 1
    images = micro_batch or min(DEFAULT_MICRO_BATCH, max(fewest, job.batch_size))
    choice = Choice(images, job.objective.two_branches and network.batch_statistics)
    if not job.bfloat16:
        return choice
    stacks = kept_stacks(training_graph(network, images, job.objective.name, job.beta, choice.keep_both))
    return replace(choice, storage=Storage(narrowed=frozenset(stacks)))


def build(network: Network, job: Job, choice: Choice) -> Compiled:
    """Emit, differentiate and plan the graphs of a choice."""
    network, images = choice.network(network), choice.micro_batch
    training = training_graph(network, images, job.objective.name, job.beta, choice.keep_both)
    graphs = {
        "training": store(training, choice.storage),
        "attack": attack_graph(network, images),
        "eval": evaluation_graph(network, images),
        "optimizer": optimizer_graph(network),
        "lists": lists_graph(network),
    }
    bound = network.buffers(images, job.objective.two_branches)
    return Compiled(network, choice, graphs, plan(graphs, bound, network.connections))


# What is said when nothing fits


def _refusal(network: Network, job: Job, budget: int, micro_batch: int | None, known: Found) -> str:
    least = smallest(network, job, micro_batch, known)
    need = least.peak_bytes
    advice = "" if micro_batch is None else f" with a micro-batch of {micro_batch}"
    changes = [
        (size > budget, size, f"{what}: {size} bytes" + (" (enough)" if size <= budget else ""))
        for what, size in _changes(network, job, budget, micro_batch, need, known)
    ]
    if all(size > budget for _, size, _ in changes):
        changes.append((True, need, "a smaller network or smaller images"))
    help_ = "; ".join(text for _, _, text in sorted(changes))
    return (
        f"{format_bytes(budget)} ({budget} bytes) is too little{advice}: the smallest feasible budget is "
        f"{need} bytes ({format_bytes(need)}, micro-batch {least.choice.micro_batch}); "
        f"what would help: {help_}"
    )


def _changes(
    network: Network, job: Job, budget: int, micro_batch: int | None, need: int, known: Found
) -> Iterator[tuple[str, int]]:
    """(change, smallest working set then) of what makes the smallest, ``need`` bytes, smaller."""
    options: list[tuple[str, Network, Job, int | None]] = []
    if micro_batch is not None and micro_batch > (2 if network.batch_statistics else 1):
        options.append(("no --micro-batch", network, job, None))
    if not job.bfloat16:
        options.append(("--store bf16", network, replace(job, bfloat16=True), micro_batch))
    if network.batch_statistics:
        frozen = replace(network, batch_statistics=False)
        options.append(("--batch-norm frozen", frozen, job, micro_batch))
    if job.objective.two_branches:
        plain = replace(job, objective=PLAIN)
        options.append((f"--objective {PLAIN.name}", network, plain, micro_batch))
    for what, changed, other, images in options:
        size = smallest(changed, other, images, known).peak_bytes
        if size < need:
            yield what, size
    fewer = network.kappa + (budget - need) // _BYTES_PER_CONNECTION
    if fewer > 0:
        sparsity = 1 - Decimal(fewer) / network.size
        digits = sparsity.quantize(Decimal("0.0001"), ROUND_CEILING)
        kappa = int((1 - digits) * network.size)
        yield f"a new network of --sparsity {digits}", need - _BYTES_PER_CONNECTION * (network.kappa - kappa)
