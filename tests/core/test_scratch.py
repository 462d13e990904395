"""Temporary folders: gone with their object, and those of killed processes gone with the next."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edge_bcs.core.scratch import ScratchFolder

TESTS = Path(__file__).parents[1]
KILLED = """
import os, signal
from edge_bcs.core.scratch import ScratchFolder
folder = ScratchFolder("train")
(folder.path / "artifact").mkdir()
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def killed() -> Path:
    """The folder of a process that was killed."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    assert done.returncode < 0, done.stderr
    return Path(done.stdout.strip())


def test_it_is_gone_with_its_object(temporary: Path) -> None:
    folder = ScratchFolder("train")
    (folder.path / "inside").mkdir()
    assert folder.path.parent == temporary and folder.path.stat().st_mode & 0o77 == 0
    folder.remove()
    folder.remove()
    assert not any(temporary.iterdir())
    path = ScratchFolder("train").path
    assert not path.exists()


def test_what_a_killed_process_left_goes_with_the_next(temporary: Path) -> None:
    abandoned = killed()
    assert (abandoned / "artifact").is_dir()
    mine = ScratchFolder("cache")
    assert list(temporary.iterdir()) == [mine.path]
    other = ScratchFolder("train")  # of a process that lives
    assert {*temporary.iterdir()} == {mine.path, other.path}


def test_what_tests_compile_and_read_is_gone_after_them(temporary: Path) -> None:
    """Hundreds of runs filled the disk."""
    code = (
        "import runpy, sys\n"
        "from helpers import programs\n"
        "program = programs.compiled('run_operator')\n"
        "readers = runpy.run_path(sys.argv[1])\n"
        "print(program.parent.is_dir(), readers['_PLACE'].is_dir())"
    )
    command = [sys.executable, "-c", code, str(TESTS / "fuzz" / "readers.py")]
    environment = {**os.environ, "CXX": "true", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "True"]
    assert not any(temporary.iterdir())


def test_what_is_not_known_to_be_abandoned_stays(temporary: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    locked = killed()
    unlike = [
        temporary / "edge-bcs-train-x1y2",  # of an earlier version
        temporary / f"edge-bcs-train-{2**31 - 1}-without_a_lock",
        temporary / "edge-bcs-notes",
    ]
    for folder in unlike:
        folder.mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".edge-bcs.lock").touch()
    link = temporary / f"edge-bcs-train-{2**31 - 1}-link"
    link.symlink_to(elsewhere)
    with (locked / ".edge-bcs.lock").open("rb") as stream:  # the process of another container
        fcntl.flock(stream, fcntl.LOCK_EX)
        mine = ScratchFolder("train")
        assert {*temporary.iterdir()} == {mine.path, locked, elsewhere, link, *unlike}
    assert os.listdir(elsewhere) == [".edge-bcs.lock"]
    ScratchFolder("train")
    assert not locked.exists()
