"""`make outside`: what lies outside the budget of networks of several sizes, and how right its prediction is.

Writes outside.json and outside.md to the folder that is named (default results/memory). The constants of
targets/outside.py are fitted to what is written.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_bcs.core.files import write_atomically, write_json
from edge_bcs.targets import outside
from edge_bcs.targets.plans import plan_of

# Measuring: network, objective, pixels, micro-batch, threads. What is held out is not fitted to.
CASES = (
    ("vgg16", "at", 32, 4, 2),
    ("vgg16", "mart", 32, 16, 2),
    ("resnet18", "natural", 32, 4, 1),
    ("resnet18", "at", 32, 2, 1),
    ("resnet18", "at", 32, 2, 4),
    ("resnet18", "trades", 32, 8, 2),
    ("resnet18", "at", 128, 8, 2),
    ("resnet50", "at", 32, 2, 2),
    ("resnet50", "trades", 32, 2, 4),
    ("wrn28_2", "trades", 32, 4, 2),
    ("wrn28_2", "at", 96, 16, 2),
)
HELD_OUT = (
    ("resnet34", "at", 32, 2, 2),
    ("resnet34", "mart", 64, 4, 4),
    ("wrn28_4", "trades", 32, 8, 2),
    ("wrn28_10", "at", 32, 2, 2),
)


def _measured(case: tuple[str, str, int, int, int], folder: Path) -> dict[str, Any]:
    """One row of outside.json."""
    from edge_bcs import Attack, Memory, models
    from edge_bcs.exporters import export
    from edge_bcs.method import connectivity
    from edge_bcs.targets.simulator import run_here

    name, objective, pixels, micro_batch, threads = case
    model = models.create(name, num_classes=10, input_size=pixels)
    sparse = connectivity.sparsify(model, sparsity=0.99, seed=0)
    artifact = export(
        sparse,
        folder / "-".join(map(str, case)),
        objective=objective,
        input_shape=(3, pixels, pixels),
        memory=Memory(micro_batch=micro_batch),
        attack=Attack(steps=2),
        validate=False,
    )
    plan = plan_of(artifact.manifest["memory"])
    found = run_here(artifact, plan.peak_bytes, None, threads, 0.0)
    assert found.outside is not None and found.placed_peak_bytes is not None
    row = {
        "network": name,
        "objective": objective,
        "pixels": pixels,
        "micro_batch": micro_batch,
        "threads": found.threads,
        "peak_bytes": found.peak_bytes,
        "placed_peak_bytes": found.placed_peak_bytes,
        "rss_peak_bytes": found.rss_peak_bytes,
        **found.outside.to_json(),
        "terms": outside.terms_of(plan, found.threads),
    }
    print(row, flush=True)
    return row


def fit(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The constants of targets/outside.py, by least squares over the rows that are not held out."""
    import numpy as np

    used = [row for row in rows if not row["held_out"]]
    names = ("process", "nodes", "threads", "images")
    factors = np.array([[row["terms"][name] for name in names] for row in used], np.float64)
    sessions = np.array([row["sessions_and_graph"] for row in used], np.float64)
    found, *_ = np.linalg.lstsq(factors, sessions, rcond=None)
    libraries = np.mean([row["interpreter_and_libraries"] for row in used])
    return {
        "LIBRARIES_BYTES": round(float(libraries)),
        "SESSIONS_BYTES": round(float(found[0])),
        "NODE_BYTES": round(float(found[1])),
        "THREAD_BYTES": round(float(found[2])),
        "IMAGES": round(float(found[3]), 2),
    }


_TOLD = """\
# What lies outside the budget

`make outside`, {date}, {machine};
99 % sparsity, frozen statistics, budget = predicted peak. MiB of a process that trains as
`edge-bcs finetune` does, at its peak. Counted: the working set, which is what the budget caps. On top
of it come holes between tensors (counted and holes together are what the working set is *placed* in),
sessions and graph, interpreter and libraries. Predicted: holes, sessions and graph, from the plan
alone. Networks in italics were not fitted to.

| network | objective | pixels | images | threads | nodes | counted | holes | sessions | predicted |\
 libraries | process |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

Predicted is {process:.1f} MiB + {nodes:.1f} KiB a node + {threads:.0f} KiB a thread but the first
+ {images:.1f} times a micro-batch of images; for holes {holes:.0f} % of the tensors, at most {most} MiB.
"""


def table(content: Mapping[str, Any]) -> str:
    """outside.md, from outside.json."""
    lines = []
    for row in content["rows"]:
        name = f"*{row['network']}*" if row["held_out"] else row["network"]
        numbers = (row["pixels"], row["micro_batch"], row["threads"], row["terms"]["nodes"])
        sizes = [row[key] for key in ("peak_bytes", "allocator_holes", "sessions_and_graph", "predicted")]
        sizes += [row["interpreter_and_libraries"], row["rss_peak_bytes"]]
        cells = [name, row["objective"], *map(str, numbers), *(f"{size / 2**20:.1f}" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    constants = content["constants"]
    return _TOLD.format(
        date=content["date"],
        machine=content["machine"],
        rows="\n".join(lines),
        process=constants["SESSIONS_BYTES"] / 2**20,
        nodes=constants["NODE_BYTES"] / 2**10,
        threads=constants["THREAD_BYTES"] / 2**10,
        images=constants["IMAGES"],
        holes=100 * outside.HOLES,
        most=outside.MOST_HOLES >> 20,
    )


def main() -> None:
    """Measure all and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/memory"))
    folder = parser.parse_args().folder
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in (*CASES, *HELD_OUT):
            rows.append({**_measured(case, Path(scratch)), "held_out": case in HELD_OUT})
    constants = fit(rows)
    vars(outside).update(constants)
    for row in rows:
        sessions, holes = outside.prediction(row["terms"])
        row["predicted"] = sessions + holes
    import onnxruntime

    machine = (
        f"{platform.machine()}, CPython {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}"
    )
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "constants": constants, "rows": rows}
    write_json(folder / "outside.json", content)
    write_atomically(folder / "outside.md", table(content).encode())
    print(constants)


if __name__ == "__main__":
    main()
