"""`make engines`: what a node costs beside its arithmetic, and what graphs take, with both engines in turn.

Writes engines.json and engines.md to the folder that is named (default results/native). The first part runs
a thousand operators on 16 numbers each, whose arithmetic is next to nothing; the second the graphs of
networks in the smallest arena that is found. One thread, whose time on a processor counts; every round
runs each engine once.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edge_bcs.core.files import write_atomically, write_json

from . import resident

NATIVE, ORT = "native", "onnxruntime"
_PAIRS, _NUMBERS, _ROUNDS = 500, 16, 400
_GRAPHS, _TIMES = ("eval", "attack", "training"), 30


def in_turn(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Way → least and median seconds of processor time of a call, each called once a round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    return {name: {"least": min(t), "median": statistics.median(t)} for name, t in taken.items()}


def nodes(rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Engine → seconds of a node whose arithmetic is next to nothing."""
    import numpy as np
    import onnxruntime

    from edge_bcs.exporters.memory.replay import plan, replay_of
    from edge_bcs.exporters.nodes import Graph, TensorType
    from edge_bcs.exporters.program import place
    from edge_bcs.runtime.budget import Budget
    from edge_bcs.runtime.buffers import arena_for
    from edge_bcs.runtime.library import load
    from edge_bcs.runtime.sessions import session_options

    kind = TensorType("f32", (_NUMBERS,))
    buffers = {"input": kind, "logits": kind}
    graph, last = Graph("eval", {"input": kind}, {"logits": kind}), "input"
    for i in range(_PAIRS):
        graph.emit("Narrow", [last], [f"narrow.{i}"])
        last = "logits" if i == _PAIRS - 1 else f"wide.{i}"
        graph.emit("Widen", [f"narrow.{i}"], [last])
    replay = {"eval": replay_of(graph, {})}
    memory = plan(replay, buffers)
    content = place(replay, memory, buffers, "input").dump()
    one, other = arena_for(memory.peak_bytes), arena_for(memory.peak_bytes)
    budget = Budget(None)
    try:
        options = session_options(1, budget)
        session = onnxruntime.InferenceSession(
            graph.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        budget.reserve(memory.bound_bytes, "the buffers")
        assert not budget.place(content, other, memory.bound_bytes)
        binding = session.io_binding()
        for name, bind in (("input", binding.bind_ortvalue_input), ("logits", binding.bind_ortvalue_output)):
            address, length = budget.place_of(name)
            array = other[address : address + length].view(np.float32)
            bind(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

        def by_onnxruntime() -> None:
            with budget.running("eval"):
                session.run_with_iobinding(binding)

        text, size, pointer, number = ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
        library = load({
            "edge_bcs_program_open": (pointer, [text, size, pointer, size, number, number, text, size]),
            "edge_bcs_program_run": (number, [pointer, text, text, size]),
            "edge_bcs_program_close": (None, [pointer]),
        })  # fmt: skip
        said = ctypes.create_string_buffer(500)
        program = library.edge_bcs_program_open(
            content, len(content), one.ctypes.data, one.size, 1, 0, said, len(said)
        )
        assert program, said.value

        def by_program() -> None:
            assert library.edge_bcs_program_run(program, b"eval", said, len(said)) == 0

        found = in_turn({NATIVE: by_program, ORT: by_onnxruntime}, rounds)
        library.edge_bcs_program_close(program)
    finally:
        budget.close()
    return {
        name: {kind: seconds / (2 * _PAIRS) for kind, seconds in each.items()} for name, each in found.items()
    }


def graphs(artifact: Path, times: int = _TIMES) -> dict[str, dict[str, dict[str, float]]]:
    """Graph → engine → seconds of a run."""
    import numpy as np

    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.engines import ENGINES, open_engine

    engines = {name: open_engine(name, Artifact.read(artifact), None, 1) for name in ENGINES}
    try:
        for engine in engines.values():
            engine.arrays["sample_weight"][...] = 1
            engine.arrays["lazy_reset_grad"][...] = True
            for name in ("input", "adversarial"):
                engine.arrays[name][...] = np.random.default_rng(0).random(engine.arrays[name].shape)

        def runs(graph: str) -> dict[str, Callable[[], None]]:
            return {name: partial(engine.run_graph, graph) for name, engine in engines.items()}

        return {graph: in_turn(runs(graph), times) for graph in _GRAPHS}
    finally:
        for engine in engines.values():
            engine.close()


_TOLD = """\
# The two engines beside each other

`make engines`, {date}, {machine}, one thread, both engines in turn.

## A node beside its arithmetic

A thousand operators on 16 numbers each: {native:.0f} ns a node by our own runner, {ort:.0f} ns by ONNX
Runtime {version}, {gone:.0f} % less (aim: half). Medians: {native_median:.0f} and {ort_median:.0f} ns.

## Graphs

99 % sparse, AT, in the smallest arena that is found; milliseconds of processor time of a run, the least of
{times}.

| network | batch norm | graph | our own | ONNX Runtime | of its time |
| --- | --- | --- | ---: | ---: | ---: |
{rows}
"""


def table(content: Mapping[str, Any]) -> str:
    """engines.md, from engines.json."""
    lines = []
    for row in content["rows"]:
        for graph, found in row["graphs"].items():
            own, other = found[NATIVE]["least"], found[ORT]["least"]
            times = f"{1e3 * own:.2f} | {1e3 * other:.2f} | {100 * own / other:.0f} %"
            lines.append(f"| {row['network']} | {row['statistics']} | {graph} | {times} |")
    node = content["nodes"]
    return _TOLD.format(
        date=content["date"],
        machine=content["machine"],
        version=content["onnxruntime"],
        native=1e9 * node[NATIVE]["least"],
        ort=1e9 * node[ORT]["least"],
        gone=100 * (1 - node[NATIVE]["least"] / node[ORT]["least"]),
        native_median=1e9 * node[NATIVE]["median"],
        ort_median=1e9 * node[ORT]["median"],
        times=content["times"],
        rows="\n".join(lines),
    )


def main() -> None:
    """Measure all and write both files."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/native"))
    folder = parser.parse_args().folder
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, statistics_of in resident.CASES:
            artifact = resident.exported(name, statistics_of, Path(scratch) / f"{name}-{statistics_of}", 16)
            rows.append({"network": name, "statistics": statistics_of, "graphs": graphs(artifact)})
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, CPython {platform.python_version()}",
        "onnxruntime": onnxruntime.__version__,
        "nodes": nodes(),
        "times": _TIMES,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "engines.json", content)
    write_atomically(folder / "engines.md", table(content).encode())


if __name__ == "__main__":
    main()
