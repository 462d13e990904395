"""What a training's process occupies outside its byte budget: measured, or predicted from the plan.

The budget caps the arena. Beside it lie the interpreter with its libraries, what grows with the graph (ONNX
Runtime's sessions, images on their way), and, for artifacts of before 0.2, the holes that the allocator
leaves between tensors.

edge_bcs/bench/outside.py measures what the prediction is fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plans import MemoryPlan

MEASURED = "measured"
PREDICTED = "predicted"

LIBRARIES_BYTES = 71_500_000
"""Interpreter, numpy, ONNX Runtime, the command line: with the pages of their files that are in use."""
SESSIONS_BYTES, NODE_BYTES, THREAD_BYTES, IMAGES = 3_660_000, 19_400, 386_000, 2.3
"""Sessions and graph: of every process, of each node of its graphs, of each thread but the first, and in
units of a micro-batch of images."""
HOLES, MOST_HOLES = 1 / 16, 1 << 20
"""Share of the tensors, and the most: the larger they are the better they fill the memory."""
ACCURACY = 2 << 20
"""How far the prediction may be from what is recorded in results/memory, libraries apart: those are the
machine's own."""


@dataclass(frozen=True)
class Outside:
    """Bytes of a process beside its working set.

    Attributes:
        libraries: interpreter and libraries; sessions: sessions and graph; holes: of the allocator, where
            tensors have no places.
        source: MEASURED or PREDICTED.
    """

    libraries: int
    sessions: int
    holes: int
    source: str

    @classmethod
    def measured(cls, resident: int, peak: int, placed: int, libraries: int) -> Outside:
        """From the process's peak, the counted and the placed one of its working set, and its libraries."""
        return cls(libraries, resident - placed - libraries, placed - peak, MEASURED)

    @property
    def total(self) -> int:
        """All three."""
        return self.libraries + self.sessions + self.holes

    def to_json(self) -> dict[str, Any]:
        """As `edge-bcs simulate --json` has it."""
        return {
            "interpreter_and_libraries": self.libraries,
            "sessions_and_graph": self.sessions,
            "allocator_holes": self.holes,
            "source": self.source,
        }


def predicted_outside(plan: MemoryPlan, threads: int) -> Outside:
    """What the process of an artifact should occupy outside its budget, where it was not run."""
    return Outside(LIBRARIES_BYTES, *prediction(terms_of(plan, threads)), PREDICTED)


def prediction(terms: Mapping[str, int]) -> tuple[int, int]:
    """(sessions and graph, holes) of a process with these terms."""
    constants = {"process": SESSIONS_BYTES, "nodes": NODE_BYTES, "threads": THREAD_BYTES, "images": IMAGES}
    sessions = sum(constant * terms[name] for name, constant in constants.items())
    return round(sessions), min(MOST_HOLES, round(HOLES * terms["tensors"]))


def terms_of(plan: MemoryPlan, threads: int) -> dict[str, int]:
    """What the model multiplies: the lists are made once, and that graph's session is closed then."""
    return {
        "process": 1,
        "nodes": sum(len(phase.nodes) for name, phase in plan.phases.items() if name != "lists"),
        "threads": threads - 1,
        "images": plan.bound.get("input", 0),
        "tensors": 0 if plan.placed else plan.peak_bytes - plan.bound_bytes,
    }
