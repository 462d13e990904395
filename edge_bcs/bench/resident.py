"""`make resident`: the memory of a whole process that trains, from its start to its end.

Writes resident.json, resident.md and resident.png to the folder that is named (default results/native). The
networks are exported for the smallest arena that the planner finds; each is trained by `edge-bcs-run`, and by
Python with the native engine, while /proc is read.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_bcs.core.files import write_atomically, write_json

CASES = (("resnet18", "frozen"), ("resnet18", "batch"), ("wrn28_2", "frozen"))
"""Network, statistics of its batch norms; 99 % sparse, AT with PGD-10."""
ALLOWED, AIMS, PYTHON_AIM = 2 << 20, {"resnet18": 10 << 20, "wrn28_2": 5 << 20}, 45 << 20
"""Bytes beside the arena and the program's file; of the whole process; of Python's."""
INTERVAL = 0.02  # seconds between two looks
_PIXELS = (4000, 3000)
_PYTHON = """\
import sys
from edge_bcs.runtime import Trainer
with Trainer(sys.argv[1], engine="native", threads=1) as trainer:
    trainer.fit(sys.argv[2], steps=int(sys.argv[3]))
"""


@dataclass(frozen=True)
class Look:
    """What a process has resident: seconds since its start, bytes of its own and of files."""

    seconds: float
    own: int
    files: int

    @property
    def total(self) -> int:
        """Both."""
        return self.own + self.files


def watched(command: Sequence[str | Path]) -> tuple[list[Look], int]:
    """(looks at a process while it runs, the most bytes that it had resident by the kernel's own mark).

    Raises RuntimeError if it fails.
    """
    looks: list[Look] = []
    highest, began = 0, time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=said, env=environment
        )
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:  # it has just ended
                break
            found = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)
                     if name in ("VmHWM", "RssAnon", "RssFile")}  # fmt: skip
            if "VmHWM" in found:
                own, files = (int(found[name]) << 10 for name in ("RssAnon", "RssFile"))
                looks.append(Look(time.perf_counter() - began, own, files))
                highest = max(highest, int(found["VmHWM"]) << 10)
            time.sleep(INTERVAL)
        if process.wait() != 0:
            said.seek(0)
            raise RuntimeError(f"{command[0]} failed: {said.read().decode(errors='replace')[-500:]}")
    return looks, highest


def photographs(folder: Path) -> Path:
    """Ten classes of JPEG files of 12 megapixels: noise in blocks, as hard to compress as a photograph."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (_PIXELS[1] // 20, _PIXELS[0] // 20, 3), np.uint8)
    Image.fromarray(blocks).resize(_PIXELS, Image.Resampling.BICUBIC).save(folder / "one.jpg", quality=85)
    for label in range(10):
        place = folder / "photographs" / str(label)
        place.mkdir(parents=True)
        for number in range(2):
            shutil.copy(folder / "one.jpg", place / f"{number}.jpg")
    return folder / "photographs"


def exported(name: str, statistics: str, folder: Path, batch_size: int) -> Path:
    """An artifact with the smallest arena that is found."""
    import edge_bcs
    from edge_bcs import Memory, models
    from edge_bcs.core.objectives import objective_named
    from edge_bcs.exporters.memory.choice import Job
    from edge_bcs.exporters.memory.planner import Planner
    from edge_bcs.exporters.network import network_of

    sparse = edge_bcs.sparsify(models.create(name), sparsity=0.99, seed=0, distribution="uniform")
    job = Job(objective_named("at"), 0.0, batch_size)
    least = Planner(network_of(sparse, (3, 32, 32), statistics == "batch")).smallest(job).peak_bytes
    edge_bcs.export(
        sparse,
        folder,
        "at",
        (3, 32, 32),
        batch_size=batch_size,
        batch_norm=statistics,
        memory=Memory(least),
        validate=False,
    )
    return folder


def measured(case: tuple[str, str], program: Path, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One row of resident.json."""
    from edge_bcs.runtime.artifact import Artifact

    name, statistics = case
    artifact = exported(name, statistics, folder / f"{name}-{statistics}", batch_size=16)
    options = ("--no-augment", "--eval-samples", "4", "--eval-steps", "2", "--threads", "1")
    wanted = ("--data", str(data), "--steps", str(steps), *options, "-o", str(folder / "run"))
    row: dict[str, Any] = {
        "network": name,
        "statistics": statistics,
        "arena_bytes": Artifact.read(artifact).predicted_peak_bytes,
        "program_bytes": program.stat().st_size,
    }
    for what, command in (
        ("program", (program, "finetune", artifact, *wanted)),
        ("python", (sys.executable, "-c", _PYTHON, artifact, "digits", str(steps))),
    ):
        looks, highest = watched(command)
        row[what] = {"peak_bytes": highest, "looks": [asdict(look) for look in looks]}
        print(name, statistics, what, f"{highest / 2**20:.2f} MiB", flush=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return row


_TOLD = """\
# The memory of a whole process

`make resident`, {date}, {machine}. Each network is 99 % sparse and trained with AT and PGD-10 in the smallest
arena that is found, with one thread: `edge-bcs-run finetune` on JPEG files of 12 megapixels, measurements
before and after included, and a `Trainer` in Python on digits. MiB at the peak, by the kernel's mark.
`edge-bcs-run` has {program:.2f} MB; allowed are the arena, 2 MiB and the program.

| network | batch norm | arena | `edge-bcs-run` | beside the arena | allowed | aim | Python, native engine \
| aim |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

![resident memory over time](resident.png)
"""


def table(content: Mapping[str, Any]) -> str:
    """resident.md, from resident.json."""
    lines = []
    for row in content["rows"]:
        arena, peak = row["arena_bytes"], row["program"]["peak_bytes"]
        sizes = (arena, peak, peak - arena, arena + ALLOWED + row["program_bytes"], AIMS[row["network"]],
                 row["python"]["peak_bytes"], PYTHON_AIM)  # fmt: skip
        cells = [row["network"], row["statistics"], *(f"{size / 2**20:.2f}" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    program = content["rows"][0]["program_bytes"] / 1e6
    return _TOLD.format(
        date=content["date"], machine=content["machine"], program=program, rows="\n".join(lines)
    )


def draw(content: Mapping[str, Any], file: Path) -> None:
    """resident.png: what `edge-bcs-run` has resident over time, of its own and of its file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(content["rows"])
    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
    for axis, row in zip(axes[0], content["rows"], strict=True):
        looks = row["program"]["looks"]
        seconds = [look["seconds"] for look in looks]
        parts = [[look[part] / 2**20 for look in looks] for part in ("own", "files")]
        axis.stackplot(seconds, *parts, labels=("of its own", "of its file"), colors=("#0072B2", "#E69F00"))
        axis.axhline(row["arena_bytes"] / 2**20, color="black", linestyle=":", label="arena")
        axis.set(title=f"{row['network']}, {row['statistics']}", xlabel="seconds", ylabel="MiB resident")
        axis.set_ylim(bottom=0)
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure all and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/native"))
    parser.add_argument("--program", type=Path, default=Path("build/native/edge-bcs-run"))
    parser.add_argument("--steps", type=int, default=2, help="steps of each training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = photographs(Path(scratch))
        stripped = Path(scratch) / "edge-bcs-run"
        subprocess.run(["strip", "-o", stripped, options.program], check=True)
        rows = [measured(case, stripped, data, Path(scratch), options.steps) for case in CASES]
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, CPython {platform.python_version()}",
        "rows": rows,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / "resident.json", content)
    write_atomically(options.folder / "resident.md", table(content).encode())
    draw(content, options.folder / "resident.png")


if __name__ == "__main__":
    main()
