"""The programs of tests/native: compiled for this machine, or built for another one and run by an emulator.

With EDGE_BCS_EMULATOR (a command such as ``qemu-aarch64-static -L /usr/aarch64-linux-gnu``) and
EDGE_BCS_TEST_PROGRAMS (the folder that `make native-arm` built) the operators that `operators.run` runs
are the other machine's, too: the same tests, the same expected values, another processor.
"""

# mypy: disable-error-code="call-overload"

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import library

from edge_bcs.core.scratch import ScratchFolder
from helpers import ROOT

Array = np.ndarray[Any, Any]

EMULATOR = shlex.split(os.environ.get("EDGE_BCS_EMULATOR", ""))

# ONNX's numbers of element types
NUMBER_OF_TYPE = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.uint16): 4,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.bool_): 9,
}
TYPE_OF_NUMBER = {number: dtype for dtype, number in NUMBER_OF_TYPE.items()}


@functools.cache
def _scratch() -> ScratchFolder:
    return ScratchFolder("programs")


@functools.cache
def compiled(name: str) -> Path:
    """The program for this machine; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = _scratch().path / name
    source = ROOT / "tests" / "native" / f"{name}.cpp"
    options = ["-std=c++20", "-O1", "-ffp-contract=off", f"-I{ROOT / 'runtime' / 'native'}"]
    options += ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *options, source, "-o", program, "-ldl", "-pthread"], check=True)
    return program


def run(name: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the operator library; environment variables are added to this process's."""
    if EMULATOR:
        folder = Path(os.environ["EDGE_BCS_TEST_PROGRAMS"])
        command = [*EMULATOR, str(folder / name), str(folder / "libedge_bcs_ops.so")]
    else:
        command = [str(compiled(name)), str(library.library_path())]
    command += [str(argument) for argument in arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def instruction_set(wanted: str) -> str:
    """The instruction set that the library's kernels use when ``wanted`` is asked for."""
    result = run("run_operator", EDGE_BCS_ISA=wanted)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def _attribute(name: str, value: Any) -> str:
    match value:
        case bool() | int() | np.integer():
            return f"int {name} {int(value)}"
        case float() | np.floating():
            return f"float {name} {float(value).hex()}"
        case str():
            return f"text {name} {value}"
        case [float(), *_]:
            return " ".join(["floats", name, *(float(number).hex() for number in value)])
        case _:
            return " ".join(["ints", name, *(str(int(number)) for number in value)])


def run_operator(
    operator: str,
    inputs: Mapping[str, Array | None],
    outputs: Mapping[str, Any],
    *,
    domain: str = "edge_bcs",
    threads: int = 1,
    half: bool = False,
    **attributes: Any,
) -> dict[str, Array]:
    """Run one operator without ONNX Runtime; arguments and result as those of `operators.run`.

    The operator may write into its inputs: those arrays are changed.

    Raises:
        RuntimeError: the operator refused, with its message.
    """
    lines = [f"operator {domain} {operator}", f"threads {threads}", f"half {int(half)}"]
    lines += [_attribute(name, value) for name, value in attributes.items()]
    given = [array for array in inputs.values() if array is not None]
    for array in inputs.values():
        if array is None:
            lines.append("input absent")
        else:
            lines.append(" ".join(str(n) for n in ("input", NUMBER_OF_TYPE[array.dtype], *array.shape)))
    lines += ["output absent" if dtype is None else f"output {name}" for name, dtype in outputs.items()]
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder) / "call", Path(folder) / "result"
        content = b"".join(np.ascontiguousarray(array).tobytes() for array in given)
        call.write_bytes("\n".join([*lines, "data\n"]).encode() + content)
        result = run("run_operator", call, answer)
        if result.returncode == 1:
            raise RuntimeError(result.stderr.strip())
        assert result.returncode == 0, (result.returncode, result.stderr)
        header, content = answer.read_bytes().split(b"data\n", 1)
    results: dict[str, Array] = {}
    written = iter(given)
    for line in header.decode().splitlines():
        name, number, *sizes = line.split()
        dtype, shape = TYPE_OF_NUMBER[int(number)], tuple(int(size) for size in sizes)
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(content, dtype, count).reshape(shape).copy()
        content = content[array.nbytes :]
        if name == "input":
            next(written)[...] = array
        else:
            results[name] = array
    assert not content
    return results
