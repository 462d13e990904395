"""edge-bcs-run with --max-temp, on a machine whose sensors the test moves, and --print-service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import as_service, commands
from helpers import board_program as board

Make = Callable[..., Path]
TRAIN = ("--data", "digits", "--threads", 1, "--eval-samples", 0, "--max-writes", "none", "--no-augment")
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="chroot takes root on Linux"
)


class Machine:
    """A root file system with the program, an artifact and sensors."""

    def __init__(self, root: Path, artifact: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True)
        shutil.copy(board.program(), root / "edge-bcs-run")
        shutil.copytree(artifact, root / "artifact")
        for file, text in {
            "thermal/thermal_zone0/type": "cpu-thermal\n",
            "thermal/thermal_zone1/type": "PMIC-Die\n",  # which always says 100
            "thermal/thermal_zone1/temp": "100000\n",
            "hwmon/hwmon0/name": "nvme\n",  # no processor's
            "hwmon/hwmon0/temp1_input": "110000\n",
            "hwmon/hwmon1/name": "coretemp\n",
            "hwmon/hwmon1/temp2_input": "31000\n",
            "hwmon/hwmon1/temp2_label": "Package id 0\n",
            "hwmon/hwmon1/temp3_input": "what?\n",
        }.items():
            (root / "sys/class" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "sys/class" / file).write_text(text)

    def becomes(self, sensor: str, celsius: float) -> None:
        """Let a sensor show a temperature; in one piece, as the kernel's do."""
        file = self.root / "sys/class" / sensor
        file.with_name("new").write_text(f"{1000 * celsius:.0f}\n")
        file.with_name("new").rename(file)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        words = ["/edge-bcs-run", "finetune", "/artifact", *map(str, (*TRAIN, *arguments))]
        return subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env={}, preexec_fn=lambda: os.chroot(self.root)
        )


@pytest.fixture
def machine(tiny_artifact: Make, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root", tiny_artifact())


def told(process: subprocess.Popen[str], beginning: str) -> str:
    """The next line of standard error that begins like this."""
    assert process.stderr is not None
    lines: Iterator[str] = iter(process.stderr.readline, "")
    return next(line for line in lines if line.startswith(beginning))


@needs_root
def test_a_training_pauses_until_it_is_cool(machine: Machine, tiny_artifact: Make, tmp_path: Path) -> None:
    cpu = "thermal/thermal_zone0/temp"
    machine.becomes(cpu, 60)  # not above the limit less 5
    machine.becomes("hwmon/hwmon1/temp2_input", 71.4)
    process = machine.start("--steps", 4, "--max-temp", 65)
    assert told(process, "paused") == "paused: coretemp Package id 0 reached 71 °C; goes on at 60 °C\n"
    machine.becomes("hwmon/hwmon1/temp2_input", 60)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    report = json.loads((machine.root / "artifact-run" / "report.json").read_text())
    assert report["training"]["finished"] and report["training"]["paused_seconds"] > 0
    board.succeed("finetune", tiny_artifact(), *TRAIN, "--steps", 4, "-o", tmp_path / "cool")
    assert board.states(machine.root / "artifact-run") == board.states(tmp_path / "cool")


@needs_root
def test_a_signal_ends_a_pause_and_saves(machine: Machine) -> None:
    machine.becomes("thermal/thermal_zone0/temp", 90)
    process = machine.start("--steps", 4, "--max-temp", 65)
    assert "cpu-thermal reached 90 °C" in told(process, "paused")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    run = machine.root / "artifact-run"
    assert json.loads((run / "report.json").read_text())["stopped"] == {"by": "SIGTERM", "step": 0}
    machine.becomes("thermal/thermal_zone0/temp", 40)
    after = machine.start("--steps", 4, "--max-temp", 65, "--resume")
    assert after.wait(timeout=60) == 0


@needs_root
def test_a_pause_ends_with_the_hours(machine: Machine) -> None:
    machine.becomes("thermal/thermal_zone0/temp", 90)
    process = machine.start("--steps", 4, "--max-temp", 65, "--max-hours", 1e-5)
    process.communicate(timeout=60)
    assert process.returncode == 75


@needs_root
def test_a_machine_without_sensors_says_so(machine: Machine) -> None:
    shutil.rmtree(machine.root / "sys")
    process = machine.start("--steps", 4, "--max-temp", 65)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "shows no temperature in /sys/class/thermal" in error


def test_a_limit_that_makes_no_sense_is_refused(tiny_artifact: Make, tmp_path: Path) -> None:
    given = ("finetune", tiny_artifact(), *TRAIN, "--steps", 1, "-o", tmp_path / "run", "--max-temp", 20)
    sentence = "the highest temperature must lie between 30 and 120 °C, not 20."
    assert board.refused(*given) == sentence and sentence in commands.run(*given).output


def key(file: Path) -> Path:
    """A public key, of nobody."""
    text = "MCowBQYDK2VwAyEA" + 43 * "A" + "="
    file.write_text(f"-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    return file


def service(result: str) -> tuple[list[str], list[str]]:
    """The lines of a unit but for its command, and the words of that."""
    lines = result.splitlines()
    command = next(line for line in lines if line.startswith("ExecStart="))
    return [line for line in lines[1:] if line != command], as_service.words(command[10:])


def test_the_service_is_pythons_but_for_the_program(
    tiny_artifact: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("100% $x; 'data'", "my runs", "key"):
        (tmp_path / folder).mkdir()
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    key(tmp_path / "key" / "a.pem"), key(tmp_path / "b.pem")
    given = [
        "finetune",
        tiny_artifact(),
        "--data",
        "100% $x; 'data'",
        "--class-names",
        "names.txt",
        "--epochs",
        3,
    ]
    given += [
        "--max-temp",
        "65.0",
        "--augment",
        "photo",
        "--balance",
        "--trust-key",
        "key/a.pem",
        "--trust-key",
    ]
    given += ["b.pem", "--rounds", "my share", "--board", "a", "--max-rounds", 9]
    given += ["--on-nan", "skip", "-o", "my runs/../my runs/run", "--json", "--print-service"]
    found = board.run(*given)
    assert found.returncode == 0, found.stderr
    ours, words = service(found.stdout)
    theirs, expected = service(commands.run(*given).stdout)
    assert ours == theirs
    assert Path(words[0]) == board.program().resolve() and words[1] == "finetune"
    assert words[-3:] == ["--output", str(tmp_path / "my runs" / "run"), "--resume"]
    assert sorted(words[1:]) == sorted(expected[3:])
    assert not (tmp_path / "my runs" / "run").exists()


def test_a_service_keeps_the_keys_of_the_environment(tiny_artifact: Make, tmp_path: Path) -> None:
    given = ("finetune", tiny_artifact(), "--data", "digits", "-o", tmp_path / "run", "--print-service")
    key(tmp_path / "a"), key(tmp_path / "b")
    found = board.run(*given, EDGE_BCS_TRUST_KEY=f"{tmp_path}/a:{tmp_path}/b")
    assert f" --trust-key {tmp_path}/a --trust-key {tmp_path}/b " in found.stdout
    sentence = board.refused(*given[:-2], tmp_path / "no" / "run", "--print-service")
    assert sentence.startswith(f"the folder {tmp_path / 'no'} does not exist")


@pytest.mark.skipif(not as_service.possible(), reason="needs root (CAP_SYS_ADMIN) and Linux")
def test_the_service_trains(tiny_artifact: Make, tmp_path: Path) -> None:
    """At the first boot, and at the next one it finds nothing to do."""
    artifact, run = Path(shutil.copytree(tiny_artifact(), tmp_path / "camera")), tmp_path / "runs" / "run"
    run.parent.mkdir()
    text = board.run("finetune", artifact, *TRAIN, "--steps", 3, "-o", run, "--print-service").stdout
    (tmp_path / "test.service").write_text(text)
    for _ in range(2):
        words = [sys.executable, as_service.__file__, str(tmp_path / "test.service")]
        done = subprocess.run(words, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads((run / "report.json").read_text())["training"]["step"] == 3
