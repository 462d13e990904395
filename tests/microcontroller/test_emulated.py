"""The C project on emulated microcontrollers beside the same sources here: `make test-microcontroller`.

Every number is the same to the bit, a cut between two saves costs no more than the steps since the last one,
and the linker has put all that changes into 512 KiB.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from edge_bcs.targets import microcontrollers
from helpers import ROOT

pytest.importorskip("torch")
from edge_bcs.exporters.microcontroller.project import write_project
from edge_bcs.runtime import Artifact

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("arm-none-eabi-g++") is None or shutil.which("qemu-system-arm") is None,
        reason="needs gcc-arm-none-eabi, libstdc++-arm-none-eabi-newlib and qemu-system-arm",
    ),
]
EXAMPLE = ROOT / "examples" / "microcontroller"
BOARDS = ("mps2-an500", "mps3-an547")
STEPS, SAVES, IMAGES = 6, 2, 64
CACHE = "ccache " if shutil.which("ccache") else ""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("digits_on_a_microcontroller", EXAMPLE / "digits.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def artifact(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made: Artifact = example.exported(tmp_path_factory.mktemp("artifact") / "digits", "224KiB")
    return made


@pytest.fixture(scope="module")
def projects(
    example: ModuleType, artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = {}
    for name in BOARDS:
        folder = tmp_path_factory.mktemp(name) / "c"
        write_project(artifact, microcontrollers.load(name), folder)
        example.write_data(folder, IMAGES)
        made[name] = folder
    return made


def make(project: Path, target: str) -> Path:
    variables = [f"STEPS={STEPS}", f"SAVES={SAVES}", f"CROSS={CACHE}arm-none-eabi-"]
    variables += [f"CXX={CACHE}g++", f"CC={CACHE}gcc"]
    made = subprocess.run(
        ["make", "-s", "-C", project, target, *variables], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert "warning" not in made.stderr, made.stderr
    return project / "build"


def emulator(name: str, program: Path) -> list[str]:
    machine = microcontrollers.load(name).emulator
    assert machine is not None
    options = ["-nographic", "-monitor", "none", "-serial", "none"]
    semihosting = ["-semihosting-config", "enable=on,target=native"]
    return ["qemu-system-arm", "-M", machine, *options, *semihosting, "-kernel", str(program)]


def run(command: list[str], folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def on_this_machine(projects: dict[str, Path]) -> tuple[list[str], bytes]:
    """What the program says here, and the flash that it leaves."""
    build = make(projects[BOARDS[0]], "host")
    lines = run([str(build / "network")], build / "run")
    return lines, (build / "run" / "flash.bin").read_bytes()


def facts(lines: list[str]) -> list[str]:
    """All but the memory that the pool has given, which is another where pointers are longer."""
    return [line for line in lines if not line.startswith(("pool", "allocations"))]


@pytest.mark.parametrize("name", BOARDS)
def test_bits_memory_and_a_power_cut(
    name: str, projects: dict[str, Path], on_this_machine: tuple[list[str], bytes]
) -> None:
    expected, flash = on_this_machine
    build = make(projects[name], "all")
    program = build / "network.elf"

    # Bits: losses, answers, and the two saved states.
    lines = run(emulator(name, program), build / "whole")
    assert facts(lines) == facts(expected)
    assert sum(line.startswith("step ") for line in lines) == STEPS
    assert (build / "whole" / "flash.bin").read_bytes() == flash
    assert "allocations of the training 0" in lines

    # Memory: what the linker gave addresses in RAM.
    sections = subprocess.run(
        ["arm-none-eabi-size", "-A", program], capture_output=True, text=True, check=True
    ).stdout
    sizes = {found[1]: int(found[2]) for found in re.finditer(r"^(\.\w+) +(\d+)", sections, re.MULTILINE)}
    assert 200 << 10 < sizes[".data"] + sizes[".bss"] + sizes[".stack"] <= 512 << 10

    # A cut after the second save began or ended: the run goes on from a save, and ends as the unbroken one.
    folder = build / "cut"
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        emulator(name, program), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {2 * SAVES} "):
            break
    time.sleep(0.05)
    process.kill()
    process.wait()
    lines = run(emulator(name, program), folder)
    goes_on = [line for line in lines if line.startswith("goes on from step ")]
    assert goes_on in ([f"goes on from step {SAVES}"], [f"goes on from step {2 * SAVES}"])
    assert [line for line in lines if line.startswith("step ")][-1] == [
        line for line in expected if line.startswith("step ")
    ][-1]
    assert lines[-4:-1] == expected[-4:-1]
