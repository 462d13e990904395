"""`edge-bcs finetune` left alone on a board: signals, limits, faults, its service; and the doctor."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime import fit as fit_module
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.board.saving import MetricsFile
from edge_bcs.runtime.state import read_state
from helpers.commands import run

from edge_bcs.core import machine as machine_module
from edge_bcs.data import open_data

Make = Callable[..., Path]


def state(run_folder: Path) -> tuple[dict[str, Any], int]:
    tensors, metadata = read_state(Artifact.read(run_folder))
    return tensors, int(metadata["step"])


def test_the_steps_of_this_run_are_counted(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    """Not those of the checkpoint that the artifact was exported from; and of them, those of this call."""
    options = ("--data", digits, "--eval-samples", 0)
    assert run("finetune", tiny_artifact(), *options, "--steps", 6, "-o", tmp_path / "a").exit_code == 0
    again = run("finetune", tmp_path / "a", *options, "--steps", 5, "-o", tmp_path / "b")
    assert "\n5 steps of " in "\n" + again.stdout and state(tmp_path / "b")[1] == 11
    longer = run("finetune", tmp_path / "a", *options, "--steps", 7, "-o", tmp_path / "b", "--resume")
    assert "7 steps (2 of them now) of " in longer.stdout
    done = run("finetune", tmp_path / "a", *options, "-o", tmp_path / "b", "--resume", "--json")
    assert json.loads(done.stdout)["training"]["step"] == 13  # nothing was left to do


def test_a_run_that_goes_on_from_the_save_before_says_so(
    tiny_artifact: Make, tmp_path: Path, digits: Path
) -> None:
    common = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0, "-o", tmp_path / "run")
    # Saved when it begins and when it ends, however long that takes.
    assert run(*common, "--steps", 2, "--save-seconds", 10**6).exit_code == 0
    newest = tmp_path / "run" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    again = run(*common, "--steps", 3, "--resume")
    assert again.exit_code == 0 and state(tmp_path / "run")[1] == 3
    told = [line for line in again.stderr.splitlines() if "state.safetensors" in line]
    assert len(told) == 1 and "cannot be used" in told[0] and told[0].endswith("is used, of step 0.")


@pytest.mark.parametrize("above", ["", "train/"])
def test_a_run_among_the_class_folders_of_its_data_is_refused(
    tiny_artifact: Make, tmp_path: Path, above: str
) -> None:
    image = pytest.importorskip("PIL.Image").new("L", (8, 8))
    for name in ("ant", "bee"):
        (tmp_path / "photos" / above / name).mkdir(parents=True)
        for number in range(2):
            image.save(tmp_path / "photos" / above / name / f"{number}.png")
    before = sorted(tmp_path.rglob("*"))
    for place in ("photos", f"photos/{above}run", f"photos/{above}ant/run"):
        for command in (("finetune", tiny_artifact()), ("train", "--channels", 1, "--input-size", 8)):
            result = run(*command, "--data", tmp_path / "photos", "--steps", 1, "-o", tmp_path / place)
            assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
            assert f"{tmp_path / place} lies among the class folders of " in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # Beside the photographs, or beside their folders train and test, it is in nobody's way.
    beside = tmp_path / ("photos/run" if above else "photos-run")
    common = ("finetune", tiny_artifact(), "--class-names", "ant,bee,c,d,e,f,g,h,i,j", "--batch-size", 4)
    again = ("--data", tmp_path / "photos", "--steps", 1, "--eval-samples", 0, "-o", beside)
    for resume in ((), ("--resume",)):
        result = run(*common[: 2 if resume else None], *again, *resume)
        assert result.exit_code == 0, result.output


def test_what_is_written_an_hour_is_said(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    common = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0, "--steps", 3)
    result = run(*common, "-o", tmp_path / "a", "--max-writes", "1MiB/h", "--json")
    assert "an hour (--max-writes allows 1.0 MiB)" in result.stderr
    writes = json.loads(result.stdout)["training"]["writes"]
    assert writes["max_bytes_per_hour"] == 1 << 20 >= writes["bytes_per_hour"] > 0
    assert "an hour at this pace" in run(*common, "-o", tmp_path / "b").stdout


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_save_and_exit(
    tiny_artifact: Make, tmp_path: Path, digits: Path, name: str, status: int
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "edge_bcs.cli", "finetune", str(tiny_artifact()), "--json"]
    command += ["--steps", "100000", "--data", str(digits), "--eval-samples", "0", "-o", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, name))
    answer, message = process.communicate(timeout=60)
    saved, step = state(folder)
    assert process.returncode == status and f"Stopped by {name}" in message
    assert json.loads(answer)["stopped"] == {"by": name, "step": step}
    expected = after(step, tiny_artifact(), digits, total=100_000)
    assert all((saved[tensor] == expected[tensor]).all() for tensor in expected)


def test_a_signal_where_the_state_cannot_be_saved(
    tiny_artifact: Make, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not saved, so the status is not the one that says it was; what was saved before is whole."""

    def fit(self: Trainer, *_: Any, on_wait: Callable[[str], None], **__: Any) -> None:
        self.buffers["batchnorm.variance"][0] = np.inf
        os.kill(os.getpid(), signal.SIGTERM)
        on_wait("")

    monkeypatch.setattr(Trainer, "fit", fit)
    result = run("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0, "-o", tmp_path / "run")
    assert result.exit_code == 1
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("Error: stopped by SIGTERM after step 0, but the state was not saved to ")
    assert sentence.endswith("holds inf, which is not finite; earlier saves are kept.")
    assert state(tmp_path / "run")[1] == 0


def after(step: int, artifact: Path, digits: Path, total: int) -> dict[str, Any]:
    """The state of a training of ``total`` steps that nothing disturbs, at one of them."""
    with Trainer(artifact) as trainer:

        def stop(record: dict[str, Any]) -> None:
            if record["step"] == step:
                raise StopIteration

        if step:
            with pytest.raises(StopIteration):
                trainer.fit(open_data(digits, "train", (1, 8, 8)), steps=total, progress=False, on_step=stop)
        return trainer.state()


def test_a_signal_while_accuracy_is_measured(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    """Before the first step: the run is there, and begins with --resume."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "edge_bcs.cli", "finetune", str(tiny_artifact()), "--steps", "2"]
    command += ["--data", str(digits), "--eval-samples", "16", "-o", str(folder)]
    process = subprocess.Popen([*command, "--eval-steps", "1000000"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # "Measuring accuracy …"
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)  # asked twice, it leaves what it is doing
    assert process.wait(timeout=60) not in (0, None)
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run([*command, "--eval-steps", "1", "--resume"], capture_output=True, check=False)
    assert done.returncode == 0


def test_the_time_is_up(
    tiny_artifact: Make, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call after the other with a limit of time, until the last one finishes: the same state."""
    seconds = itertools.count()  # each look at the clock finds it a second later
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)), perf_counter=time.perf_counter)
    monkeypatch.setattr(fit_module, "time", clock)
    common = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 8, "--eval-steps", 1)
    common = (*common, "--steps", 30, "--json")
    folder, calls, steps = tmp_path / "run", 0, 0
    while True:
        limit = "0.003" if calls < 2 else "1"  # hours
        result = run(*common, "-o", folder, "--resume", "--max-hours", limit)
        report = json.loads(result.stdout)
        calls += 1
        steps += report["training"]["steps"]
        if result.exit_code == 0:
            break
        assert result.exit_code == 75 and report["stopped"]["by"] == "--max-hours"
        assert "go on with --resume" in result.stderr and "after" not in report
        assert report["stopped"]["step"] == state(folder)[1]
    assert calls == 3 and steps == 30 and "stopped" not in report and "after" in report
    assert run(*common, "-o", tmp_path / "whole").exit_code == 0
    whole, parts = state(tmp_path / "whole")[0], state(folder)[0]
    assert all((whole[tensor] == parts[tensor]).all() for tensor in whole)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def killed_after(lines: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A training ends, without saving, once it has written so many lines of metrics."""
    write, written = MetricsFile.write, itertools.count(1)

    def write_and_die(self: MetricsFile, record: Any) -> None:
        write(self, record)
        if next(written) == lines:
            raise SystemExit(137)

    monkeypatch.setattr(MetricsFile, "write", write_and_die)
    return monkeypatch


def test_killed_before_the_first_save_each_step_is_in_the_metrics_once(
    tiny_artifact: Make, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0, "--steps", 40)
    common = (*common, "-o", tmp_path / "run", "--save-seconds", 3600)
    with monkeypatch.context() as patch:
        killed_after(17, patch)
        assert run(*common).exit_code == 137
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 17 and state(tmp_path / "run")[1] == 0
    assert run(*common, "--resume").exit_code == 0
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert lines == list(range(1, 41))


def test_begun_anew_each_step_is_in_the_metrics_once(
    tiny_artifact: Make, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was saved, there is nothing to resume; the lines in the run folder are still those of it.
    A file elsewhere belongs to whoever named it, and keeps what it has."""
    data = open_data(digits, "train", (1, 8, 8))
    folder = tmp_path / "run"
    folder.mkdir()
    options: dict[str, Any] = {"steps": 6, "progress": False, "save": folder, "save_seconds": 3600.0}
    for metrics, expected in (
        (folder / "metrics.jsonl", list(range(1, 7))),
        (tmp_path / "mine.jsonl", [*range(1, 5), *range(1, 7)]),
    ):
        with monkeypatch.context() as patch, Trainer(tiny_artifact()) as trainer:
            killed_after(4, patch)
            with pytest.raises(SystemExit):
                trainer.fit(data, metrics=metrics, **options)
        with Trainer(tiny_artifact()) as trainer:
            trainer.fit(data, metrics=metrics, **options)
        assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == expected
        shutil.rmtree(folder)
        folder.mkdir()


def spoiled(digits: Path) -> Path:
    with np.load(digits) as stored:
        arrays = dict(stored)
    arrays["x_train"][20, 0, 4, 4] = np.nan
    np.savez(digits.with_name("spoiled.npz"), **arrays)
    return digits.with_name("spoiled.npz")


def test_a_pixel_that_is_not_finite(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    data, folder = spoiled(digits), tmp_path / "run"
    common = ("finetune", tiny_artifact(), "--data", data, "--eval-samples", 0, "--epochs", 2, "-o", folder)
    stopped = run(*common)
    assert stopped.exit_code == 1 and "image 20 of the data has a pixel" in stopped.stderr
    assert (
        f"--resume -o {folder}, adding --on-nan skip" in stopped.stderr and "Traceback" not in stopped.stderr
    )
    again = run(*common, "--resume", "--on-nan", "skip")
    assert again.exit_code == 0 and "not finite: 2;" in again.stdout and state(folder)[1] == 8
    assert again.stderr.count("skipped: in step") == 2


def test_a_pause_for_heat_is_told(
    tiny_artifact: Make, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "root/sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("90000")
    real, readings = machine_module.ThisMachine.temperatures, 0

    def temperatures(self: machine_module.ThisMachine) -> Any:
        nonlocal readings
        readings += 1
        if readings == 3:
            (zone / "temp").write_text("50000")
        self.root = tmp_path / "root"
        return real(self)

    open_data(digits, "train", (1, 8, 8))  # decoded already: that would pause, too
    monkeypatch.setattr(machine_module.ThisMachine, "temperatures", temperatures)
    common = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0, "--steps", 2)
    result = run(*common, "-o", tmp_path / "run", "--max-temp", 75)
    assert result.exit_code == 0 and "Paused for " in result.stdout
    assert result.stderr.count("paused: thermal_zone0 reached 90 °C; goes on at 70 °C") == 1
    readings = 0  # it is hot again while accuracy is measured
    (zone / "temp").write_text("90000")
    measured = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 4, "--steps", 1)
    result = run(*measured, "-o", tmp_path / "measured", "--max-temp", 75)
    before, after = result.stderr.split("Measuring accuracy before")[1].split("Saves ")
    assert result.exit_code == 0 and "paused: thermal_zone0" in before and "paused" not in after
    (zone / "temp").unlink()
    refused = run(*common, "-o", tmp_path / "other", "--max-temp", 75)
    assert refused.exit_code == 1 and "shows no temperature" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-writes", "much"), "is not a size"),
        (("--max-temp", "500"), "between 30 and 120 °C"),
        (("--max-temp", "nan"), "between 30 and 120 °C"),
    ],
)
def test_impossible_limits_are_one_sentence(
    tiny_artifact: Make, tmp_path: Path, digits: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("finetune", tiny_artifact(), "--data", digits, "-o", tmp_path / "run", *options)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--save-steps", "0"), ("--save-seconds", "0"), ("--max-hours", "0"), ("--on-nan", "hope"),
     ("--max-temp", "hot")],
)  # fmt: skip
def test_wrong_options_are_clicks_business(option: str, value: str) -> None:
    result = run("finetune", "x", "--data", "digits", option, value)
    assert result.exit_code == click.UsageError.exit_code and option in result.stderr


# The service


def service(tmp_path: Path, *options: object) -> str:
    result = run("finetune", tmp_path / "my art", "--data", tmp_path / "100% $x", *options, "--print-service")
    assert result.exit_code == 0, result.output
    return result.stdout


def verified(file: Path) -> str:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr + ("" if done.returncode == 0 else "failed")


def test_the_service_says_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = service(tmp_path, "--max-temp", 75, "--no-augment", "-o", "run", "--steps", 4)
    assert "@" not in text.split("[Unit]")[1]
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert command.startswith(f"ExecStart={sys.executable} -m edge_bcs.cli finetune ")
    assert f'"{tmp_path}/my art" --data "{tmp_path}/100%% $$x" ' in command
    assert command.endswith(f"--steps 4 --no-augment --max-temp 75.0 --output {tmp_path}/run --resume")
    assert f"ReadWritePaths={tmp_path}\n" in text


def test_the_service_of_a_board_that_meets_others_may_write_where_they_meet(tmp_path: Path) -> None:
    share = tmp_path / "the share"
    text = service(tmp_path, "--rounds", share, "--board", "a", "--boards", 3, "-o", tmp_path / "run")
    assert f'ReadWritePaths={tmp_path} "{share}"\n' in text
    assert f'RequiresMountsFor="{tmp_path}/my art"' in text and f'"{share}"\n' in text.split("[Service]")[0]
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert f'--rounds "{share}" --board a --boards 3 ' in command


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_service(tmp_path: Path) -> None:
    file = tmp_path / "edge-bcs-finetune.service"
    text = service(tmp_path, "--max-hours", 2, "-o", tmp_path / "a run's folder")
    file.write_text(text)
    assert verified(file) == ""
    file.write_text(text.replace("ProtectSystem=strict", "ProtectSystem=very"))
    assert "ignoring: very" in verified(file)  # it would have said so


def test_the_command_of_the_service_runs(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    """Started twice, as after a boot: it trains, then finds nothing left to do."""
    options = ("--data", digits, "--steps", 2, "--eval-samples", 0, "-o", tmp_path / "run")
    text = run("finetune", tiny_artifact(), *options, "--print-service").stdout
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    for _ in range(2):
        done = subprocess.run(command.removeprefix("ExecStart=").split(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert state(tmp_path / "run")[1] == 2


# The doctor


def test_the_doctor_looks_at_the_folder_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("doctor", "-o", tmp_path / "not yet", "--json").stdout)
    topics = {finding["topic"]: finding for finding in found["findings"]}
    assert found["usable"]
    wanted = {"onnxruntime", "operators", "cores", "temperature", "throttling", "memory", "swap", "disk"}
    assert wanted <= set(topics)
    assert "to the byte" in topics["onnxruntime"]["found"]

    monkeypatch.setattr(
        machine_module.ThisMachine,
        "medium",
        lambda self, folder: machine_module.Medium("SD card", "ext4", 1 << 30, False, True, "/data"),
    )
    result = run("doctor", "-o", tmp_path)
    assert result.exit_code == 1 and "✗ disk" in result.stdout
    assert "sudo mount -o remount,rw /data" in result.stdout


def test_the_doctor_says_that_runs_need_a_folder(tmp_path: Path, digits: Path) -> None:
    result = run("doctor", "-o", digits)
    assert result.exit_code == 1 and f"{digits} is a file" in result.stdout
