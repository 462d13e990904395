"""Instructions per floating-point operation of the NEON kernels, counted under QEMU.

    python tests/arm/count_instructions.py BUILD RESULT

Emulated time says nothing about a processor's, but the instructions that it executes are the same. QEMU logs
the instructions of every block that it translates (-d in_asm) and every block that it executes (-d
exec,nochain); the sum over all executions inside the operator library is the count. Each kernel runs once and
then twice: the difference is one run, without what happens when the library is loaded. Of depthwise layers
the whole operator runs, with few channels and with more: the difference is that of a channel.

At best a fused multiply-add of four lanes is eight operations: 0.125 instructions for each operation, if
nothing else had to be done; in half precision 0.0625.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = "/usr/aarch64-linux-gnu"
EMULATOR = ["qemu-aarch64-static", "-L", LIBRARIES, "-E", f"LD_LIBRARY_PATH={LIBRARIES}/lib"]
INSTRUCTION = re.compile(r"^0x([0-9a-f]+):\s+[0-9a-f]{8}\s+(\S+)\s*(.*)")
EXECUTION = re.compile(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/")

# name -> channels, rows, pixels on a side, kernel, stride, density, lanes
LAYERS = {
    "3x3, 64 to 64, 16x16 pixels, 1 %": (64, 64, 16, 3, 1, 0.01, 8),
    "3x3, 64 to 64, 16x16 pixels, 10 %": (64, 64, 16, 3, 1, 0.1, 8),
    "3x3 every 2 pixels, 64 to 64, 8x8 pixels, 10 %": (64, 64, 8, 3, 2, 0.1, 8),
    "1x1, 128 to 128, 8x8 pixels, 10 %": (128, 128, 8, 1, 1, 0.1, 8),
    "linear, 256 to 128, 10 %": (256, 128, 1, 1, 1, 0.1, 8),
}
DENSE_LAYERS = {
    "3x3, 16 to 32, 8x8 pixels, all": (16, 32, 8, 3, 1, 1.0, 8),
    "3x3 every 2 pixels, 16 to 32, 8x8 pixels, all": (16, 32, 8, 3, 2, 1.0, 8),
}
KERNELS = {
    "sparse": LAYERS,
    "transposed": LAYERS,
    "gradient": LAYERS,
    "dense": DENSE_LAYERS,
    "dense_gradient": DENSE_LAYERS,
    "half_sparse": LAYERS,
    "half_transposed": LAYERS,
    "half_dense": DENSE_LAYERS,
}

# name -> kernel, stride; of channels of 16×16 output pixels, 8 images side by side
DEPTHWISE = {"3x3": (3, 1), "3x3 every 2 pixels": (3, 2), "5x5": (5, 1)}


def kind(mnemonic: str, operands: str) -> str:
    """What an instruction is for."""
    vector = bool(re.search(r"\bq\d+|\bv\d+\.(4s|8h|16b|2d)", operands))
    if mnemonic in ("fmla", "fmul") and vector:
        return "vector multiply-adds"
    if mnemonic.startswith(("ld", "st")):
        return (
            "vector loads and stores" if vector or "v" in operands.split("[")[0] else "other loads and stores"
        )
    return "other vector instructions" if vector else "other instructions"


def count(
    build: Path, kernel: str, layer: tuple[float, ...], times: int
) -> tuple[collections.Counter[str], int]:
    """Instructions of the library by kind, and the operations of one run of the kernel."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        program = [
            str(build / "kernel_work"),
            str(build / "libedge_bcs_ops.so"),
            kernel,
            *(str(n) for n in layer),
        ]
        command = [*EMULATOR, *logging_to(log), *program, str(times)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        operations, library = (int(number) for number in output.split())
        inside = range(library, library + (build / "libedge_bcs_ops.so").stat().st_size)
        return counted(log, inside), operations


def logging_to(log: Path) -> list[str]:
    """The emulator's options."""
    return ["-d", "in_asm,exec,nochain", "-D", str(log)]


def counted(log: Path, inside: range | None) -> collections.Counter[str]:
    """Instructions that were executed, those in blocks that begin ``inside``, by kind."""
    blocks: dict[int, collections.Counter[str]] = {}
    counts: collections.Counter[str] = collections.Counter()
    executions: collections.Counter[int] = collections.Counter()
    block: Any = None
    with log.open() as lines:
        for line in lines:
            if line.startswith("Trace"):
                found = EXECUTION.match(line)
                assert found, line
                executions[int(found[1], 16)] += 1
            elif line.startswith("IN:"):
                block = collections.Counter()
                first = None
            elif block is not None and (found := INSTRUCTION.match(line)):
                if first is None:
                    first = int(found[1], 16)
                    blocks[first] = block
                block[kind(found[2], found[3])] += 1
    for address, number in executions.items():
        if inside is None or address in inside:
            for name, instructions in blocks[address].items():
                counts[name] += number * instructions
    return counts


def depthwise(build: Path) -> list[dict[str, Any]]:
    """Rows of depthwise operators in both precisions, forward and to the input."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        os.environ["EDGE_BCS_EMULATOR"] = " ".join([*EMULATOR, *logging_to(log)])
        os.environ["EDGE_BCS_TEST_PROGRAMS"] = str(build)
        from helpers.convolutions import Case, Problem

        def run(half: bool, transposed: bool, channels: int, kernel: int, stride: int) -> Any:
            pixels, sides = 16 * stride, (kernel, kernel)
            problem = Problem(
                Case(channels, channels, pixels, pixels, kernel=sides, padding=kernel // 2, stride=stride,
                     groups=channels, algorithm="depthwise", dense=True, lanes=8, half=half, threads=1,
                     mask_kind=2 if transposed else 0)
            )  # fmt: skip
            problem.backward(weights=False) if transposed else problem.forward()
            return counted(log, None)

        for name, (kernel, stride) in DEPTHWISE.items():
            for transposed in (False, True):
                for half in (False, True):
                    few, more = (run(half, transposed, channels, kernel, stride) for channels in (2, 10))
                    operations = 2 * kernel**2 * 16**2 * 8 * (10 - 2)
                    one = {key: (more[key] - few[key]) / operations for key in sorted(more)}
                    what = "half_depthwise" if half else "depthwise"
                    rows.append(_row(what + "_transposed" * transposed, name, operations, one))
    return rows


def _row(kernel: str, layer: str, operations: int, one: dict[str, float]) -> dict[str, Any]:
    print(f"{kernel:>25}  {layer:<48} {sum(one.values()):.3f}", flush=True)
    return {
        "kernel": kernel,
        "layer": layer,
        "operations": operations,
        "instructions_per_operation": round(sum(one.values()), 4),
        "of_these": {key: round(value, 4) for key, value in one.items()},
    }


def main(build: Path, result: Path) -> None:
    rows = []
    for kernel, layers in KERNELS.items():
        for name, layer in layers.items():
            once, operations = count(build, kernel, layer, 1)
            twice, _ = count(build, kernel, layer, 2)
            one = {key: (twice[key] - once[key]) / operations for key in sorted(twice)}
            rows.append(_row(kernel, name, operations, one))
    rows += depthwise(build)
    version = subprocess.run([EMULATOR[0], "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    compiler = subprocess.run(
        ["aarch64-linux-gnu-g++", "--version"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    report = {"emulator": version.splitlines()[0], "compiler": compiler.splitlines()[0], "rows": rows}
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
