"""The command line: results, JSON, one sentence and exit status 1 when something is wrong."""

# mypy: disable-error-code="arg-type, assignment, call-overload"

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from helpers.commands import run, succeed
from helpers.training_commands import SMALL, write_digits

from edge_bcs.cli import main

Make = Callable[..., Path]
TRAIN = ("train", "--model", "resnet18", "--data", "digits", *SMALL)
COMMANDS = (
    "export",
    "simulate",
    "finetune",
    "predict",
    "evaluate",
    "train",
    "plot",
    "inspect",
    "targets",
    "bench",
    "run-ort-artifact",
    "doctor",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and "Examples:" in result.output and f"edge-bcs {name}" in result.output
    described = run("--help").output
    assert name in described


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_in_words(name: str) -> None:
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option):
            assert len((option.help or "").split()) > 1, option.name
            record = option.get_help_record(context)
            assert record is not None and "RANGE" not in record[0] and record[1].count("x>=") < 2, record


def test_the_command_line_starts_without_host_packages() -> None:
    modules = ", ".join(f"edge_bcs.cli.{name.replace('-', '_')}" for name in COMMANDS)
    code = f"import sys, edge_bcs.cli, {modules}; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "scipy", "numpy"} & set(loaded)


def test_export_simulate_inspect(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "resnet"
    options = (
        "--model",
        "resnet18",
        "--width",
        0.0625,
        "--input-size",
        8,
        "--sparsity",
        0.9,
        "--batch-norm",
        "frozen",
    )
    exported = succeed("export", *options, "--memory", "2MiB", "-o", folder)
    assert exported["network"] == "resnet18" and exported["memory"] == 2 << 20
    assert exported["predicted_peak_bytes"] <= 2 << 20
    simulated = succeed("simulate", folder, "--seconds", 0, "--html", tmp_path / "map.html")
    assert simulated["fits"] and simulated["measurement"]["exact"]
    assert "<html" in (tmp_path / "map.html").read_text()
    assert (
        simulated["measured_peak_bytes"]
        == simulated["predicted_peak_bytes"]
        == exported["predicted_peak_bytes"]
    )
    assert (
        sum(simulated["phases"]["training"]["categories"].values())
        == (simulated["phases"]["training"]["predicted_peak_bytes"])
    )
    inspected = succeed("inspect", folder)
    assert sum(inspected["active"].values()) == inspected["kappa"] == exported["kappa"]
    for command in ("simulate", "inspect"):
        shown = run(command, folder)
        assert shown.exit_code == 0 and "resnet18" in shown.output
    assert re.search(r"activations     \d+ computed a second time\n", run("inspect", folder).output)
    # As small as it gets, one image at a time; and as large as it likes.
    tight = ("export", *options, "--objective", "trades", "--no-validate", "-o", folder, "--memory")
    need = re.search(r"smallest feasible budget is (\d+) bytes", run(*tight, "1KiB").output)
    assert need is not None
    shown = run(*tight, need[1]).output
    assert "micro-batch     1 image, batches of 128" in shown
    assert re.search(r"activations     \d+ computed a second time, the clean branch run twice", shown)
    shown = run("export", *options, "--no-validate", "-o", folder).output
    assert "micro-batch     32 images" in shown and "all kept for the backward pass" in shown
    assert "no budget was named (--memory, --target)" in shown


def test_simulate_fails_over_the_cap(tiny_artifact: Make, tmp_path: Path) -> None:
    path = tiny_artifact()
    predicted = succeed("simulate", path, "--no-run")["predicted_peak_bytes"]
    common = ("simulate", path, "--seconds", 0)
    assert succeed(*common, "--memory", predicted)["measured_peak_bytes"] == predicted
    result = run(*common, "--memory", predicted - 1, "--json", tmp_path / "answer.json")
    assert result.exit_code == 1 and "memory budget exceeded" in result.stderr
    content = json.loads((tmp_path / "answer.json").read_text())
    assert not content["fits"] and content["measured_peak_bytes"] is None


def test_finetune_refuses_a_cap_below_the_plan_before_it_measures(
    tiny_artifact: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_artifact()
    need = succeed("inspect", path)["predicted_peak_bytes"]
    write_digits(tmp_path / "digits.npz")
    finetune = ("finetune", path, "--data", tmp_path / "digits.npz", "--steps", 1, "-o", tmp_path / "run")
    monkeypatch.setattr("edge_bcs.runtime.Trainer.evaluate", lambda *_: pytest.fail("measured first"))
    refused = run(*finetune, "--memory", need - 1)
    assert refused.exit_code == 1 and f"takes {need} bytes, more than the {need - 1}" in refused.stderr
    assert not (tmp_path / "run" / "report.json").exists()
    assert run(*finetune, "--memory", need, "--eval-samples", 0).exit_code == 0


def test_finetune_and_evaluate(tiny_artifact: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    common = ("--data", tmp_path / "digits.npz", "--eval-samples", 40, "--eval-steps", 2)
    write_digits(tmp_path / "digits.npz")
    report = succeed("finetune", tiny_artifact(), *common, "--steps", 6, "-o", folder)
    assert set(report["before"]) == set(report["after"]) >= {"accuracy", "robust_accuracy"}
    assert report["training"]["step"] == 6
    assert json.loads((folder / "report.json").read_text())["after"] == report["after"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6

    refused = run("finetune", tiny_artifact(), *common, "-o", folder)
    assert refused.exit_code == 1 and "already holds a run" in refused.stderr
    longer = succeed("finetune", tiny_artifact(), *common, "--steps", 8, "-o", folder, "--resume")
    assert longer["training"]["step"] == 8 and longer["before"] == report["before"]

    board = succeed("evaluate", folder, "--data", tmp_path / "digits.npz", "--attack-steps", 2, "--limit", 40)
    assert board["engine"] == "board" and board["samples"] == 40
    assert board["accuracy"] == longer["after"]["accuracy"]
    assert board["robust_accuracy"] == longer["after"]["robust_accuracy"]
    # RobustBench's names, and what a plot needs, whoever measured.
    assert (board["clean_acc"], board["adv_acc"]) == (board["accuracy"], board["robust_accuracy"])
    assert (board["norm"], board["eps"], board["steps"], board["restarts"]) == ("Linf", 8 / 255, 2, 1)
    assert board["step_size"] == pytest.approx(2.5 * 8 / 255 / 2)
    fgsm = succeed(
        "evaluate", folder, "--data", tmp_path / "digits.npz", "--attack", "fgsm", "--epsilon", "0"
    )
    assert fgsm["adv_acc"] == fgsm["clean_acc"]
    shown = run("evaluate", folder, "--data", tmp_path / "digits.npz", "--attack", "none")
    assert shown.exit_code == 0 and "clean accuracy" in shown.output


def test_a_stopped_training_is_saved_and_goes_on_to_the_bit(tiny_artifact: Make, tmp_path: Path) -> None:
    """SIGTERM in the middle, then --resume, against a training that was left alone."""
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.state import read_state

    write_digits(tmp_path / "digits.npz")
    command = [
        sys.executable,
        "-m",
        "edge_bcs.cli",
        "finetune",
        str(tiny_artifact()),
        "--json",
        "--steps",
        "3000",
    ]
    command += ["--data", str(tmp_path / "digits.npz"), "--eval-samples", "0", "--batch-size", "4", "-o"]
    stopped = subprocess.Popen([*command, str(tmp_path / "a")], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.stat().st_size < 1000):
        time.sleep(0.02)
    os.kill(stopped.pid, signal.SIGTERM)
    _, message = stopped.communicate(timeout=60)
    assert stopped.returncode == 143 and "--resume" in message
    state_a, metadata = read_state(Artifact.read(tmp_path / "a"))
    total = int(metadata["step"]) + 5
    # The schedule depends on the length, so both are given the same one from here on.
    command[command.index("3000")] = str(total * 3)
    subprocess.run([*command, str(tmp_path / "b")], check=True, capture_output=True, timeout=120)
    first = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    subprocess.run([*command, str(tmp_path / "a"), "--resume"], check=True, capture_output=True, timeout=120)
    state_a, _ = read_state(Artifact.read(tmp_path / "a"))
    state_b, _ = read_state(Artifact.read(tmp_path / "b"))
    assert all((state_a[name] == state_b[name]).all() for name in state_a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simulate", "nothing"), "does not exist"),
        (("inspect", "nothing"), "does not exist"),
        (("finetune", "nothing", "--data", "digits"), "does not exist"),
        (("evaluate", "nothing", "--data", "digits"), "no file or folder"),
        (("finetune", "ARTIFACT", "--data", "nothing", "-o", "TMP"), "does not exist"),
        (("finetune", "ARTIFACT", "--data", "digits", "--memory", "lots", "-o", "TMP"), "is not a size"),
        (
            ("finetune", "ARTIFACT", "--data", "digits", "--memory", "9KiB", "-o", "TMP"),
            "memory budget exceeded",
        ),
        (("evaluate", "ARTIFACT", "--data", "digits", "--epsilon", "big"), "--epsilon must be a number"),
        (
            ("evaluate", "ARTIFACT", "--data", "digits", "--attack", "square", "--engine", "board"),
            "needs --engine",
        ),
        (("targets", "commodore-64"), "commodore-64"),
        (("export", "--model", "vgg17"), "no network named"),
        (("export", "--sparsity", "1"), "sparsity"),
        (("export", "--checkpoint", "nothing"), "nothing"),
        (("train", "--data", "nothing"), "does not exist"),
        (("train", "--data", "digits", "--method", "fixed"), "needs --counts-from"),
        (("train", "--data", "digits", "--pretrained", "x"), "the zoo has no checkpoint"),
        (("train", "--data", "digits", "--objective", "rst"), "needs --pseudo-labelled"),
        (
            ("train", "--data", "digits", "--objective", "rst", "--pseudo-labelled", "TMP"),
            "pseudo-labelled data",
        ),
        (("train", "--data", "digits", "--device", "gpu"), "no kind of device 'gpu'"),
        (("train", "--data", "digits", "--device", "cuda:99"), "no device 'cuda:99' here"),
        (("train", "--data", "digits", "--method", "lwm", "--device", "cuda:99"), "no device 'cuda:99' here"),
        (("evaluate", "ARTIFACT", "--data", "digits", "--device", "cuda:99"), "no device 'cuda:99' here"),
        (
            ("train", "--data", "digits", "--method", "random", "--rewire", "by-layer"),
            "--rewire belongs to bcs",
        ),
        (("train", "--data", "digits", "--engine", "sparse", "--compile"), "--compile is for --engine torch"),
        (("evaluate", "ARTIFACT", "--data", "digits", "--queries", "9"), "--queries belongs to square"),
        (
            ("evaluate", "ARTIFACT", "--data", "digits", "--attack", "fgsm", "--restarts", "3"),
            "belongs to pgd",
        ),
        (("evaluate", "ARTIFACT", "--data", "digits", "--engine", "board", "--seed", "1"), "--seed needs"),
        (("evaluate", "ARTIFACT", "--data", "digits", "--seed", "1", "--memory", "1MiB"), "no such cap"),
        (("export", "--checkpoint", "x", "--width", "4"), "a checkpoint has its own"),
        (("export", "--checkpoint", "x", "--sparsity", "0.99"), "--sparsity belongs to a new network"),
        (("export", "--checkpoint", "x", "--model", "vgg16"), "--model belongs to a new network"),
        (("export", "--target", ""), "No board is called ''"),
        (("export", "--beta", "3"), "--beta belongs to trades, rst, mart, not to at"),
        (("train", "--data", "digits", "--objective", "natural", "--beta", "3"), "--beta belongs to trades"),
        ((*TRAIN, "--objective", "mart", "--beta", "nan"), "beta must be a number"),
        ((*TRAIN, "--batch-size", "1"), "a batch of 1 image has no statistics"),
        ((*TRAIN, "--resume", "-o", "TMP"), "holds no training to resume"),
        (("train", "--data", "digits", "--epsilon", "nan"), "--epsilon must be a number"),
        (("evaluate", "ARTIFACT", "--data", "digits", "--step-size", "-1/255"), "--step-size must be"),
        (("evaluate", "ARTIFACT", "--data", "digits", "--epsilon", "inf"), "--epsilon must be a number"),
        (("finetune", "ARTIFACT", "--data", "digits", "--steps", "1", "--epochs", "1"), "not both"),
        (("finetune", "ARTIFACT", "--data", "digits", "--learning-rate", "nan"), "must be a positive number"),
        (("inspect", "ARTIFACT/manifest.json"), "is a file of an artifact: give the folder, ARTIFACT"),
        (("inspect", "FILE"), "is a file, and an artifact is a folder or a .tar"),
        (("finetune", "TRAINED", "--data", "digits"), "with `edge-bcs export --checkpoint 'TRAINED'`"),
        (("train", "--data", "digits", "-o", "FILE"), "FILE is a file; choose a folder."),
        (("plot", "FINETUNED", "-o", "FILE"), "FILE is a file; choose a folder."),
        (("simulate", "ARTIFACT", "--html", "FILE/x.html"), "FILE is a file; choose a folder."),
        (
            ("evaluate", "ARTIFACT", "--data", "digits", "--json", "FILE/x"),
            "FILE is a file; choose a folder.",
        ),
        ((*TRAIN, "-o", "ARTIFACT"), "would be taken for an artifact; choose another"),
        (("inspect", "TRAINED/checkpoint.safetensors"), "is a checkpoint, not an artifact: compile it"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tiny_artifact: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "a training"
    trained.mkdir()
    (trained / "checkpoint.safetensors").touch()
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "manifest.json").write_text("{}")
    (tuned / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    places = {
        "ARTIFACT": tiny_artifact(), "TMP": tmp_path / "run", "FILE": __file__, "TRAINED": trained,
        "FINETUNED": tuned,
    }  # fmt: skip

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    result = run(*(placed(str(argument)) for argument in arguments))
    assert result.exit_code == 1, result.output
    assert placed(message) in result.stderr and result.stderr.startswith("Error: ")
    assert not (tmp_path / "run").exists()
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith((".\n", "?\n"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "x", "--data", "digits", "--epochs", "0"), "--epochs"),
        (("export", "--seed", "9" * 30), "is not a seed"),
        (("train", "--data", "digits", "--seed", str(1 << 63)), "is not a seed"),
        (("evaluate", "x", "--data", "digits", "--seed", "-1"), "is not a seed"),
        (("bench", "--threads", "100000"), "1<=x<=1024"),
        (("train", "--data", "digits", "--threads", "5000"), "1<=x<=1024"),
        (("bench", "--calibrate", "--all", "x"), "two measurements"),
        (("targets", "raspberry-pi-4", "--toml", "--json"), "two forms"),
    ],
)
def test_a_wrong_option_is_clicks_business(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == click.UsageError.exit_code and message in result.stderr


def test_targets_and_doctor() -> None:
    boards = {board["name"]: board for board in succeed("targets")["targets"]}
    assert boards["raspberry-pi-4"]["cores"] == 4
    assert "raspberry-pi-4" in run("targets").output
    assert "4× " in run("targets", "raspberry-pi-4").output
    doctor = succeed("doctor")
    topics = {finding["topic"]: finding for finding in doctor["findings"]}
    assert doctor["usable"] and "exact byte budget" in topics["operators"]["found"]
