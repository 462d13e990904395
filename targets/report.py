"""The simulator's answer as files: one self-contained web page, and a trace for Chrome's viewer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from edge_bcs import __version__
from edge_bcs.core.files import write_atomically
from edge_bcs.core.outputs import containing, json_with

from .layout import layout_of
from .plans import Phase
from .simulator import Simulation

_TEMPLATE = Path(__file__).resolve().parent / "report.html"
_TITLE = "<title>Memory of an edge-bcs artifact</title>"
WRITTEN = {
    "html": containing(_TITLE),
    "trace": containing('"otherData": {"artifact": '),
    "json": json_with("artifact", "verdict", "predicted_peak_bytes", "phases"),
}
"""By which the files of `edge-bcs simulate` are recognised."""


def html(simulation: Simulation) -> str:
    """The page: drawn in the browser from the JSON inside it, with nothing to load from anywhere."""
    plan = simulation.plan
    order = Counter(
        {
            tensor.category: -tensor.birth
            for phase in plan.phases.values()
            for tensor in reversed(phase.allocations)
        }
    )
    document = {
        "version": __version__,
        "board": simulation.target.title if simulation.target else "this host",
        "summary": simulation.to_json(),
        "bound": _bound_categories(simulation),
        "order": [category for category, _ in order.most_common()],
        "phases": {name: _phase(phase) for name, phase in plan.phases.items()},
    }
    # "<" cannot end the script element from within a JSON string once it is escaped.
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", content)


def _phase(phase: Phase) -> dict[str, Any]:
    layout = layout_of(phase)
    return {
        "nodes": phase.nodes,
        "tensors": [[t.name, t.bytes, t.category, t.birth, t.death, t.type] for t in phase.allocations],
        "addresses": layout.addresses,
        "extent": layout.extent,
        "live": layout.live,
    }


def _bound_categories(simulation: Simulation) -> dict[str, int]:
    """Bytes of the bound buffers by category: a phase's peak without what it allocates."""
    phase = simulation.plan.peak_phase
    peak = max(phase.live(), key=Counter.total, default=Counter[str]())
    return {name: size - peak[name] for name, size in phase.categories.items() if size > peak[name]}


def trace(simulation: Simulation) -> dict[str, Any]:
    """The plan in the Trace Event Format, for chrome://tracing and ui.perfetto.dev.

    Each phase is a process; a node takes one microsecond of the trace, since this is about order, not
    duration. The nodes lie on the first track, tensors on as few further tracks as keep those alive at
    once apart, and a counter stacks the live bytes by category.
    """
    events: list[dict[str, Any]] = []
    for process, (name, phase) in enumerate(simulation.plan.phases.items(), start=1):
        title = f"{name} (peak {phase.peak_bytes} bytes)"
        events.append({"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": title}})
        events.append({"ph": "M", "pid": process, "tid": 0, "name": "thread_name", "args": {"name": "nodes"}})
        costs = zip(phase.flops, phase.moved, strict=True)
        arguments: list[dict[str, int]] = [{"flops": flops, "bytes_moved": moved} for flops, moved in costs]
        for step, node in enumerate(phase.nodes):
            entry = {"ph": "X", "pid": process, "tid": 0, "ts": step, "dur": 1, "name": node, "cat": "node"}
            events.append({**entry, "args": arguments[step] if arguments else {}})
        ends: list[int] = []  # track → the first step at which nothing lies on it
        for tensor in phase.allocations:
            track = next((t for t, step in enumerate(ends) if step <= tensor.birth), len(ends))
            ends[track : track + 1] = [tensor.death + 1]
            events.append(
                {
                    "ph": "X",
                    "pid": process,
                    "tid": track + 1,
                    "ts": tensor.birth,
                    "dur": tensor.death + 1 - tensor.birth,
                    "name": tensor.name,
                    "cat": tensor.category,
                    "args": {"bytes": tensor.bytes, "category": tensor.category, "type": tensor.type},
                }
            )
        steps = phase.live()
        categories = sorted({category for step in steps for category in step})
        for step, live in enumerate([*steps, Counter[str]()]):
            sizes = {category: live[category] for category in categories}
            counter = {"ph": "C", "pid": process, "tid": 0, "ts": step, "name": "live bytes"}
            events.append({**counter, "args": {"bound buffers": simulation.plan.bound_bytes, **sizes}})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"artifact": str(simulation.artifact.path)},
    }


def write(path: str | Path, content: str) -> None:
    """Write a text file whole or not at all, in a folder that is made if it is missing.

    Raises:
        EdgeBcsError: it cannot be written.
    """
    write_atomically(Path(path), content.encode(), make_folder=True)
