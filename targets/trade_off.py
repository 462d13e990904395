"""`python -m edge_bcs.targets.trade_off`: how small, and what it costs.

Writes `smallest.json` (the smallest working set of every network and objective), `trade_off.json` (budget →
what the planner makes of it for this host, and time and peak measured here; dense
PyTorch's figures for the same step beside it), the plot of the latter, and a README with all figures, to the
folder that is named (default results/memory). Needs the host's compiler; a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

NETWORKS = ("vgg16", "resnet18", "resnet34", "resnet50", "wrn28_2", "wrn28_4", "wrn28_10")
MEASURED = {"vgg16": (6, 7, 9, 12, 20), "resnet18": (6, 8, 10, 16, 32)}
MIB = 1 << 20
IMAGES = 16

_DENSE = """
import json, sys, time, torch, torch.nn.functional as F
from edge_bcs import models
from edge_bcs.runtime.process import resident_peak
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
x, y = torch.rand(int(sys.argv[3]), 3, 32, 32), torch.arange(int(sys.argv[3])) % 10
before = resident_peak()
model = models.create(sys.argv[1]).eval()  # running statistics, as in the artifact
optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
def step():
    moved = x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)
    for _ in range(10):
        moved.requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        moved = (moved.detach() + 2 / 255 * gradient.sign()).clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
    optimizer.zero_grad()
    F.cross_entropy(model(moved), y).backward()
    optimizer.step()
step()
began = time.perf_counter()
step()
print(json.dumps({"images": len(x), "seconds_per_image": (time.perf_counter() - began) / len(x),
                  "bytes": resident_peak() - before}))
"""


def _compiled(name: str, objective: str) -> tuple[Any, Any, Any]:
    """(sparse network, network, job) at 99 %, frozen statistics."""
    from edge_bcs.exporters.network import network_of
    from edge_bcs.exporters.planner import Job

    from edge_bcs import connectivity, models, objectives

    sparse = connectivity.sparsify(models.create(name), sparsity=0.99, seed=0)
    rule = objectives.get(objective)
    return sparse, network_of(sparse, (3, 32, 32)), Job(rule, rule.beta)


def smallest_table() -> list[dict[str, Any]]:
    """The smallest working set of every network for AT and TRADES, exactly and with bfloat16 storage."""
    from edge_bcs.exporters.planner import smallest

    rows = []
    for name in NETWORKS:
        for objective in ("at", "trades"):
            _, network, job = _compiled(name, objective)
            exact = smallest(network, job)
            narrow = smallest(network, replace(job, bfloat16=True))
            rows.append(
                {
                    "network": name,
                    "objective": objective,
                    "kappa": network.kappa,
                    "bytes": exact.peak_bytes,
                    "bfloat16_bytes": narrow.peak_bytes,
                    "two_images_bytes": smallest(network, job, 2).peak_bytes,
                    "micro_batch": exact.choice.micro_batch,
                    "recomputed": len(exact.choice.storage.recomputed),
                    "predicted_seconds_per_image": exact.seconds,
                }
            )
            print(rows[-1], flush=True)
    return rows


def curve(name: str, measure: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    """Budget → plan and predicted time, and the measured ones at the budgets ``measure`` (MiB)."""
    from edge_bcs.exporters import export
    from edge_bcs.exporters.planner import fastest, smallest
    from edge_bcs.runtime.budget import isa

    from .roofline import machine_of, this_host

    sparse, network, job = _compiled(name, "at")
    machine = machine_of(this_host(isa()), threads)
    job = replace(job, machine=machine)
    least = smallest(network, job)
    budgets = {least.peak_bytes} | {megabytes * MIB for megabytes in (*range(5, 33), *measure)}
    points = []
    for budget in sorted(budgets):
        found = fastest(network, job, budget, None, least)
        if found is None:
            continue
        point = {
            "budget_bytes": budget,
            "peak_bytes": found.peak_bytes,
            "micro_batch": found.choice.micro_batch,
            "recomputed": sorted(found.choice.storage.recomputed),
            "predicted_seconds_per_image": found.seconds,
        }
        if budget // MIB in measure and budget % MIB == 0:
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/{name}"
                export(sparse, path, "at", memory=budget, machine=machine, validate=False)
                request = {"path": path, "memory": budget, "threads": threads, "seconds": 6.0}
                answer = _python(["-m", "edge_bcs.targets.host_run"], json.dumps(request))
            point["measured_peak_bytes"] = answer["peak_bytes"]
            point["measured_seconds_per_image"] = answer["seconds_per_step"] / 128
        points.append(point)
        print({key: value for key, value in point.items() if key != "recomputed"}, flush=True)
    return points


def _python(arguments: list[str], text: str = "") -> dict[str, Any]:
    """Run python in a fresh process and read the JSON on its last line."""
    import edge_bcs

    environment = {**os.environ, "PYTHONPATH": str(Path(edge_bcs.__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, check=True, env=environment
    )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def plot(curves: dict[str, Any], path: Path) -> None:
    """Measured and predicted time over the working set; dense PyTorch's beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.2 * len(curves), 4), layout="constrained")
    for axis, (name, data) in zip(axes, curves.items(), strict=True):
        points = data["points"]
        real = [point for point in points if "measured_peak_bytes" in point]
        axis.plot(
            [point["peak_bytes"] / MIB for point in points],
            [1e3 * point["predicted_seconds_per_image"] for point in points],
            color="#8899aa",
            label="predicted",
        )
        axis.plot(
            [point["measured_peak_bytes"] / MIB for point in real],
            [1e3 * point["measured_seconds_per_image"] for point in real],
            "o",
            color="#c2410c",
            label="measured",
        )
        for point in real:
            axis.annotate(
                f"{point['micro_batch']} images",
                (point["measured_peak_bytes"] / MIB, 1e3 * point["measured_seconds_per_image"]),
                textcoords="offset points",
                xytext=(5, 6),
                fontsize=8,
            )
        dense = data["dense_pytorch"]
        axis.plot(
            dense["bytes"] / MIB,
            1e3 * dense["seconds_per_image"],
            "s",
            color="#1d4ed8",
            label="dense PyTorch",
        )
        axis.set(
            title=f"{name}, 99 %, AT with PGD-10", xlabel="working set (MiB)", xscale="log", yscale="log"
        )
        axis.set_ylabel("time per image (ms)")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8, loc="upper center")
    figure.savefig(path, dpi=130)


def readme(rows: list[dict[str, Any]], curves: dict[str, Any], machine: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        "# Memory: how small, and what it costs",
        "",
        "99 % sparsity (the paper's distribution), 32×32 images, frozen statistics, PGD-10. Working set:",
        "every byte that ONNX Runtime allocates, every bound buffer, the micro-batch; not the interpreter.",
        "",
        f"`make trade-off`, {machine['date']}, {machine['cpu']}, {machine['threads']} threads,",
        f"load average {machine['load']:.1f} before: bytes are exact, times are one short run each.",
        "",
        "## The smallest budget that works at all",
        "",
        "| network | objective | κ | smallest (bytes) | MiB | with bf16 | two images | recomputed | time |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['objective']} | {row['kappa']:,} | {row['bytes']:,} | "
            f"{row['bytes'] / MIB:.2f} | {row['bfloat16_bytes'] / MIB:.2f} | "
            f"{row['two_images_bytes'] / MIB:.2f} | {row['recomputed']} | "
            f"{1e3 * row['predicted_seconds_per_image']:.0f} ms |"
        )
    lines += [
        "",
        'One image at a time; "recomputed" activations are computed a second time in the backward pass. The',
        "time is predicted, an image of a whole step, for four Cortex-A72 cores (`exporters/cost_model.py`).",
        "",
        "## Budget and time",
        "",
        "![time per image over the working set](trade_off.png)",
    ]
    for name, data in curves.items():
        dense = data["dense_pytorch"]
        lines += [
            "",
            f"### {name}, AT",
            "",
            "| budget | micro-batch | recomputed | predicted peak | measured | predicted time | measured |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for point in data["points"]:
            if "measured_peak_bytes" in point:
                lines.append(
                    f"| {point['budget_bytes'] // MIB} MiB | {point['micro_batch']} | "
                    f"{len(point['recomputed'])} | "
                    f"{point['peak_bytes']:,} | {point['measured_peak_bytes']:,} | "
                    f"{1e3 * point['predicted_seconds_per_image']:.0f} ms | "
                    f"{1e3 * point['measured_seconds_per_image']:.1f} ms |"
                )
        lines += [
            "",
            f"Dense PyTorch {data['torch']}, the same step on {dense['images']} images at once: "
            f"{dense['bytes'] / MIB:.0f} MiB above what its process occupied before, "
            f"{1e3 * dense['seconds_per_image']:.1f} ms an image.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/memory"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    import torch
    from edge_bcs.runtime.budget import isa
    from edge_bcs.runtime.machine import Machine

    cpu = f"{os.cpu_count()} cores of {Machine().processor() or platform.machine()} ({isa()})"
    machine: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu, "threads": options.threads}
    machine["load"] = os.getloadavg()[0]
    rows = smallest_table()
    curves = {}
    for name, budgets in MEASURED.items():
        points = curve(name, budgets, options.threads)
        dense = _python(["-c", _DENSE, name, str(options.threads), str(IMAGES)])
        curves[name] = {"points": points, "dense_pytorch": dense, "torch": torch.__version__}
        print(dense, flush=True)
    for file, content in (("smallest", rows), ("trade_off", curves)):
        text = json.dumps({"machine": machine, "results": content}, indent=1)
        (options.folder / f"{file}.json").write_text(text + "\n")
    plot(curves, options.folder / "trade_off.png")
    (options.folder / "README.md").write_text(readme(rows, curves, machine))


if __name__ == "__main__":
    main()
