"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.artifacts import tiny_network

import edge_bcs  # noqa: F401 (before any test imports onnxruntime: see there)
from edge_bcs.core import progress

# Torch's threads wait for each other at every tiny operator; one alone is many times faster. Read when torch
# is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# So do the threads of trainers, which have one for each core that they may run on. A worker of pytest-xdist
# therefore has one core, and so has every process that its tests start.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded copies of data go where they are forgotten, and this machine counts as never calibrated."""
    monkeypatch.setenv("EDGE_BCS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("EDGE_BCS_CONFIG", str(tmp_path_factory.mktemp("config")))


@pytest.fixture(autouse=True)
def as_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """No width is told: workers of pytest-xdist have one in their environment, and so may whoever starts the
    tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says of its progress depends on how busy this machine is: tests of other things hear
    nothing of it."""
    monkeypatch.setattr(progress, "FIRST_SECONDS", 1e6)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that exports a tiny network (1×8×8 images, 10 classes, κ = 364) and remembers it.

    Keyword arguments go to `export`: objective, batch_norm, …; short for its objects are micro_batch,
    attack_steps and epsilon.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from edge_bcs.exporters import export

    from edge_bcs import Attack, Hyper, Memory
    from edge_bcs.method.connectivity import sparsify

    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def make(**options: Any) -> Path:
        options = {"objective": "at", "micro_batch": 4, "attack_steps": 3, "batch_size": 16, **options}
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("artifact") / "tiny"
            torch.manual_seed(0)
            sparse = sparsify(tiny_network(), 0.5, seed=0, distribution="uniform")
            attack = {"steps": options.pop("attack_steps"), "epsilon": options.pop("epsilon", 8 / 255)}
            attack["kind"] = options.pop("training_attack", "pgd")
            memory = Memory(options.pop("memory", None), micro_batch=options.pop("micro_batch"))
            given = {"memory": memory, "attack": Attack(**attack), "hyper": Hyper(learning_rate=0.1)}
            export(sparse, folder, **{"input_shape": (1, 8, 8), "validate": False, **given, **options})
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def batch() -> tuple[Array, Array]:
    """Ten images f32 [10, 1, 8, 8] in [0, 1] and their labels i64[10]."""
    return np.random.default_rng(0).random((10, 1, 8, 8), np.float32), np.arange(10)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """An .npz file of 64 images of 1×8×8, in batches of 16 four steps an epoch; 16 of them to test on."""
    from edge_bcs.data import open_data

    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(64))
    np.savez(tmp_path / "digits.npz", x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    return tmp_path / "digits.npz"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a disk needs root on Linux")
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
