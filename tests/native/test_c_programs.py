"""Programs in C and Rust over the C interface, every warning an error, run on tiny networks."""

from __future__ import annotations

import os
import shutil
import subprocess
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
STATE = "state.safetensors"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", f"-I{INCLUDE}"]


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
            found: list[str | Path] = [library_path(), f"-Wl,-rpath,{library_path().parent}"]
            subprocess.run([compiler, *STRICT, source, "-o", program, *found], check=True)
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
        run = tmp_path / f"run{threads}"
        command: list[str | Path] = [
            program,
            path,
            tmp_path / "images.u8",
            tmp_path / "labels.u8",
            "20",
            run,
            str(threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        losses = done.stdout.splitlines()[1:]
        assert losses == expected["onnxruntime"] == expected["native"]
        assert (run / STATE).read_bytes() == (tmp_path / "native" / STATE).read_bytes()
    assert (tmp_path / "native" / STATE).read_bytes() == (tmp_path / "onnxruntime" / STATE).read_bytes()


def test_the_example_in_c_says_what_is_wrong(
    compiled: Callable[[Path], Path], tiny_artifact: Make, data: tuple[Array, Array], tmp_path: Path
) -> None:
    program = compiled(ROOT / "examples" / "c" / "finetune.c")
    files: list[str | Path] = [tmp_path / "images.u8", tmp_path / "labels.u8", "2", tmp_path / "run"]
    done = subprocess.run([program, tmp_path / "none", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"the artifact {tmp_path}")
    done = subprocess.run([program, *files], capture_output=True, text=True, check=False)
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
    command = [compiled(ROOT / "tests" / "native" / "no_allocation.c"), path]
    command += [tmp_path / "images.u8", tmp_path / "labels.u8", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with Network(tmp_path / "run") as network:
        assert network.steps == 4
