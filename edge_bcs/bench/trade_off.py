"""`python -m edge_bcs.bench.trade_off`: how small, what it costs, and how right the predictions are.

Writes to the folder that is named (default results/memory), each network as soon as it is done:

- `smallest.json`: the smallest working set of every network and objective;
- `machine.toml`: this machine's calibration, on which all predicted times rest;
- `trade_off.json`: budget → what the planner makes of it for this machine; peak and time, predicted and
  measured here, of a step and of each of its graphs; dense PyTorch's figures for the same step;
- `trade_off.png`, and `README.md` with all figures.

What is there is kept; `--again times` measures the times anew, `--again all` everything. `--part smallest`
does without measuring, `--part times` without the table of smallest budgets. What was interrupted goes on
without `--again`. Needs the host's compiler; some ten minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.outputs import check_output, containing
from edge_bcs.plots import write_figure
from edge_bcs.targets.cost_model import Machine

NETWORKS = ("vgg16", "resnet18", "resnet34", "resnet50", "wrn28_2", "wrn28_4", "wrn28_10")
MEASURED = {"vgg16": (6, 7, 9, 12, 20), "resnet18": (6, 8, 10, 16, 32)}
OTHERS = (("vgg16", "trades", 9), ("wrn28_2", "mart", 6), ("wrn28_4", "natural", 12), ("resnet50", "at", 32))
"""Network, objective and budget (MiB) of what else the model of time is held against."""
ACCURACY = 0.25
"""How far from the measured time of a step the predicted one may be."""
_GRAPHS = ("attack", "training", "eval", "optimizer")
MIB = 1 << 20
SECONDS = 6.0
"""For which each artifact is run."""
ATTEMPTS = 3
"""At measuring one artifact, while other work takes the cores."""
IMAGES = 16
_HEADING = "# Memory: how small, and what it costs"

_DENSE = """
import json, sys, time, torch, torch.nn.functional as F
from edge_bcs import models
from edge_bcs.runtime.board.process import resident_peak
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


def compiled(name: str, objective: str) -> tuple[Any, Any, Any]:
    """(sparse network, network, job) at 99 %, frozen statistics."""
    from edge_bcs import models
    from edge_bcs.core.objectives import objective_named
    from edge_bcs.exporters.memory.choice import Job
    from edge_bcs.exporters.network import network_of
    from edge_bcs.method import connectivity

    sparse = connectivity.sparsify(models.create(name), sparsity=0.99, seed=0)
    rule = objective_named(objective)
    return sparse, network_of(sparse, (3, 32, 32)), Job(rule, rule.beta)


def smallest_table(known: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The smallest working set of every network for AT and TRADES, exactly and with bfloat16 storage.

    Args:
        known: rows that are there already.

    Yields:
        All rows so far, after each network.
    """
    from edge_bcs.exporters.memory.planner import Planner

    rows = list(known)
    for name in NETWORKS:
        if any(row["network"] == name for row in rows):
            continue
        planner = Planner(compiled(name, "at")[1])
        for objective in ("at", "trades"):
            _, network, job = compiled(name, objective)
            exact = planner.smallest(job)
            narrow = planner.smallest(replace(job, bfloat16=True))
            rows.append(
                {
                    "network": name,
                    "objective": objective,
                    "kappa": network.kappa,
                    "bytes": exact.peak_bytes,
                    "bfloat16_bytes": narrow.peak_bytes,
                    "two_images_bytes": planner.smallest(job, 2).peak_bytes,
                    "micro_batch": exact.choice.micro_batch,
                    "recomputed": len(exact.choice.storage.recomputed),
                    "predicted_seconds_per_image": exact.seconds,
                }
            )
            print(rows[-1], flush=True)
        yield rows


def curve(name: str, measure: tuple[int, ...], machine: Machine) -> list[dict[str, Any]]:
    """Budget → plan and predicted time, and the measured ones at the budgets ``measure`` (MiB)."""
    from edge_bcs.exporters.memory.planner import Planner

    _, network, job = compiled(name, "at")
    job = replace(job, machine=machine)
    planner = Planner(network)
    budgets = {planner.smallest(job).peak_bytes} | {
        megabytes * MIB for megabytes in (*range(5, 33), *measure)
    }
    points = []
    for budget in sorted(budgets):
        found = planner.fastest(job, budget)
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
            point["measured"] = measured(name, "at", budget, machine)
        points.append(point)
        shown = {key: value for key, value in point.items() if key not in ("recomputed", "measured")}
        print(shown, flush=True)
    return points


def measured(name: str, objective: str, budget: int, machine: Machine) -> dict[str, Any]:
    """Compile a network into a budget and run it here: bytes, and seconds of a step, predicted and measured.

    Returns:
        "phases" and "step" hold (predicted, measured) seconds.
    """
    from edge_bcs.exporters import export
    from edge_bcs.exporters.settings import Memory
    from edge_bcs.targets.plans import plan_of
    from edge_bcs.targets.roofline import step_runs, step_time, this_host

    threads = len(machine.arithmetic)
    sparse, _, _ = compiled(name, objective)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}"
        artifact = export(sparse, path, objective, memory=Memory(budget, machine=machine), validate=False)
        request = {"path": path, "memory": budget, "threads": threads, "seconds": SECONDS}
        answer = least_disturbed(json.dumps(request))
    host = replace(this_host(machine.isa), calibration=machine)
    plan = plan_of(artifact.manifest["memory"])
    expected = step_time(plan, step_runs(artifact), host, threads)
    assert expected is not None
    found = {
        "network": name,
        "objective": objective,
        "budget_bytes": budget,
        "micro_batch": artifact.micro_batch,
        "peak_bytes": answer["peak_bytes"],
        "step": (expected.seconds, answer["seconds_per_step"]),
        "phases": {
            phase: (seconds, answer["phases"][phase]["seconds_per_step"])
            for phase, seconds in expected.phases.items()
        },
        "seconds_per_image": answer["seconds_per_step"] / artifact.batch_size,
        "cores_share": answer["cores_share"],
    }
    print(found, flush=True)
    return found


def least_disturbed(request: str) -> dict[str, Any]:
    """What `host_run` answers; of a few attempts, where other work disturbed it, the one that had most."""
    from edge_bcs.targets.simulator import UNDISTURBED

    answers: list[dict[str, Any]] = []
    while len(answers) < ATTEMPTS and all(answer["cores_share"] < UNDISTURBED for answer in answers):
        answers.append(run_python(["-m", "edge_bcs.targets.host_run"], request))
    return max(answers, key=itemgetter("cores_share"))


def run_python(arguments: list[str], text: str = "") -> dict[str, Any]:
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
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    size = (5.2 * len(curves), 4)
    figure, axes = pyplot.subplots(1, len(curves), figsize=size, layout="constrained", squeeze=False)
    for axis, (name, data) in zip(axes[0], curves.items(), strict=True):
        points = data["points"]
        real = [point["measured"] for point in points if "measured" in point]
        axis.plot(
            [point["peak_bytes"] / MIB for point in points],
            [1e3 * point["predicted_seconds_per_image"] for point in points],
            color="#8899aa",
            label="predicted",
        )
        axis.plot(
            [point["peak_bytes"] / MIB for point in real],
            [1e3 * point["seconds_per_image"] for point in real],
            "o",
            color="#c2410c",
            label="measured",
        )
        # Several plans of one micro-batch lie close together: one of them carries its name.
        for point in {point["micro_batch"]: point for point in real}.values():
            axis.annotate(
                f"{point['micro_batch']} images",
                (point["peak_bytes"] / MIB, 1e3 * point["seconds_per_image"]),
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
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(ScalarFormatter())
            scale.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center")
    write_figure(figure, path, 130)


def readme(rows: list[dict[str, Any]], times: dict[str, Any]) -> str:
    """The figures as text; what was not measured yet is left out."""
    lines = [
        _HEADING,
        "",
        "99 % sparsity (the paper's distribution), 32×32 images, frozen statistics, PGD-10. Working set:",
        "every byte that ONNX Runtime allocates, every bound buffer, the micro-batch; not the interpreter.",
        "What lies outside it: [outside.md](outside.md).",
        "`make trade-off` writes all of it and keeps what is here; `make trade-off AGAIN=times` measures the",
        "times again, `AGAIN=all` does everything again.",
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
        "time is predicted, an image of a whole step, for four Cortex-A72 cores that nobody has calibrated.",
    ]
    if times["results"]:
        machine = times["machine"]
        lines += [
            "",
            "## Budget and time",
            "",
            f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads, calibrated (`machine.toml`) "
            f"while {100 * machine['available']:.0f} % of the cores' time was to be had"
            + ("." if machine["quiet"] else ", too little to measure what a second thread brings."),
            "",
            "![time per image over the working set](trade_off.png)",
        ]
    for name, data in times["results"].items():
        lines += _curve_table(name, data)
    lines += _accuracy_table(times)
    return "\n".join(lines) + "\n"


def _curve_table(name: str, data: dict[str, Any]) -> list[str]:
    dense = data["dense_pytorch"]
    lines = [
        "",
        f"### {name}, AT",
        "",
        "| budget | micro-batch | recomputed | predicted peak | measured | predicted time | measured |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in data["points"]:
        if "measured" in point:
            found = point["measured"]
            lines.append(
                f"| {point['budget_bytes'] // MIB} MiB | {point['micro_batch']} | "
                f"{len(point['recomputed'])} | {point['peak_bytes']:,} | {found['peak_bytes']:,} | "
                f"{1e3 * point['predicted_seconds_per_image']:.1f} ms | "
                f"{1e3 * found['seconds_per_image']:.1f} ms |"
            )
    return [
        *lines,
        "",
        f"Dense PyTorch {data['torch']}, the same step on {dense['images']} images at once: "
        f"{dense['bytes'] / MIB:.0f} MiB above what its process occupied before, "
        f"{1e3 * dense['seconds_per_image']:.1f} ms an image.",
    ]


def _accuracy_table(times: dict[str, Any]) -> list[str]:
    """Predicted over measured seconds of a step and of its phases, of everything that was measured."""
    points = [point for data in times["results"].values() for point in data["points"]]
    rows = [point["measured"] for point in points if "measured" in point] + times["others"]
    if not rows:
        return []
    good = sum(abs(row["step"][0] / row["step"][1] - 1) <= ACCURACY for row in rows)
    lines = [
        "",
        "## How right the predicted times are",
        "",
        "Seconds of a step over 128 images that `edge-bcs simulate` predicts for this machine once it is",
        "calibrated, beside those measured, and their ratio for the step and each graph: "
        f"{good} of {len(rows)} steps are within {100 * ACCURACY:.0f} %.",
        "",
        "| network | objective | budget | images | predicted | measured | ratio | "
        + " | ".join(_GRAPHS)
        + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(_GRAPHS),
    ]
    for row in rows:
        pairs = [row["phases"].get(graph) for graph in _GRAPHS]
        ratios = ["–" if pair is None else f"{pair[0] / pair[1]:.2f}" for pair in pairs]
        predicted, real = row["step"]
        lines.append(
            f"| {row['network']} | {row['objective']} | {row['budget_bytes'] / MIB:.0f} MiB | "
            f"{row['micro_batch']} | {predicted:.2f} s | {real:.2f} s | {predicted / real:.2f} | "
            + " | ".join(ratios)
            + " |"
        )
    return lines


class Folder:
    """What is there already, and what is written as soon as it is known."""

    def __init__(self, path: Path, again: str) -> None:
        self.path = path
        of_times = ("trade_off.json", "machine.toml")
        check_output(path / "README.md", containing(_HEADING), "that of `make trade-off`")
        path.mkdir(parents=True, exist_ok=True)
        files = {"nothing": (), "times": of_times, "all": (*of_times, "smallest.json")}
        for file in files[again]:
            (path / file).unlink(missing_ok=True)
        self.rows: list[dict[str, Any]] = self._read("smallest", [])
        nothing: dict[str, Any] = {"results": {}, "others": []}
        self.times: dict[str, Any] = self._read("trade_off", nothing)
        self.calibration = self._calibration()
        if "machine" not in self.times or self.calibration is None:
            # Nothing is there, or it is of another form, or no model of time goes with it.
            self.times, self.calibration = nothing, None

    def _read(self, name: str, default: Any) -> Any:
        path = self.path / f"{name}.json"
        return json.loads(read_small(path)) if path.is_file() else default

    def _calibration(self) -> Machine | None:
        """The folder's own; None if there is none, or one of an earlier form, which is measured anew."""
        from edge_bcs.targets import cost_model

        try:
            return cost_model.load(self.path / "machine.toml")
        except EdgeBcsError:
            return None

    def write(self) -> None:
        """Everything that is known."""
        write_json(self.path / "smallest.json", self.rows)
        if "machine" in self.times:
            write_json(self.path / "trade_off.json", self.times)
        if self.times["results"]:
            plot(self.times["results"], self.path / "trade_off.png")
        write_atomically(self.path / "README.md", readme(self.rows, self.times).encode())

    def machine(self, threads: int) -> Machine:
        """This machine's calibration: the folder's own, measured where it is not there.

        Raises:
            EdgeBcsError: other work leaves too little of the cores to measure anything.
        """
        from edge_bcs.bench.calibrate import calibrate
        from edge_bcs.targets import cost_model

        if self.calibration is not None:
            return self.calibration.on(threads)
        found = calibrate(threads, progress=lambda message: print(message, flush=True))
        cost_model.save(found.machine, self.path / "machine.toml")
        cpu = f"{os.cpu_count()} cores of {found.machine.processor} ({found.machine.isa})"
        self.times["machine"] = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu,
            "threads": threads,
            "available": found.available,
            "quiet": found.quiet,
        }
        self.calibration = found.machine
        self.write()
        return self.calibration


def main() -> None:
    """Measure and write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/memory"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=["smallest", "times", "both"], default="both")
    parser.add_argument("--again", choices=["nothing", "times", "all"], default="nothing")
    options = parser.parse_args()
    folder = Folder(options.folder, options.again)
    if options.part != "times":
        for rows in smallest_table(folder.rows):
            folder.rows = rows
            folder.write()
    if options.part != "smallest":
        measure_times(folder, options.threads)
    folder.write()


def measure_times(folder: Folder, threads: int) -> None:
    """Calibrate, then measure each network that is not there yet."""
    import torch

    machine = folder.machine(threads)
    for name, budgets in MEASURED.items():
        if name not in folder.times["results"]:
            points = curve(name, budgets, machine)
            dense = run_python(["-c", _DENSE, name, str(threads), str(IMAGES)])
            print(dense, flush=True)
            found = {"points": points, "dense_pytorch": dense, "torch": torch.__version__}
            folder.times["results"][name] = found
            folder.write()
    known = {(row["network"], row["objective"]) for row in folder.times["others"]}
    for name, objective, megabytes in OTHERS:
        if (name, objective) not in known:
            folder.times["others"].append(measured(name, objective, megabytes * MIB, machine))
            folder.write()


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
