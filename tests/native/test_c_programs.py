"""Programs in C and Rust over the C interface, every warning an error, run on tiny networks."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from helpers import ROOT
from helpers.c_interface import Network

from edge_bcs.core.library import library_path

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
INCLUDE = ROOT / "runtime" / "native" / "include"
STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", f"-I{INCLUDE}"]


def run(*words: str | Path, succeeds: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; environment variables are added to this process's."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=succeeds,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Compiles a program in C against the library, once."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    made: dict[Path, Path] = {}

    def compile_(source: Path) -> Path:
        if source not in made:
            program = tmp_path_factory.mktemp("c") / source.stem
            rpath = f"-Wl,-rpath,{library_path().parent}"
            run(compiler, *STRICT, source, "-o", program, library_path(), rpath)
            made[source] = program
        return made[source]

    return compile_


@pytest.fixture
def data(tmp_path: Path) -> tuple[Array, Array]:
    """22 images u8 and their labels, which lie in images.u8 and labels.u8, too."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 256, (22, 1, 8, 8), np.uint8), rng.integers(0, 10, 22)
    (tmp_path / "images.u8").write_bytes(x.tobytes())
    (tmp_path / "labels.u8").write_bytes(y.astype(np.uint8).tobytes())
    return x, y


def by_python(path: Path, data: tuple[Array, Array], folder: Path, engine: str) -> list[str]:
    losses: list[str] = []
    with Trainer(path, engine=engine) as trainer:
        trainer.fit(
            data,
            steps=20,
            augment="none",
            progress=False,
            on_step=lambda record: losses.append(f"step {record['step']} loss {record['loss']:.17g}"),
        )
        trainer.save(folder)
    return losses


@pytest.mark.parametrize("micro_batch", [4, 5])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "trades"])
def test_the_example_in_c_is_pythons_training(
    compiled: Callable[[Path], Path],
    tiny_artifact: Make,
    data: tuple[Array, Array],
    tmp_path: Path,
    objective: str,
    batch_norm: str,
    micro_batch: int,
) -> None:
    path = tiny_artifact(objective=objective, batch_norm=batch_norm, micro_batch=micro_batch)
    expected = {}
    for engine in ("onnxruntime", "native"):
        expected[engine] = by_python(path, data, tmp_path / engine, engine)
    program = compiled(ROOT / "examples" / "c" / "finetune.c")
    for threads in (1, 2):
        folder = tmp_path / f"run{threads}"
        files = [tmp_path / "images.u8", tmp_path / "labels.u8"]
        losses = run(program, path, *files, "20", folder, str(threads)).stdout.splitlines()[1:]
        assert losses == expected["onnxruntime"] == expected["native"]
        assert (folder / STATE).read_bytes() == (tmp_path / "native" / STATE).read_bytes()
    assert (tmp_path / "native" / STATE).read_bytes() == (tmp_path / "onnxruntime" / STATE).read_bytes()


@pytest.mark.parametrize("times", [20, pytest.param(100, marks=pytest.mark.slow, id="hundred")])
def test_killed_at_random_it_goes_on(
    compiled: Callable[[Path], Path],
    tiny_artifact: Make,
    data: tuple[Array, Array],
    tmp_path: Path,
    times: int,
) -> None:
    """A save after every step, kills, and the same bits at the end."""
    path, rng, folder = tiny_artifact(batch_norm="batch"), random.Random(0), tmp_path / "run"
    program = compiled(ROOT / "examples" / "c" / "finetune.c")
    files: list[str | Path] = [tmp_path / "images.u8", tmp_path / "labels.u8", "60"]
    run(program, path, *files, tmp_path / "whole", "1")
    killed = step = 0

    def source() -> Path:
        """The run, as soon as it holds a state: between two renames the newest is in the partial file."""
        return folder if any((folder / name).exists() for name in (STATE, PREVIOUS)) else path

    while killed < times:
        words = [str(word) for word in (program, source(), *files, folder, "1", "1")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            time.sleep(0.02 * rng.random())
            process.kill()
        killed += process.returncode != 0
        if source() == folder:
            with Network(folder) as network:
                assert network.steps >= step
                step = network.steps
        if step == 60:
            shutil.rmtree(folder)
            step = 0
    run(program, source(), *files, folder, "1", "1")
    assert (folder / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_the_example_in_c_says_what_is_wrong(
    compiled: Callable[[Path], Path], tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    program = compiled(ROOT / "examples" / "c" / "finetune.c")
    files: list[str | Path] = [tmp_path / "images.u8", tmp_path / "labels.u8", "2", tmp_path / "run"]
    done = run(program, tmp_path / "none", *files, succeeds=False)
    assert done.returncode == 1 and done.stderr.startswith(f"the artifact {tmp_path}")
    done = run(program, *files, succeeds=False)
    assert (done.returncode, done.stderr.split()[0]) == (2, "usage:")


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "trades", "mart"])
def test_nothing_is_allocated_once_it_is_open(
    compiled: Callable[[Path], Path],
    tiny_artifact: Make,
    data: tuple[Array, Array],
    tmp_path: Path,
    objective: str,
    batch_norm: str,
) -> None:
    path = tiny_artifact(objective=objective, batch_norm=batch_norm)
    program = compiled(ROOT / "tests" / "native" / "no_allocation.c")
    files = [tmp_path / "images.u8", tmp_path / "labels.u8", tmp_path / "run"]
    done = run(program, path, *files, succeeds=False)
    assert (done.returncode, done.stderr) == (0, "")
    with Network(tmp_path / "run") as network:
        assert network.steps == 4


def test_the_example_in_rust_is_pythons_training(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    compiler = shutil.which("rustc")
    if compiler is None:
        pytest.skip("there is no rustc")
    # By the name that programs link, whichever library is tested.
    (tmp_path / "libedge_bcs.so").symlink_to(library_path())
    options: list[str | Path] = ["--edition", "2021", "-D", "warnings", "-L", tmp_path, "-l", "edge_bcs"]
    rpath = f"link-arg=-Wl,-rpath,{library_path().parent}"
    program = tmp_path / "train"
    run(compiler, ROOT / "examples" / "rust" / "train.rs", *options, "-C", rpath, "-o", program)
    path, (x, y) = tiny_artifact(objective="trades", batch_norm="batch"), data
    with Trainer(path, engine="native") as trainer:
        floats = x.astype(np.float32) / np.float32(255)
        losses = [trainer.step(floats, y)["loss"] for _ in range(5)]
        trainer.save(tmp_path / "python")
    files: list[str | Path] = [tmp_path / "images.u8", tmp_path / "labels.u8", "5", tmp_path / "run"]
    done = run(program, path, *files)
    assert [float(line.split()[-1]) for line in done.stdout.splitlines()] == losses
    assert (tmp_path / "run" / STATE).read_bytes() == (tmp_path / "python" / STATE).read_bytes()
    done = run(program, tmp_path / "none", *files, succeeds=False)
    assert done.returncode == 1 and "none does not exist" in done.stderr


CMAKE_PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(example LANGUAGES C)
find_package(edge_bcs 0.2 REQUIRED)
add_executable(finetune {source})
target_link_libraries(finetune PRIVATE edge_bcs::edge_bcs)
"""


@pytest.mark.parametrize("how", ["pkg-config", "cmake"])
def test_an_installed_library_is_found(
    tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path, how: str
) -> None:
    if not (ROOT / "build" / "c" / "libedge_bcs.so").exists() or shutil.which("cmake") is None:
        pytest.skip("libedge_bcs was not built: make c-library")
    tools = {name: shutil.which(name) for name in ("cc", "cmake", "pkg-config")}
    if tools["cc"] is None or tools[how] is None:
        pytest.skip(f"there is no C compiler, or no {how}")
    prefix, source = tmp_path / "installed", ROOT / "examples" / "c" / "finetune.c"
    run("cmake", "--install", ROOT / "build" / "c", "--component", "c", "--prefix", prefix)
    library = next(prefix.rglob("libedge_bcs.so")).parent
    if how == "pkg-config":
        asked = run(
            "pkg-config", "--cflags", "--libs", "edge_bcs", PKG_CONFIG_PATH=str(library / "pkgconfig")
        )
        program = tmp_path / "finetune"
        rpath = f"-Wl,-rpath,{library}"
        run("cc", *STRICT[:5], source, "-o", program, *asked.stdout.split(), rpath)
    else:
        (tmp_path / "CMakeLists.txt").write_text(CMAKE_PROJECT.format(source=source))
        build = tmp_path / "build"
        run("cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
        run("cmake", "--build", build)
        program = build / "finetune"
    files = [tmp_path / "images.u8", tmp_path / "labels.u8"]
    done = run(program, tiny_artifact(), *files, "3", tmp_path / "run")
    assert done.stdout.splitlines()[-1].startswith("step 3 loss ")
    exported = run("nm", "-D", "--defined-only", library / "libedge_bcs.so").stdout
    names = {line.split()[-1] for line in exported.splitlines()}
    assert {name for name in names if "edge_bcs" in name} == declared()


def declared() -> set[str]:
    """The functions of the header."""
    text = (INCLUDE / "edge_bcs.h").read_text()
    return set(re.findall(r"^EDGE_BCS_API [^;(]*?\b(edge_bcs_\w+)\(", text, re.M))


def test_every_function_of_the_header_is_there() -> None:
    assert "edge_bcs_open" in declared()
    loaded = ctypes.CDLL(str(library_path()))
    assert [name for name in sorted(declared()) if not hasattr(loaded, name)] == []


def test_the_header_is_one_of_c_and_of_cpp(tmp_path: Path) -> None:
    """Alone, twice, and as strictly as can be."""
    for language, standard, compiler in (("c", "c99", "cc"), ("c++", "c++20", "c++")):
        if shutil.which(compiler) is None:
            pytest.skip("there is no compiler")
        source = tmp_path / "header"
        source.write_text("#include <edge_bcs.h>\n#include <edge_bcs.h>\nint main(void) {\n"
                          "  edge_bcs_options options = EDGE_BCS_INIT(edge_bcs_options);\n"
                          "  return options.size == sizeof options ? 0 : 1;\n}\n")  # fmt: skip
        run(compiler, "-x", language, f"-std={standard}", *STRICT[1:], "-fsyntax-only", source)
