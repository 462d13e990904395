"""The systemd service of `edge-bcs finetune`, started as systemd would start it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from edge_bcs.runtime import archive
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers import as_service

import edge_bcs
from edge_bcs.cli import main
from edge_bcs.data import open_data

Make = Callable[..., Path]
needs_root = pytest.mark.skipif(not as_service.possible(), reason="needs root (CAP_SYS_ADMIN) and Linux")


def unit(*arguments: object) -> str:
    words = ["finetune", *arguments, "--print-service"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def start(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Start a unit; its file lies in ``folder``."""
    file = folder / "test.service"
    file.write_text(text)
    return subprocess.run(
        [sys.executable, as_service.__file__, str(file)],
        env={"PYTHONPATH": str(Path(edge_bcs.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def signed_archive(folder: Path, name: str, keys: Path) -> tuple[Path, Path]:
    """Pack a folder into a signed archive beside it; return that and the public key."""
    pytest.importorskip("cryptography")
    from helpers.signing import make_key, sign

    private, public = make_key(keys, "maker")
    sign(folder, private)
    file = folder.parent / f"{name}.tar"
    with file.open("wb") as stream:
        archive.pack(folder, stream, name)
    return file, public


@needs_root
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_the_service_trains(tiny_artifact: Make, tmp_path: Path, form: str) -> None:
    """From a folder or a signed archive: it trains to the end, and at the next boot finds nothing to do."""
    given, runs = tmp_path / "what was given", tmp_path / "my runs"
    given.mkdir()
    runs.mkdir()
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(64))
    np.savez(given / "100% $x.npz", x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    artifact: Path = shutil.copytree(tiny_artifact(), given / "camera")
    trust: tuple[object, ...] = ()
    if form == "archive":
        artifact, key = signed_archive(artifact, "camera", given)
        trust = ("--trust-key", key)
        shutil.rmtree(given / "camera")
    before = {file: file.read_bytes() for file in given.rglob("*") if file.is_file()}
    options = ("--data", given / "100% $x.npz", "--eval-samples", 4, "--eval-steps", 1, "--threads", 1)
    text = unit(artifact, *options, *trust, "--steps", 3, "-o", runs / "run")
    for _ in range(2):
        done = start(tmp_path, text)
        assert done.returncode == 0, done.stderr
        assert int(read_state(Artifact.read(runs / "run"))[1]["step"]) == 3
    assert [file.name for file in runs.iterdir()] == ["run"]
    assert before == {file: file.read_bytes() for file in given.rglob("*") if file.is_file()}


CONFINED = {
    "writes to /tmp": "open('/tmp/edge-bcs-test', 'w')",
    "writes beside the run's folder": "open(FOLDER + '/x', 'w')",
    "writes to its home": "import os; open(os.path.expanduser('~/x'), 'w')",
    "sets the kernel": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "connects": "import socket; socket.create_connection(('127.0.0.1', 1), 1)",
    "looks for telemetry": "import os; assert 'ORT_DISABLE_TELEMETRY' not in os.environ",
    "reads the caller's variables": "import os; os.environ['EDGE_BCS_CONFIG']",
}


@needs_root
def test_the_service_may_not_do_anything_else(tmp_path: Path) -> None:
    """What the test above rests on: the same unit with another command."""
    (tmp_path / "runs").mkdir()
    text = unit(tmp_path / "camera", "--data", "digits", "-o", tmp_path / "runs" / "run")
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))

    def run(code: str) -> subprocess.CompletedProcess[str]:
        code = code.replace("FOLDER", repr(str(tmp_path)))
        return start(tmp_path, text.replace(command, f'ExecStart={sys.executable} -c "{code}"'))

    good = "import os; open(FOLDER + '/runs/x', 'w'); open(os.environ['EDGE_BCS_CACHE'] + '/x', 'w')"
    assert (run(good).returncode, run(good).stderr) == (0, "")
    assert (tmp_path / "runs" / "x").exists() and not Path("/var/cache/edge-bcs/x").exists()
    for what, code in CONFINED.items():
        assert run(code).returncode == 1, what
    for user, expected in (("root", 1), ("nobody", 0)):
        as_user = text.replace("User=root", f"User={user}")
        other = start(tmp_path, as_user.replace(command, 'ExecStart=/bin/sh -c "test $$(id -u) -ne 0"'))
        assert other.returncode == expected, other.stderr
    unknown = start(tmp_path, text.replace("PrivateNetwork=yes", "PrivateNetwork=yes\nPrivateUsers=yes"))
    assert unknown.returncode == 1 and "PrivateUsers" in unknown.stderr


def test_a_service_that_could_not_start_is_not_printed(tmp_path: Path) -> None:
    """systemd refuses a unit that may write to a folder which is not there, and says only "NAMESPACE"."""
    words = ["finetune", "camera", "--data", "digits", "-o", str(tmp_path / "a" / "b"), "--print-service"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and f"the folder {tmp_path / 'a'} does not exist" in result.output
    assert not (tmp_path / "a").exists()
