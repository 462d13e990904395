"""edge-bcs-run and the C interface with attacks in half precision: Python's bits, and what a run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.library import half_kernels
from helpers import board_program as board
from helpers import commands
from helpers.c_interface import CError, Network

from edge_bcs.data import open_data

Make = Callable[..., Path]
HERE = pytest.mark.skipif(half_kernels() == 0, reason="no half precision here")
WIDE = {"micro_batch": 16, "batch_size": 32, "attack_steps": 4}
OPTIONS = (
    "--data",
    "digits",
    "--threads",
    1,
    "--eval-samples",
    24,
    "--eval-steps",
    2,
    "--max-writes",
    "none",
)


@pytest.fixture
def artifact(tiny_artifact: Make) -> Path:
    """Trained in micro-batches of 16, whose attacks may be in half precision."""
    return tiny_artifact(**WIDE, attack_precision="auto")


def precision_of(run: Path) -> str:
    return str(json.loads((run / "manifest.json").read_text())["attack_precision"])


@HERE
@pytest.mark.parametrize("objective", ["at", "trades"])
def test_the_same_bits_and_the_same_report(tiny_artifact: Make, tmp_path: Path, objective: str) -> None:
    artifact = tiny_artifact(**WIDE, objective=objective, attack_precision="auto")
    for wanted in ("half", "auto", "f32"):
        given = ("finetune", artifact, *OPTIONS, "--steps", 4, "--attack-precision", wanted)
        ours, theirs = tmp_path / f"ours-{wanted}", tmp_path / f"theirs-{wanted}"
        report = board.succeed(*given, "-o", ours)
        expected = commands.succeed(*given, "-o", theirs, "--engine", "native")
        assert board.states(ours) == board.states(theirs)
        assert board.metrics(ours) == board.metrics(theirs)
        assert precision_of(ours) == precision_of(theirs) == report["attack_precision"]
        del report["run"], expected["run"]
        assert board.timeless(report) == board.timeless(expected)
    assert precision_of(tmp_path / "ours-half") == "half" and precision_of(tmp_path / "ours-f32") == "f32"
    assert board.states(tmp_path / "ours-half") != board.states(tmp_path / "ours-f32")


@HERE
def test_a_run_goes_on_with_what_it_was_begun_with(artifact: Path, tmp_path: Path) -> None:
    """Either goes on with what the other began, in half precision, without being told to."""
    given = ("finetune", artifact, *OPTIONS, "--steps", 4, "--save-steps", 1, "--eval-samples", 0)
    begun = ("--attack-precision", "half")
    python = ("--engine", "native")
    commands.succeed(*given, *python, *begun, "-o", tmp_path / "whole")
    for name, first, second in (
        ("ours", board.run, commands.run),
        ("theirs", commands.run, board.run),
    ):
        run = tmp_path / name
        for program, words in ((first, begun), (second, ())):
            extra = python if program is commands.run else ()
            hours = ("--max-hours", 1e-9) if words else ()
            program(*given, *extra, *words, *hours, "-o", run, "--resume")
        assert precision_of(run) == "half"
        assert board.states(run)["state.safetensors"] == board.states(tmp_path / "whole")["state.safetensors"]


@HERE
def test_another_precision_is_told_and_kept(artifact: Path, tmp_path: Path) -> None:
    given = ("finetune", artifact, *OPTIONS, "--eval-samples", 0)
    for name, program in (("ours", board.run), ("theirs", commands.run)):
        run = tmp_path / name
        program(*given, "-o", run, "--steps", 2, "--attack-precision", "half")
        result = program(*given, "-o", run, "--steps", 4, "--resume", "--attack-precision", "f32")
        assert "Attacks of this run were in half; from here on they are in f32." in result.stderr
        assert precision_of(run) == "f32"
        assert json.loads((run / "report.json").read_text())["attack_precision"] == "f32"
    assert (
        board.states(tmp_path / "ours")["state.safetensors"]
        == board.states(tmp_path / "theirs")["state.safetensors"]
    )


def test_the_machine_decides(artifact: Path, tmp_path: Path) -> None:
    """The scalar kernels compute half precision if they must; kernels of other processors do not."""
    given = (
        "finetune",
        artifact,
        *OPTIONS,
        "--eval-samples",
        0,
        "--steps",
        1,
        "--json",
        "--attack-precision",
    )
    for wanted, found in (("auto", "f32"), ("half", "half")):
        result = board.run(*given, wanted, "-o", tmp_path / wanted, EDGE_BCS_ISA="scalar")
        assert json.loads(result.stdout)["attack_precision"] == precision_of(tmp_path / wanted) == found
    assert board.states(tmp_path / "auto") != board.states(tmp_path / "half")
    resumed = board.run(*given[:-1], "-o", tmp_path / "half", "--resume", EDGE_BCS_ISA="avx2")
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert (
            "take the attack precision f32, with which the run goes on from where it stands" in resumed.stderr
        )


def test_what_has_no_half_precision_form(tiny_artifact: Make, tmp_path: Path) -> None:
    narrow = tiny_artifact()
    given = ("finetune", narrow, *OPTIONS, "--eval-samples", 0, "--steps", 1)
    told = board.refused(*given, "-o", tmp_path / "run", "--attack-precision", "half")
    assert told in commands.run(*given, "-o", tmp_path / "run", "--attack-precision", "half").output
    report = board.succeed(*given, "-o", tmp_path / "run", "--attack-precision", "auto")
    assert "attack_precision" not in report
    wrong = board.run(*given, "-o", tmp_path / "other", "--attack-precision", "f16")
    assert wrong.returncode == 2 and "'f16' is not one of 'f32', 'half', 'auto'." in wrong.stderr


@HERE
def test_the_c_interface_steps_as_python_does(artifact: Path, tmp_path: Path) -> None:
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(32))
    for wanted in ("half", "f32"):
        with Network(artifact, attack_precision=wanted.encode()) as network:
            assert network.info.attack_precision.decode() == wanted
            network.step(x, y)
            network.call("save_into", str(tmp_path / wanted).encode())
            network.save()
        with Trainer(artifact, attack_precision=wanted, engine="native") as trainer:
            trainer.step(x, y)
            trainer.save(tmp_path / f"{wanted}-python")
        assert board.states(tmp_path / wanted) == board.states(tmp_path / f"{wanted}-python")
        with Network(tmp_path / wanted) as network:
            assert network.info.attack_precision.decode() == wanted
    with pytest.raises(CError, match="the attack precision is f32, half or auto, not 'f16'"):
        Network(artifact, attack_precision=b"f16")
