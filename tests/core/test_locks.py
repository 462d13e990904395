"""One writer at a time in a folder: two trainings, however they are started, and what a crash leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import LOCK, FolderLock
from edge_bcs.data import open_data

Make = Callable[..., Path]
HOLD = "import sys, time; from edge_bcs.core.locks import FolderLock; lock = FolderLock(sys.argv[1])"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `run` until it is killed."""
    code = HOLD + "; print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_process_at_a_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """The sentence names the folder and the process; killed, it holds nothing; nothing of it is left."""
    folder = tmp_path / "run"
    with pytest.raises(EdgeBcsError, match=rf"{folder} is being written by process {holder.pid}: wait"):
        FolderLock(folder)
    holder.kill()
    holder.wait()
    assert (folder / LOCK).exists()  # what a crash leaves
    with FolderLock(folder):
        assert int((folder / LOCK).read_text().split()[0]) == os.getpid()
        assert subprocess.run(
            [sys.executable, "-c", HOLD, str(folder)], capture_output=True, check=False
        ).returncode
    assert list(folder.iterdir()) == []
    subprocess.run([sys.executable, "-c", HOLD, str(folder)], check=True)


def test_within_a_process_the_last_release_counts(tmp_path: Path) -> None:
    def others() -> int:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "a" / "b")]
        return subprocess.run(command, capture_output=True, check=False).returncode

    outer = FolderLock(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with FolderLock(tmp_path / "link" / "b"), pytest.raises(EdgeBcsError, match="by this process"):
        FolderLock(tmp_path / "a" / "b", again=False)
    assert others() == 1
    outer.release()
    outer.release()
    assert not (tmp_path / "a").exists()  # folders that were made go again if nothing came into them
    kept = FolderLock(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "state").write_text("saved")
    kept.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["state"] and others() == 0


def test_a_folder_that_was_deleted_and_made_again_is_locked_again(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    second = FolderLock(tmp_path / "run")
    first.release()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    second.release()
    assert not (tmp_path / "run").exists()


@contextmanager
def as_another_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process holds is not its own: flock keeps two open files apart, whoever opened them."""
    number = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: number + 1)
        yield


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"12 ", b"x y\n", b"1\n2\n3\n", b"9" * 5000])
def test_a_holder_that_cannot_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    with FolderLock(tmp_path), as_another_process(monkeypatch):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(EdgeBcsError, match="being written by another process: wait"):
            FolderLock(tmp_path)


def test_a_holder_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FolderLock(tmp_path), as_another_process(monkeypatch):
        (tmp_path / LOCK).write_text("12 board-7\n")
        with pytest.raises(EdgeBcsError, match="by process 12 on board-7: wait"):
            FolderLock(tmp_path)


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_flock_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: int
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", refuse)
    spec = find_spec("edge_bcs.core.locks")
    assert spec is not None and spec.loader is not None
    fresh = module_from_spec(spec)  # as at the beginning of a process, in which nothing was said
    spec.loader.exec_module(fresh)
    for name in ("a", "b"):
        with fresh.FolderLock(tmp_path / name):
            (tmp_path / name / "state").write_text("saved")
            assert [path.name for path in (tmp_path / name).iterdir()] == ["state"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"nothing can be locked in {tmp_path} ({os.strerror(fault)})" in said


def test_where_locks_want_a_file_that_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does."""
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path):
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_what_lies_in_the_place_of_the_lock_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    FolderLock(tmp_path / "run").release()
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "run" / LOCK).is_symlink()
    (tmp_path / "file").write_text("mine")
    FolderLock(tmp_path / "file").release()
    FolderLock(tmp_path / "file" / "deeper").release()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_releases_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    process = os.fork()
    if not process:
        lock.release()
        os._exit(0)
    os.waitpid(process, 0)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    assert (tmp_path / LOCK).exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    lock.release()


# Trainings on the board


def test_a_trainer_holds_what_it_saves_into(
    tiny_artifact: Make, tmp_path: Path, batch: tuple[Any, Any], holder: subprocess.Popen[str]
) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    message = rf"run is being written by process {holder.pid}"
    with Trainer(tiny_artifact()) as trainer:
        with pytest.raises(EdgeBcsError, match=message):
            trainer.save(tmp_path / "run")
        with pytest.raises(EdgeBcsError, match=message):  # before its first step, not at its first save
            trainer.fit(data, steps=1, progress=False, save=tmp_path / "run")
        assert trainer.steps == 0 and [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        holder.kill()
        holder.wait()
        for folder in ("run", "other", "run"):  # several, and one after the other
            trainer.step(*batch)
            trainer.save(tmp_path / folder)
        for folder in ("run", "other"):
            command = [sys.executable, "-c", HOLD, str(tmp_path / folder)]
            assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        assert Artifact.read(tmp_path / "run").kappa == trainer.artifact.kappa  # readers may
    for folder in ("run", "other"):
        assert not (tmp_path / folder / LOCK).exists()
        subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / folder)], check=True)
    with Trainer.resume(tmp_path / "run") as trainer:  # in the same process
        assert trainer.steps == 3
        trainer.fit(data, steps=1, progress=False, save=tmp_path / "run")


def test_a_run_that_was_trained_on_since_it_was_opened_is_kept(
    tiny_artifact: Make, tmp_path: Path, batch: tuple[Any, Any]
) -> None:
    """Opened by two processes, one after the other: the later one trains, then the earlier one saves."""
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        trainer.step(*batch)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        trainer.step(*batch)
        write_run(tmp_path / "run", trainer.artifact, trainer.state(), {"step": "40", "seed": "0"})
        for _ in range(2):
            with pytest.raises(EdgeBcsError, match="run is at step 40 and was at 1 when it was opened"):
                trainer.save(tmp_path / "run")
            with pytest.raises(EdgeBcsError, match="another process trained on"):
                trainer.fit(data, steps=1, progress=False, save=tmp_path / "run")
        assert read_state(Artifact.read(tmp_path / "run"))[1]["step"] == "40"
        assert not (tmp_path / "run" / LOCK).exists()
        trainer.save(tmp_path / "other")
    with Trainer.resume(tmp_path / "run") as trainer:
        for _ in range(2):
            trainer.step(*batch)
            trainer.save(tmp_path / "run")
        assert trainer.steps == 42


def test_a_trainer_that_is_refused_a_folder_leaves_nothing_in_it(tiny_artifact: Make, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "app"}')
    with Trainer(tiny_artifact()) as trainer:
        for folder in (tmp_path / "app", tiny_artifact()):
            before = sorted(path.name for path in folder.iterdir())
            with pytest.raises(EdgeBcsError):
                trainer.save(folder)
            assert sorted(path.name for path in folder.iterdir()) == before


def test_reading_a_run_that_is_being_trained(
    tiny_artifact: Make, tmp_path: Path, batch: tuple[Any, Any], digits: Path
) -> None:
    """Evaluated, inspected, simulated, exported and trained on elsewhere, while another process holds it."""
    with Trainer(tiny_artifact()) as trainer:
        trainer.step(*batch)
        trainer.save(tmp_path / "run")
    code = HOLD + "; print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        evaluate = ("evaluate", tmp_path / "run", "--data", digits, "--attack", "none")
        for words in (
            evaluate, ("inspect", tmp_path / "run"), ("simulate", tmp_path / "run", "--no-run"),
            ("finetune", tmp_path / "run", "--data", digits, "--steps", 1, "--eval-samples", 0,
             "-o", tmp_path / "next"),
        ):  # fmt: skip
            result = run(*words)
            assert result.exit_code == 0, result.output
        process.kill()
    assert read_state(Artifact.read(tmp_path / "next"))[1]["step"] == "2"


def test_two_finetunings_of_one_folder(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    """The second is told who trains; killed with -9, the first holds nothing, and the run goes on from its
    last save; each step is in the metrics once."""
    folder = tmp_path / "run"
    words = [
        "finetune",
        str(tiny_artifact()),
        "--data",
        str(digits),
        "--eval-samples",
        "0",
        "-o",
        str(folder),
    ]
    words += ["--save-steps", "1", "--max-writes", "none"]
    command = [sys.executable, "-m", "edge_bcs.cli", *words, "--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        for more in ([], ["--resume"]):
            second = run(*words, "--steps", 25, *more)
            assert second.exit_code == 1 and second.stderr.count("\n") == 1
            assert f"{folder} is being written by process {process.pid}" in second.stderr
        process.send_signal(signal.SIGKILL)
    saved = int(read_state(Artifact.read(folder))[1]["step"])
    result = run(*words, "--steps", saved + 3, "--resume")
    assert result.exit_code == 0, result.output
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 4))
    names = sorted(path.name for path in folder.iterdir())
    graphs = [f"{graph}_model.onnx" for graph in ("attack", "eval", "lists", "optimizer", "training")]
    others = [
        "manifest.json",
        "metrics.jsonl",
        "program.bin",
        "report.json",
        "state.previous.safetensors",
        "state.safetensors",
    ]
    assert names == sorted([*graphs, *others])


def test_a_finetuning_that_cannot_begin_leaves_no_folder(tiny_artifact: Make, tmp_path: Path) -> None:
    words = ("finetune", tiny_artifact(), "--data", tmp_path / "none.npz", "-o", tmp_path / "runs" / "a")
    assert run(*words).exit_code == 1 and not (tmp_path / "runs").exists()
    assert run("finetune", tmp_path / "none", *words[2:]).exit_code == 1 and not (tmp_path / "runs").exists()


# Trainings on the host


def test_two_trainings_of_one_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    pytest.importorskip("torch")
    from helpers.training import SHORT, tiny
    from helpers.training import digits as images

    import edge_bcs
    from edge_bcs.comparators import METHODS, Phases, PhaseSettings
    from edge_bcs.training import loop as training

    def train(resume: bool = False) -> dict[str, Any]:
        sparse = edge_bcs.sparsify(tiny(), 0.9)
        output = edge_bcs.Output(tmp_path / "run", resume=resume)
        return training.train(sparse, images(40), epochs=1, output=output, **SHORT)

    for resume in (False, True):
        with pytest.raises(EdgeBcsError, match=rf"run is being written by process {holder.pid}"):
            train(resume)
    cpu = edge_bcs.Compute(device="cpu")
    settings = PhaseSettings(
        sparsity="0.9", steps=1, batch_size=16, attack=edge_bcs.Attack(steps=1), augment=False, validation=0.2
    )
    with pytest.raises(EdgeBcsError, match="is being written"):
        Phases("lwm", settings, images(40), output=tmp_path / "run", compute=cpu, progress=False)
    holder.kill()
    holder.wait()
    train()
    names = ["checkpoint.safetensors", "epochs.jsonl", "last.safetensors", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    train(resume=True)
    phases = Phases("lwm", settings, images(40), output=tmp_path / "lwm", compute=cpu, progress=False)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lwm")]
    METHODS["lwm"](tiny(), phases)  # from the first phase to the last, and after it
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    del phases
    subprocess.run(command, check=True)
