"""Training: schedules, selection, resumption to the bit (also after kill -9), and that it learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, TESTS
from helpers.training import SHORT, check_same, cut_off, digits, same, tiny
from torch import nn

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Hyper, Method, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import divisor
from edge_bcs.data import ArrayDataset, open_data
from edge_bcs.evaluation.measures import evaluate
from edge_bcs.method import attacks, connectivity
from edge_bcs.training import backends, checkpoints, updates
from edge_bcs.training import loop as training
from edge_bcs.training.reading import Part

ALL = Feed(validation=0.0)
"""Nothing is held out."""


def test_schedule() -> None:
    assert [divisor(step, 8) for step in range(8)] == [1, 1, 1, 1, 10, 10, 100, 100]
    assert [divisor(step, 5) for step in range(5)] == [
        1,
        1,
        1,
        10,
        100,
    ]  # 50 % of 5 is 2.5, 75 % 3.75


def test_it_learns_to_be_robust() -> None:
    sparse = edge_bcs.sparsify(tiny(), 0.8, 0, "uniform")
    report = training.train(
        sparse,
        open_data("digits", shape=(1, 8, 8)),
        objective="at",
        epochs=8,
        batch_size=64,
        attack=Attack(epsilon=0.1, step_size=0.025, steps=5),
        feed=Feed(augment=False),
        progress=False,
        compute=Compute(device="cpu"),
    )
    test = evaluate(
        sparse, open_data("digits", "test", (1, 8, 8)), epsilon=0.1, steps=10, restarts=1, batch_size=512
    )
    # Chance is 10 %.
    assert test["clean_acc"] > 0.85 and test["adv_acc"] > 0.5
    assert report["best_robust_acc"] > 0.3 and sparse.kappa == connectivity.kappa(sparse.size, 0.8)


@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart"])
def test_every_objective_runs_and_says_what_happened(objective: str, tmp_path: Path) -> None:
    sparse = edge_bcs.sparsify(tiny(), 0.9, 1)
    report = training.train(
        sparse,
        digits(100),
        objective=objective,
        epochs=2,
        feed=Feed(validation=0.1),
        output=tmp_path,
        **SHORT,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    # 100 images, 10 held out, batches of 16: five full batches an epoch.
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in epochs] == [5, 10]
    assert [line["learning_rate"] for line in lines] == [0.1] * 5 + [0.01] * 3 + [0.001] * 2
    assert epochs[0]["loss"] == pytest.approx(np.mean([line["loss"] for line in lines[:5]]))
    assert all(sum(line["connections"].values()) == sparse.kappa for line in epochs)
    assert ("robust_accuracy" in lines[0]) == (objective in ("at", "trades", "mart"))
    assert (epochs[0]["validation_robust_acc"] is None) == (objective == "natural")
    assert report["step"] == 10
    # What is left in memory is the best epoch, and so is the file.
    best = read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert best.step == epochs[report["best_epoch"]]["step"]
    assert same(sparse, edge_bcs.load(tmp_path, tiny()))
    assert best.metadata["objective"] == objective


def test_selection_never_sees_the_training_images() -> None:
    seen: list[int] = []

    class Watched(ArrayDataset):
        def images(self, positions: np.ndarray) -> np.ndarray:
            seen.extend(positions.tolist())
            return super().images(positions)

    data = digits(100)
    watched = Watched(*data.read(np.arange(100)), classes=data.classes)
    plan = training.train(
        edge_bcs.sparsify(tiny(), 0.9),
        watched,
        objective="natural",
        epochs=1,
        feed=Feed(validation=0.2),
        **SHORT,
    )
    assert plan["step"] == 5
    by_first_use = list(dict.fromkeys(seen))
    trained, held_out = by_first_use[: 5 * 16], by_first_use[5 * 16 :]
    assert len(held_out) == 20 and set(seen[-20:]) == set(held_out) and not set(trained) & set(held_out)


def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.6, 0.5])
    monkeypatch.setattr(backends.TorchBackend, "evaluate", lambda *_: (0.9, next(scores)))
    sparse = edge_bcs.sparsify(tiny(), 0.9)
    report = training.train(
        sparse, digits(64), epochs=3, feed=Feed(validation=0.25), output=tmp_path, **SHORT
    )
    assert report["best_epoch"] == 1 and report["best_robust_acc"] == 0.6
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").step == 6
    assert read_checkpoint(tmp_path / "last.safetensors").step == 9
    assert same(sparse, edge_bcs.load(tmp_path, tiny()))
    assert not same(sparse, edge_bcs.load(tmp_path / "last.safetensors", model=tiny()))


@pytest.mark.parametrize("objective", ["trades", "rst"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumed_is_as_if_never_interrupted(
    objective: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pseudo = digits(40) if objective == "rst" else None
    arguments: dict[str, Any] = {
        "objective": objective,
        "epochs": 2,
        "feed": Feed(validation=0.1, pseudo_labelled=pseudo),
        **SHORT,
    }
    cut = Output(tmp_path / "cut", save_seconds=0.0)
    whole = edge_bcs.sparsify(tiny(), 0.9, 5)
    training.train(whole, digits(60), output=Output(tmp_path / "whole", save_seconds=0.0), **arguments)
    with cut_off(updates, "update", stop):
        training.train(edge_bcs.sparsify(tiny(), 0.9, 5), digits(60), output=cut, **arguments)
    resumed = edge_bcs.sparsify(tiny(), 0.9, 5)
    training.train(resumed, digits(60), output=replace(cut, resume=True), **arguments)
    assert same(whole, resumed)
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("resume", [False, True])
def test_killed_before_the_first_save_it_begins_anew(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a line of epochs.jsonl and before any state, as older versions may have left it: each line is
    there once."""
    arguments: dict[str, Any] = {"epochs": 2, "feed": Feed(validation=0.1), **SHORT}

    def killed(file: Path, *_: object, **__: object) -> None:
        if file.name == "last.safetensors" and (tmp_path / "epochs.jsonl").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_checkpoint", killed)
        training.train(edge_bcs.sparsify(tiny(), 0.9, 5), digits(60), output=tmp_path, **arguments)
    assert len((tmp_path / "epochs.jsonl").read_text().splitlines()) == 1
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 4, "lo\xff')  # torn
    training.train(
        edge_bcs.sparsify(tiny(), 0.9, 5), digits(60), output=Output(tmp_path, resume=resume), **arguments
    )
    for name, steps in (("metrics.jsonl", [1, 2, 3, 4, 5, 6]), ("epochs.jsonl", [3, 6])):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == steps


_SCRIPT = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import edge_bcs
from helpers.training import SHORT, digits, tiny
edge_bcs.train(edge_bcs.sparsify(tiny(), 0.9, 5), digits(60), epochs=40, feed=edge_bcs.Feed(validation=0.1),
               output=edge_bcs.Output({output!r}, save_seconds=0.0), **SHORT)
"""


def test_kill_9_leaves_a_state_that_resumes_to_the_bit(tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = _SCRIPT.format(root=str(ROOT), tests=str(TESTS), output=str(output))
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 300
        while not (output / "last.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert 0 < read_checkpoint(output / "last.safetensors").step < 120
    networks, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was killed
    try:
        for folder, resume in ((output, True), (tmp_path / "whole", False)):
            networks.append(edge_bcs.sparsify(tiny(), 0.9, 5))
            arguments: dict[str, Any] = {"epochs": 40, "feed": Feed(validation=0.1), **SHORT}
            kept = Output(folder, resume=resume)
            report = training.train(networks[-1], digits(60), output=kept, **arguments)
            assert report["step"] == 120
    finally:
        torch.set_num_threads(threads)
    assert same(*networks)
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))


def test_rst_takes_half_of_each_batch_from_the_second_data_set() -> None:
    read: dict[str, list[int]] = {"labelled": [], "pseudo": []}

    class Watched(ArrayDataset):
        name = ""

        def images(self, positions: np.ndarray) -> np.ndarray:
            read[self.name].extend(positions.tolist())
            return super().images(positions)

    images, labels = np.ones((50, 1, 8, 8), np.float32), np.arange(50) % 10
    first, second = Watched(images, labels), Watched(images[:30], labels[:30])
    first.name, second.name = "labelled", "pseudo"
    report = training.train(
        edge_bcs.sparsify(tiny(), 0.9),
        first,
        objective="rst",
        epochs=1,
        feed=Feed(augment=False, validation=0.0, pseudo_labelled=second),
        **{**SHORT, "batch_size": 20},
    )
    # Five steps of 10 + 10. Images are read once and then kept: all 50, and all 30, none left out.
    assert report["step"] == 5
    assert sorted(set(read["labelled"])) == list(range(50))
    assert sorted(set(read["pseudo"])) == list(range(30)) and len(read["pseudo"]) == 30


def test_baselines_keep_their_masks() -> None:
    trained = edge_bcs.sparsify(tiny(), 0.9, 1)
    training.train(trained, digits(64), epochs=2, feed=ALL, hyper=Hyper(weight_decay=0.05), **SHORT)
    fixed = connectivity.fixed(tiny(), trained, seed=9)
    assert fixed.layer_counts() == trained.layer_counts()
    assert not np.array_equal(fixed.coo()[1], trained.coo()[1])
    networks = {
        "random": edge_bcs.sparsify(tiny(), 0.9, 1, "uniform"),
        "fixed": fixed,
        "dense": edge_bcs.sparsify(tiny(), 0),
    }
    for method, sparse in networks.items():
        value, index = sparse.coo()
        training.train(sparse, digits(64), method=method, epochs=1, feed=ALL, **SHORT)
        assert np.array_equal(sparse.coo()[1], index)
        assert not np.array_equal(sparse.coo()[0], value)
    assert networks["dense"].kappa == networks["dense"].size
    with pytest.raises(EdgeBcsError, match="other kernels"):
        connectivity.fixed(nn.Sequential(nn.Linear(3, 3)), trained)


def test_bf16_stays_close() -> None:
    losses = {}
    for precision in ("f32", "bf16"):
        sparse = edge_bcs.sparsify(tiny(), 0.5, 0, "uniform")
        report = training.train(
            sparse,
            digits(64),
            objective="trades",
            epochs=3,
            feed=ALL,
            **{**SHORT, "compute": Compute(device="cpu", precision=precision)},
        )
        losses[precision] = report["loss"]
        assert sparse.value().dtype == torch.float32
    assert losses["bf16"] != losses["f32"]
    assert losses["bf16"] == pytest.approx(losses["f32"], rel=0.1)


def test_a_compiled_network_trains_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that traces and differentiates, but writes no machine code: that takes minutes."""
    compile_module, compiled = nn.Module.compile, []

    def traced(self: nn.Module) -> None:
        compiled.append(self)
        compile_module(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    losses, networks = [], []
    for compiling in (False, True):
        networks.append(edge_bcs.sparsify(tiny(), 0.5, 0, "uniform"))
        arguments: dict[str, Any] = {
            "objective": "trades",
            "schedule": Schedule(steps=3),
            "feed": Feed(validation=0.25),
            **SHORT,
            "compute": Compute(device="cpu", compile=compiling),
        }
        losses.append(training.train(networks[-1], digits(64), **arguments)["loss"])
    assert compiled == [networks[1].network]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    means = [network.state()["batchnorm.variance"] for network in networks]
    assert means[1] == pytest.approx(means[0], rel=1e-3)


def test_pixels_are_kept_in_memory_only_if_that_changes_nothing() -> None:
    reads = []

    class Watched(ArrayDataset):
        def images(self, positions: np.ndarray) -> np.ndarray:
            reads.append(len(positions))
            return super().images(positions)

    generator = np.random.default_rng(0)
    whole = generator.integers(0, 256, (6, 1, 4, 4)).astype(np.float32) / np.float32(255)
    for images, expected in ((whole, [3]), (whole * np.float32(0.7), [3, 3])):
        reads.clear()
        data = Watched(images, np.zeros(6, np.int64))
        part = Part(data, np.array([1, 3, 5]))
        for _ in range(2):
            x, _ = part.read(np.array([2, 0, 1]))
            assert np.array_equal(x, images[[5, 1, 3]])
        assert sum(reads) >= sum(expected) and (len(reads) == 1) == (expected == [3])


def test_refusals(tmp_path: Path) -> None:
    data = digits(40)

    def refused(match: str, **changed: object) -> None:
        arguments: dict[str, Any] = {**SHORT, "epochs": 1, **changed}
        with pytest.raises(EdgeBcsError, match=match):
            training.train(edge_bcs.sparsify(tiny(), 0.9), arguments.pop("data", data), **arguments)  # type: ignore[arg-type]

    refused("no objective 'awp'", objective="awp")
    refused("rst needs a second, pseudo-labelled data set", objective="rst")
    refused("no use for pseudo-labelled data", feed=Feed(pseudo_labelled=data))
    refused("the method is bcs, random, fixed or dense, not 'snip'", method="snip")
    with pytest.raises(EdgeBcsError, match="uniform or by-layer, not 'magnitude'"):
        Method(rewire="magnitude")
    refused("epochs must be a whole number of at least 1", epochs=0)
    refused("batch_size must be a whole number of at least 1", batch_size=0)
    refused("beta must be a number of at least 0", beta=-1)
    refused("the batch norm is frozen or batch", batch_norm="instance")
    refused("given epochs= and another in schedule=", schedule=Schedule(epochs=3))
    with pytest.raises(EdgeBcsError, match="held-out fraction"):
        Feed(validation=1.0)
    with pytest.raises(EdgeBcsError, match="only be resumed from the output folder"):
        Output(resume=True)
    with pytest.raises(EdgeBcsError, match="save_seconds must be at least 0"):
        Output(save_seconds=-1)
    with pytest.raises(EdgeBcsError, match="the engine is torch or sparse, not 'jax'"):
        Compute("jax")
    with pytest.raises(EdgeBcsError, match="the precision is f32 or bf16, not 'f16'"):
        Compute(precision="f16")
    refused("holds no training to resume", output=Output(tmp_path / "none", resume=True))
    refused(
        "the data set is empty", data=ArrayDataset(np.zeros((0, 1, 8, 8), np.float32), np.zeros(0, np.int64))
    )
    refused(
        "does not take images of the shape",
        data=ArrayDataset(np.zeros((9, 3, 8, 8), np.float32), np.zeros(9, int)),
    )
    refused(
        "12 classes, the network only 10",
        data=ArrayDataset(np.zeros((9, 1, 8, 8), np.float32), np.full(9, 11)),
    )
    training.train(edge_bcs.sparsify(tiny(), 0.9), data, epochs=1, output=tmp_path / "run", **SHORT)
    refused("holds a training already", output=tmp_path / "run")
    refused("begun with epochs 1, not 2", output=Output(tmp_path / "run", resume=True), epochs=2)


def test_a_network_that_is_cut_is_told() -> None:
    """No connection between the layers: 200 epochs would change nothing but the last bias."""
    arguments: dict[str, Any] = {"schedule": Schedule(steps=1), "feed": Feed(validation=0.2), **SHORT}
    assert training.train(edge_bcs.sparsify(tiny(), 0.9), digits(64), **arguments)["warnings"] == []
    sparse = edge_bcs.sparsify(tiny(), 0.99)
    value, index = sparse.coo()
    # The dense layer keeps its connections to the first channel, the convolution those of the others.
    index = np.concatenate([np.arange(9, 9 + 10), 72 + np.arange(len(index) - 10)])
    sparse.load_coo(np.ones_like(value), index)
    (warning,) = training.train(sparse, digits(64), **arguments)["warnings"]
    assert "the network is cut" in warning


def test_frozen_statistics() -> None:
    sparse = edge_bcs.sparsify(tiny(), 0.5)
    training.train(sparse, digits(40), epochs=1, batch_norm="frozen", feed=ALL, **SHORT)
    assert not sparse.state()["batchnorm.mean"].any()
    with attacks.evaluation_mode(sparse):
        assert not sparse.training
