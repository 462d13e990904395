"""The memory plan of an artifact: as the compiler makes it, and as its manifest tells it, typed and checked.

Nothing here recomputes it; layouts, times and reports are views of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from edge_bcs.runtime.buffers import ALIGNMENT, aligned
from edge_bcs.targets.cost_model import KERNELS, UPDATES, WINOGRAD, Walk

from edge_bcs.core.errors import EdgeBcsError

HOLES = "holes"
"""The category of what lies between tensors and buffers, and belongs to none."""
_LARGEST = 1 << 60  # number of the cost of a node
_LONGEST_LIVES = 1 << 20  # of all tensors together, in nodes; WRN-34-10 has some ten thousand


@dataclass(frozen=True)
class Allocation:
    """One allocation, alive from the start of node ``birth`` to the end of node ``death`` of its phase.

    Attributes:
        bytes: its size. type: element type and dimensions, such as "f32[1,4624,16]", "" if unknown.
        address: from the end of the bound buffers, -1 where it has none (artifacts of before 0.2).
    """

    name: str
    bytes: int
    category: str
    birth: int
    death: int
    type: str = ""
    address: int = -1

    @property
    def end(self) -> int:
        """The first address that is free behind it, a multiple of the alignment."""
        return self.address + aligned(self.bytes)


@dataclass(frozen=True)
class Phase:
    """One graph of the artifact.

    Attributes:
        peak_bytes: the working set at its peak: from the first byte of the bound buffers to the last of a
            tensor, with the holes; peak_node: the first node at which it is reached; categories: bytes by
            category then, largest first.
        nodes: names in order of execution; flops, moved, walks: of each node its floating-point operations,
            the bytes it reads and writes and its products, empty if the manifest does not tell.
        apart: whether no training runs it, so that its peak is not one of training.
    """

    name: str
    peak_bytes: int
    peak_node: str
    categories: Mapping[str, int]
    nodes: tuple[str, ...]
    flops: tuple[int, ...]
    moved: tuple[int, ...]
    allocations: tuple[Allocation, ...]
    walks: tuple[tuple[Walk, ...], ...] = ()
    apart: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its part of the manifest."""
        return {
            "peak_bytes": self.peak_bytes,
            "peak_node": self.peak_node,
            "categories": dict(self.categories),
            "nodes": list(self.nodes),
            "flops": list(self.flops),
            "bytes": list(self.moved),
            "walks": [[list(astuple(walk)) for walk in walks] for walks in self.walks],
            "tensors": [list(astuple(allocation)) for allocation in self.allocations],
            **({"apart": True} if self.apart else {}),
        }

    def live(self) -> list[Counter[str]]:
        """For each node the bytes in use while it runs, by category, holes among them, without the bound
        buffers."""
        return live(self.allocations, len(self.nodes))


def live(allocations: Iterable[Allocation], nodes: int) -> list[Counter[str]]:
    """For each node the bytes in use while it runs, by category; what lies between the tensors up to the
    highest of them is holes."""
    steps: list[Counter[str]] = [Counter() for _ in range(nodes)]
    ends = [0] * nodes
    for tensor in allocations:
        for step in range(tensor.birth, tensor.death + 1):
            steps[step][tensor.category] += tensor.bytes
            if tensor.address >= 0:
                ends[step] = max(ends[step], tensor.end)
    for counter, end in zip(steps, ends, strict=True):
        holes = end - counter.total()
        if holes > 0:
            counter[HOLES] = holes
    return steps


@dataclass(frozen=True)
class MemoryPlan:
    """All phases over one set of bound buffers.

    Attributes:
        peak_bytes: the arena in which a training lies. bound: buffer → bytes, alive all the time.
        placed: whether tensors have addresses; artifacts of before 0.2 only count them.
    """

    peak_bytes: int
    bound: Mapping[str, int]
    phases: Mapping[str, Phase]
    placed: bool = True

    @property
    def bound_bytes(self) -> int:
        """Bytes of all bound buffers, one behind the other."""
        return sum(map(aligned, self.bound.values()) if self.placed else self.bound.values())

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak, of those that a training runs."""
        return max(self.phases.values(), key=lambda phase: (not phase.apart, phase.peak_bytes))

    def to_json(self, budget: int | None) -> dict[str, Any]:
        """The manifest's ``memory`` object, which `plan_of` reads; ``budget`` is what it was made for."""
        return {
            "budget": budget,
            "predicted_peak_bytes": self.peak_bytes,
            "placed": self.placed,
            "bound_bytes": self.bound_bytes,
            "bound": dict(self.bound),
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
        }


def plan_of(memory: Any) -> MemoryPlan:
    """Read the manifest's ``memory`` object.

    Raises:
        EdgeBcsError: a field is missing or contradicts another; the sentence names it.
    """
    try:
        phases = {
            name: Phase(
                name=name,
                peak_bytes=int(content["peak_bytes"]),
                peak_node=str(content["peak_node"]),
                categories={str(key): int(size) for key, size in content["categories"].items()},
                nodes=tuple(map(str, content["nodes"])),
                flops=tuple(map(int, content.get("flops", ()))),
                moved=tuple(map(int, content.get("bytes", ()))),
                allocations=tuple(Allocation(*entry) for entry in content["tensors"]),
                walks=tuple(tuple(Walk(*walk) for walk in walks) for walks in content.get("walks", ())),
                apart=content.get("apart", False) is True,
            )
            for name, content in memory["phases"].items()
        }
        bound = {str(name): int(size) for name, size in memory["bound"].items()}
        placed = memory.get("placed", False) is True
        plan = MemoryPlan(int(memory["predicted_peak_bytes"]), bound, phases, placed)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EdgeBcsError(
            f"the manifest's memory plan cannot be read ({type(error).__name__}: {error}); "
            "export the artifact again."
        ) from None
    _check(plan)
    return plan


def _check(plan: MemoryPlan) -> None:
    if not plan.phases:
        raise EdgeBcsError("the manifest's memory plan has no phases; export the artifact again.")
    for phase in plan.phases.values():
        count = len(phase.nodes)
        fault = ""
        for costs in (phase.flops, phase.moved, phase.walks):
            if len(costs) not in (0, count):
                fault = f"tells the cost of {len(costs)} nodes out of {count}"
        if not all(0 <= number <= _LARGEST for number in (*phase.flops, *phase.moved)):
            fault = "has an impossible cost"
        for walk in (walk for walks in phase.walks for walk in walks):
            numbers = (walk.entries, walk.rows, walk.floats, walk.run, walk.lanes)
            known = isinstance(walk.kernel, str) and walk.kernel in (*KERNELS, *UPDATES, WINOGRAD)
            if not known or not all(isinstance(n, int) and 0 <= n <= _LARGEST for n in numbers):
                fault = f"has an impossible product {walk}"
        for tensor in phase.allocations:
            life = (tensor.bytes, tensor.birth, tensor.death, tensor.address)
            valid = all(isinstance(number, int) and number <= _LARGEST for number in life)
            valid = valid and (tensor.address % ALIGNMENT == 0 if plan.placed else tensor.address == -1)
            valid = valid and all(isinstance(t, str) for t in (tensor.name, tensor.category, tensor.type))
            if not valid or not (0 <= tensor.birth <= tensor.death < count and tensor.bytes >= 0):
                fault = f"gives {tensor.name} an impossible life"
        if (
            not fault
            and sum(tensor.death - tensor.birth + 1 for tensor in phase.allocations) > _LONGEST_LIVES
        ):
            fault = "tells of more than can be added up"
        if not fault:
            found = plan.bound_bytes + max((step.total() for step in phase.live()), default=0)
            if found != phase.peak_bytes:
                fault = f"has tensors that reach {found} bytes and names a peak of {phase.peak_bytes}"
        if fault:
            described = " ".join(f"{phase.name} {fault}".split())[:300]  # names come from the file
            raise EdgeBcsError(f"the manifest's memory plan of {described}; export the artifact again.")
    largest = plan.peak_phase.peak_bytes
    if plan.peak_bytes != largest:
        raise EdgeBcsError(
            f"the manifest predicts {plan.peak_bytes} bytes and its phases reach {largest}; "
            "export the artifact again."
        )
