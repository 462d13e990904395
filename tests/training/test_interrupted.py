"""A training of the host that Ctrl-C or SIGTERM ends: what was done is saved, and goes on to the bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from helpers.training import SHORT, check_same, cut_off, digits, lines, same, tiny

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Output
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.training import backends
from edge_bcs.training import loop as training
from edge_bcs.training.lines import Lines
from edge_bcs.training.run import Run
from edge_bcs.training.settings import Growth, Method

NEVER = 1e9  # seconds between saves: what is saved is saved for the interruption, or at the end of an epoch
GROWTH = Growth(share=0.2, every=2, until=0.8, candidates=2)
ENGINES: dict[str, Any] = {"torch": backends.TorchBackend, "sparse": backends.CompiledBackend}


def trained(engine: str, output: Output, **more: Any) -> edge_bcs.SparseModel:
    """Eight steps, three an epoch, watched for a collapse before the first and after the last."""
    sparse = edge_bcs.sparsify(tiny(), 0.9, 5)
    options: dict[str, Any] = {
        "schedule": edge_bcs.Schedule(steps=8),
        "attack": Attack(kind="fgsm-rs", steps=1),
        "feed": Feed(validation=0.2),
        "compute": Compute(engine, device="cpu", threads=1),
    }
    training.train(sparse, digits(60), output=output, **{**SHORT, **options, **more})
    return sparse


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("stop", "saved"), [(0, None), (1, 1), (4, 4), (7, 7)])
def test_the_steps_that_were_done_are_saved(
    engine: str, stop: int, saved: int | None, tmp_path: Path
) -> None:
    """Interrupted as step ``stop`` begins; nothing was done before the first."""
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    whole = trained(engine, replace(cut, folder=tmp_path / "whole"))
    with cut_off(ENGINES[engine], "step", stop):
        trained(engine, cut)
    last = tmp_path / "cut" / "last.safetensors"
    assert last.exists() == (saved is not None)
    if saved is not None:
        assert read_checkpoint(last).step == saved == len(lines(tmp_path / "cut", "metrics.jsonl"))
    resumed = trained(engine, replace(cut, resume=saved is not None))
    assert same(whole, resumed)
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_whose_numbers_are_unread_has_its_line(engine: str, tmp_path: Path) -> None:
    """Interrupted after the fifth step, before its loss is read; on a GPU several may wait for that."""
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    trained(engine, replace(cut, folder=tmp_path / "whole"))
    begin = ENGINES[engine].step
    unread = [True]

    def begun(self: Any, batch: Any, hyper: Any, number: int, *more: Any) -> Callable[[], Any]:
        numbers = begin(self, batch, hyper, number, *more)

        def read() -> Any:
            if number == 4 and unread and unread.pop():
                raise KeyboardInterrupt
            return numbers()

        return read

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ENGINES[engine], "step", begun)
        trained(engine, cut)
    assert read_checkpoint(tmp_path / "cut" / "last.safetensors").step == 5
    assert len(lines(tmp_path / "cut", "metrics.jsonl")) == 5
    trained(engine, replace(cut, resume=True))
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("name", "step", "ended"), [("evaluate", 6, 3), ("watch", 8, 6)])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_that_is_interrupted_is_done_again(
    engine: str, name: str, step: int, ended: int, tmp_path: Path
) -> None:
    """The second time that it is done: the epoch's steps are not lost, and its line is there once."""
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    whole = trained(engine, replace(cut, folder=tmp_path / "whole"))
    with cut_off(ENGINES[engine], name, 1):
        trained(engine, cut)
    found = read_checkpoint(tmp_path / "cut" / "last.safetensors")
    assert (found.step, json.loads(found.metadata["ended"])) == (step, ended)
    assert lines(tmp_path / "cut", "epochs.jsonl")[-1]["step"] == ended
    assert same(whole, trained(engine, replace(cut, resume=True)))
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("written", [False, True])
def test_an_end_of_an_epoch_that_is_killed_is_done_again(written: bool, tmp_path: Path) -> None:
    """`kill -9` before or after the second epoch's line is written: nothing is saved from there on."""
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    whole = trained("torch", replace(cut, folder=tmp_path / "whole"))
    write = Lines.epoch

    def killed(self: Lines, line: dict[str, Any]) -> None:
        if written or line["step"] < 6:
            write(self, line)
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "leave", lambda self, keep: None)
        patch.setattr(Lines, "epoch", killed)
        trained("torch", cut)
    assert lines(tmp_path / "cut", "epochs.jsonl")[-1]["step"] == (6 if written else 3)
    assert same(whole, trained("torch", replace(cut, resume=True)))
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("engine", ENGINES)
def test_between_growth_and_its_step_an_earlier_state_stays(engine: str, tmp_path: Path) -> None:
    """Growth is no part of the step before it: saved with that, it would be done twice."""
    more: dict[str, Any] = {"method": Method(growth=GROWTH)}
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    whole = trained(engine, replace(cut, folder=tmp_path / "whole"), **more)
    with cut_off(ENGINES[engine], "step", 4):  # connections moved before it
        trained(engine, cut, **more)
    assert read_checkpoint(tmp_path / "cut" / "last.safetensors").step == 3
    assert same(whole, trained(engine, replace(cut, resume=True), **more))
    check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Interrupts as Ctrl-C does after so many seconds."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6)) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_interrupted_at_random_moments_it_ends_the_same(
    alarm: Callable[[float], None], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"method": Method(growth=GROWTH)}
    cut = Output(tmp_path / "cut", save_seconds=NEVER)
    trained("torch", replace(cut, folder=tmp_path / "warm"), **more)
    began = time.perf_counter()
    whole = trained("torch", replace(cut, folder=tmp_path / "whole"), **more)
    seconds = time.perf_counter() - began
    chance, interrupted = random.Random(3), 0
    while True:
        try:
            begun = (tmp_path / "cut" / "last.safetensors").exists()
            alarm(chance.uniform(0.2, 1) * seconds)
            resumed = trained("torch", replace(cut, resume=begun), **more)
            signal.setitimer(signal.ITIMER_REAL, 0)
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert interrupted < 1000
    assert interrupted > 0 and same(whole, resumed)
    check_same(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_bcs.cli", "train", "--model", "resnet18", "--width", "0.0625"]
    command += ["--data", "digits", "--sparsity", "0.9", "--epochs", "1000", "--training-attack", "fgsm-rs"]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
    last = tmp_path / "run" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:  # the end of the first epoch
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 143, told
    step = read_checkpoint(last).step
    assert told.endswith(f"Stopped after step {step}; go on with --resume -o {tmp_path / 'run'}.\n")
    assert step > 0 and [line["step"] for line in lines(tmp_path / "run", "metrics.jsonl")] == list(
        range(1, step + 1)
    )
