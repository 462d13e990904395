"""A 64-bit ARM board in a folder: Debian 12 under user-mode QEMU, our wheel, and what a user does there.

    python tests/arm/emulated_board.py WHEEL WORK RESULTS

Makes an arm64 Debian root with debootstrap in WORK, installs WHEEL with `pip install edge-bcs[device]` and
ONNX Runtime from wheels of the registry, exports an artifact on this machine, fine-tunes and evaluates it on
both, runs the artifact of ONNX Runtime's own tools and the rewiring step on both, and compares; on the board
it also trains by our own engine and by edge-bcs-run, whose states must have ONNX Runtime's bits. Writes
RESULTS/board.json and RESULTS/board.txt; exits with status 1 if anything disagrees. Needs root, debootstrap
and qemu-user-static; what it downloads stays in WORK for the next time.

Emulated time says nothing about a board's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import on_board
import onnx
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PYTHON = "311"  # Debian 12's
ONNX_RUNTIME = "onnxruntime>=1.23"  # beside our own engine, with whose bits its are compared
BINFMT = Path("/proc/sys/fs/binfmt_misc")

# A network that has learnt something: untrained, its logits would hardly depend on the image.
NEW = ["--model", "resnet18", "--sparsity", "0.99", "--distribution", "uniform", "--batch-size", "32"]
NEW += ["--attack-steps", "3"]
LEARN = ["--data", "digits", "--steps", "50", "--no-augment", "--eval-samples", "0"]
EXPORT = ["--batch-size", "16", "--micro-batch", "8", "--attack-steps", "3", "--memory", "16MiB"]
FINETUNE = ["--data", "digits", "--steps", "3", "--eval-samples", "0"]
EVALUATE = ["--data", "digits", "--attack", "pgd", "--attack-steps", "3", "--limit", "40"]
ORT = ["--steps", "20", "--learning-rate", "0.02", "--eval-samples", "0"]

# Largest relative difference of a loss: float32 sums in another order. From the second robust step on, the
# sign of a gradient near zero moves a pixel the other way: the scalar and the AVX-512 kernels of one machine
# then differ by 2e-4 in the second step's loss of this fine-tuning, by 6e-3 in the third's.
TOLERANCE = 1e-5
AFTER_SIGNS = 1e-2


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Programs for aarch64 run through QEMU inside this block, unless Debian has registered them for good."""
    if not any(BINFMT.iterdir()):
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    name = BINFMT / "qemu-aarch64"
    ours = not name.exists()
    if ours:
        rule = Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text().strip()
        (BINFMT / "register").write_text(rule)
    try:
        yield
    finally:
        if ours:
            name.write_text("-1")


class Board:
    """The arm64 root; ``work`` is /work on the board."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / SUITE
        self.work = self.root / "work"

    def run(self, *command: str) -> str:
        """Run a command on the board and return what it wrote to stdout; what it wrote to stderr is shown."""
        variables = ["PATH=/opt/edge-bcs/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        inside = ["chroot", str(self.root), "env", "-i", *variables, "--chdir=/work", *command]
        apart = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            f"--mount-proc={self.root / 'proc'}",
        ]
        return subprocess.run([*apart, *inside], check=True, stdout=subprocess.PIPE, text=True).stdout

    def make(self) -> None:
        """Debian, once."""
        if not self.root.exists():
            say("debootstrap (about five minutes)")
            partial = self.root.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            options = [
                "--arch=arm64",
                "--foreign",
                "--variant=minbase",
                "--include=python3-venv,ca-certificates",
            ]
            quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
            subprocess.run(["debootstrap", *options, SUITE, partial, MIRROR], **quiet)
            subprocess.run(["chroot", partial, "/debootstrap/debootstrap", "--second-stage"], **quiet)
            partial.rename(self.root)
        self.work.mkdir(exist_ok=True)

    def install(self, wheel: Path, downloads: Path) -> None:
        """`pip install edge-bcs[device]`, as on a board, from wheels that were downloaded here."""
        if not downloads.exists():
            say("aarch64 wheels of onnxruntime, numpy, … from the registry")
            partial = downloads.with_name("partial-wheels")
            platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31, 34)]
            platforms.append("--platform=manylinux2014_aarch64")
            options = [f"--python-version={PYTHON}", "--only-binary=:all:", "--implementation=cp", "--quiet"]
            pip = [sys.executable, "-m", "pip", "download", *platforms, *options, "--dest", str(partial)]
            subprocess.run([*pip, f"{wheel}[device]", ONNX_RUNTIME], check=True)
            partial.rename(downloads)
        wheels = self.root / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.copytree(
            downloads, wheels, ignore=lambda _, names: [n for n in names if n.startswith("edge_bcs")]
        )
        shutil.copy(wheel, wheels)
        if not (self.root / "opt" / "edge-bcs" / "bin" / "pip").exists():
            self.run("/usr/bin/python3", "-m", "venv", "/opt/edge-bcs")
        say("pip install 'edge-bcs[device]' on the board")
        pip = ["python3", "-m", "pip", "install", "--quiet", "--no-index", "--find-links=/wheels"]
        self.run(*pip, "edge-bcs[device]", ONNX_RUNTIME)
        self.run(*pip, "--no-deps", "--force-reinstall", "edge-bcs")  # the newest build of the same version
        for absent in ("torch", "onnx", "scipy"):
            self.run("python3", "-c", f"import importlib.util as u; assert not u.find_spec('{absent}')")
        self.run("sh", "-c", "! command -v cc && ! command -v gcc && ! command -v c++")


def edge_bcs(*arguments: str) -> str:
    """The command line of this machine's installation."""
    command = [sys.executable, "-m", "edge_bcs.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(folder: Path) -> None:
    """Write what both machines read: an artifact, ORT's artifacts, the rewiring step as a model, images."""
    from helpers.operators import node
    from onnx import TensorProto, helper

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    edge_bcs("export", *NEW, "-o", str(folder / "new"))
    edge_bcs("finetune", str(folder / "new"), *LEARN, "-o", str(folder / "learnt"))
    edge_bcs("export", "--checkpoint", str(folder / "learnt"), *EXPORT, "-o", str(folder / "artifact"))
    shutil.copytree(TESTS / "ort_training" / "dense", folder / "dense")
    for script in (TESTS / "helpers" / "rewire_digest.py", HERE / "on_board.py"):
        shutil.copy(script, folder)
    names = {"value": TensorProto.FLOAT, "index": TensorProto.INT32, "momentum": TensorProto.FLOAT}
    names |= {"gradient": TensorProto.FLOAT, "hyper": TensorProto.FLOAT, "counter": TensorProto.INT64}
    outputs = [name for name in list(names)[:4]]
    step = node("RewireStep", list(names), [f"{n}.out" for n in outputs], size=on_board.REWIRING["positions"])
    graph = helper.make_graph(
        [step],
        "rewire",
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in names.items()],
        [helper.make_tensor_value_info(f"{name}.out", names[name], None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge_bcs", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(folder / "rewire.onnx"))
    random = np.random.default_rng(1)
    np.savez(folder / "images.npz", x=random.random((120, 1, 9, 9), np.float32), y=np.arange(120) % 10)


def measure(run: Any, python: str, folder: str) -> dict[str, Any]:
    """What one machine computes; ``run(*command)`` runs a command there and gives its output."""
    command = [python, "-m", "edge_bcs.cli"]
    run(*command, "finetune", f"{folder}/artifact", *FINETUNE, "-o", f"{folder}/run")
    lines = run("cat", f"{folder}/run/metrics.jsonl").splitlines()
    dense = [f"{folder}/dense/residual", "--data", f"{folder}/images.npz", *ORT, "--json"]
    return {
        "machine": run("uname", "-m").strip(),
        "finetune": [json.loads(line)["loss"] for line in lines],
        "evaluate": json.loads(run(*command, "evaluate", f"{folder}/run", *EVALUATE, "--json", "-")),
        "run-ort-artifact": json.loads(run(*command, "run-ort-artifact", *dense))["losses"],
        **json.loads(run(python, f"{folder}/on_board.py", folder)),
    }


def same_state(board: Board) -> dict[str, Any]:
    """Whether the fine-tuning of `measure` on the board has the same bits without ONNX Runtime, and without
    Python."""
    given = ["finetune", "/work/artifact", *FINETUNE]
    board.run("edge-bcs", *given, "--engine", "native", "-o", "/work/native")
    board.run("edge-bcs-run", *given, "-o", "/work/program")
    states = {
        name: (board.work / name / "state.safetensors").read_bytes() for name in ("run", "native", "program")
    }
    return {"bytes": len(states["run"]), "holds": len(set(states.values())) == 1}


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    assert len(ours) == len(theirs) and ours
    return max(
        abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True)
    )


def compare(board: dict[str, Any], host: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every comparison: name -> what was found and whether it holds."""
    found: dict[str, Any] = {}

    def losses(name: str, ours: list[float], theirs: list[float], tolerance: float) -> None:
        largest = difference(ours, theirs)
        found[name] = {
            "largest_relative_difference": largest,
            "allowed": tolerance,
            "holds": largest <= tolerance,
        }

    first, later = slice(1), slice(1, None)
    ours, theirs = board["finetune"], host["finetune"]
    losses("loss of the first robust step, board and host", ours[first], theirs[first], TOLERANCE)
    losses("losses of the steps after it, board and host", ours[later], theirs[later], AFTER_SIGNS)
    losses(
        "losses of run-ort-artifact, board and host",
        board["run-ort-artifact"],
        host["run-ort-artifact"],
        TOLERANCE,
    )
    for name, values in board["losses"].items():
        expected = json.loads((folder / "dense" / name / "expected.json").read_text())["loss"]
        losses(f"losses of {name}, board and onnxruntime-training 1.19.2", values, expected, 1e-5)
    same = board["rewiring"] == host["rewiring"] and len(set(board["rewiring"])) == on_board.REWIRING["steps"]
    found["bits of the rewiring, board and host"] = {"steps": len(board["rewiring"]), "holds": same}
    counts = [round(m["evaluate"]["accuracy"] * m["evaluate"]["samples"]) for m in (board, host)]
    close = abs(counts[0] - counts[1]) <= 1
    found["correct images of evaluate, board and host"] = {"counts": counts, "holds": close}
    return found


def main(wheel: Path, work: Path, results: Path) -> int:
    if os.geteuid() != 0 or not all(
        shutil.which(name) for name in ("debootstrap", "qemu-aarch64-static", "unshare")
    ):
        sys.exit("This needs root, and: apt-get install debootstrap qemu-user-static")
    work.mkdir(parents=True, exist_ok=True)
    board = Board(work.resolve())
    with emulation():
        began = time.monotonic()
        board.make()
        board.install(wheel.resolve(), work.resolve() / "wheels")
        installed = time.monotonic()
        say("exporting on this machine")
        host_folder = work.resolve() / "host"
        prepare(host_folder)
        shutil.rmtree(board.work)
        shutil.copytree(host_folder, board.work)
        say("fine-tuning, evaluating, rewiring here")

        def here(*command: str) -> str:
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        host = measure(here, sys.executable, str(host_folder))
        say("the same on the board")
        doctor = board.run("edge-bcs", "doctor")
        emulated = measure(board.run, "python3", "/work")
        same = same_state(board)
        versions = board.run("python3", "-m", "pip", "list", "--format=freeze").split()
        seconds = {"install": installed - began, "the rest": time.monotonic() - installed}
    found = compare(emulated, host, host_folder)
    found["state by ONNX Runtime, our engine and edge-bcs-run, on the board"] = same
    indices = [
        load_file(folder / "run" / "state.safetensors")["coo.index"] for folder in (host_folder, board.work)
    ]
    moved = sum(len(np.setdiff1d(one, other)) for one, other in (indices, indices[::-1]))
    found["connections after fine-tuning, board and host"] = {
        "of": len(indices[0]),
        "different": moved,
        "holds": len(indices[0]) == len(indices[1]) and moved <= len(indices[0]) // 1000,
    }
    results.mkdir(parents=True, exist_ok=True)
    for measured in (host, emulated):
        measured["evaluate"].pop("path", None)
    commands = {"export of a new network": NEW, "finetune, here": LEARN, "export --checkpoint": EXPORT}
    commands |= {"finetune": FINETUNE, "evaluate": EVALUATE, "run-ort-artifact": ORT}
    report = {
        "comparisons": found,
        "board": emulated,
        "host": host,
        "wheel": wheel.name,
        "versions": versions,
    }
    report |= {"commands": {name: " ".join(options) for name, options in commands.items()}}
    report |= {"emulated_seconds": {name: round(value) for name, value in seconds.items()}}
    (results / "board.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"{'ok  ' if one['holds'] else 'FAIL'} {name}: {one}" for name, one in found.items()]
    (results / "board.txt").write_text("\n".join(["$ edge-bcs doctor", doctor.rstrip(), "", *lines]) + "\n")
    print((results / "board.txt").read_text())
    return 0 if all(one["holds"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    sys.exit(main(*(Path(argument) for argument in sys.argv[1:4])))
