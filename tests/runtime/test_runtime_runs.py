"""Saved runs: the newest state that is whole is found again, under power cuts and on media that fail."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import state as state_module
from edge_bcs.runtime.artifact import Artifact, check_is_run_of, sha256_of
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import STATE_FAULTS, manifest, seal, state, write_artifact

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning

# Ordinary where saves are cut short at every byte; the tests of it ask for it.
pytestmark = pytest.mark.filterwarnings("ignore:the newest save of")
METADATA = {"step": "3", "seed": "7"}


def run_with(folder: Path, artifact: Artifact, steps: list[int]) -> dict[str, Any]:
    """Save one state for each step; coo.value says which."""
    tensors = state()
    for step in steps:
        tensors["coo.value"] = np.full(5, step, np.float32)
        write_run(folder, artifact, tensors, {"step": str(step), "seed": "7"})
    return tensors


def saved_step(folder: Path) -> int:
    tensors, metadata = read_state(Artifact.read(folder))
    assert np.all(tensors["coo.value"] == int(metadata["step"]))  # metadata and tensors belong together
    return int(metadata["step"])


def test_a_save_that_is_lost_is_told_with_the_step_that_is_left(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run = tmp_path / "run"
    run_with(run, artifact, [4, 5])
    (run / "state.safetensors.partial").write_bytes(b"a save that never ended: nothing is lost")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_step(run) == 5
    newest = run / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    lost = rf"^the newest save of {run} cannot be used \(state\.safetensors: .*checksum.*\); .* of step 4\.$"
    with pytest.warns(EdgeBcsWarning, match=lost):
        assert saved_step(run) == 4
    newest.unlink()
    with pytest.warns(
        EdgeBcsWarning, match=r"cannot be used \(state\.safetensors is missing\); .* of step 4\.$"
    ):
        assert saved_step(run) == 4


def test_a_run_is_an_artifact_with_the_newest_state(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1, 2, 3])
    run = Artifact.read(tmp_path / "run")
    assert (run.kappa, run.layers) == (artifact.kappa, artifact.layers)
    assert saved_step(tmp_path / "run") == 3
    shutil.rmtree(tmp_path / "a")  # nothing of the run lies elsewhere
    assert saved_step(tmp_path / "run") == 3


def test_a_torn_write_at_any_byte_falls_back_to_the_state_before(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    folder = tmp_path / "run"
    run_with(folder, artifact, [1, 2])
    newest = folder / "state.safetensors"
    whole = newest.read_bytes()
    for length in range(0, len(whole), 7):
        newest.write_bytes(whole[:length])
        assert saved_step(folder) == 1
    for position in range(0, len(whole), 3):  # a flipped bit anywhere, header and metadata included
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        newest.write_bytes(damaged)
        assert saved_step(folder) == 1
    run_with(folder, artifact, [3])  # the damaged slot is not what the next save keeps instead
    assert saved_step(folder) == 3


class PowerCutError(BaseException):
    pass


def cut_at(
    number: int, save: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *more: tuple[Any, str]
) -> bool:
    """Save, and stop before the n-th fsync or rename (or call of ``more``), leaving all files as they are at
    that moment; False if the end was reached."""
    calls = 0

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number:
                raise PowerCutError
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "fsync"), (os, "replace"), *more):
            patch.setattr(module, name, interrupted(getattr(module, name)))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # no clean-up after a power cut
        try:
            save()
        except PowerCutError:
            return True
    return False


def test_a_power_cut_at_every_system_call_loses_at_most_one_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    for number in range(100):
        folder = tmp_path / f"run{number}"
        run_with(folder, artifact, [1, 2])
        was_cut = cut_at(number, lambda folder=folder: run_with(folder, artifact, [3]), monkeypatch)  # type: ignore[misc]
        assert saved_step(folder) in (2, 3)
        run_with(folder, artifact, [4])
        assert saved_step(folder) == 4
        if not was_cut:
            break
    assert not was_cut and number >= 4  # fsync of the file, two renames, fsync of the folder


@pytest.mark.parametrize("first", range(4))
def test_what_was_read_after_a_power_cut_is_not_lost_by_the_next(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    for number in range(100):
        folder = tmp_path / f"run{number}"
        run_with(folder, artifact, [1, 2])
        assert cut_at(first, lambda folder=folder: run_with(folder, artifact, [3]), monkeypatch)  # type: ignore[misc]
        step = saved_step(folder)
        was_cut = cut_at(
            number,
            lambda folder=folder, step=step: run_with(folder, artifact, [step + 1]),  # type: ignore[misc]
            monkeypatch,
            (state_module, "write_tensors"),
        )
        assert saved_step(folder) in (step, step + 1)
        if not was_cut:
            break
    assert not was_cut and saved_step(folder) == step + 1


def test_a_power_cut_while_the_run_is_made_leaves_a_folder_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    for number in range(100):
        folder = tmp_path / f"run{number}"
        was_cut = cut_at(
            number,
            lambda folder=folder: run_with(folder, artifact, [1]),  # type: ignore[misc]
            monkeypatch,
            (Artifact, "read_file"),
        )
        run_with(folder, artifact, [2])
        assert saved_step(folder) == 2
        if not was_cut:
            break
    assert not was_cut and number > 20  # content, fsync and rename of five graphs, the manifest and the state


@pytest.mark.parametrize("slot", ["state.safetensors", "state.safetensors.partial"])
def test_blocks_that_were_never_written(tmp_path: Path, slot: str) -> None:
    """The right length, and zeros from any byte on: what some file systems leave after a power cut."""
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    folder = tmp_path / "run"
    run_with(folder, artifact, [1, 2])
    whole = (folder / "state.safetensors").read_bytes()
    left = 2 if slot.endswith("partial") else 1
    run = Artifact.read(folder)
    for position in range(0, len(whole), 3):
        if any(whole[position:]):
            (folder / slot).write_bytes(whole[:position] + b"\0" * (len(whole) - position))
            assert read_state(run)[1]["step"] == str(left)


def test_a_slot_that_breaks_an_invariant_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right; a negative variance still makes it no state."""
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    tensors = run_with(tmp_path / "run", artifact, [1])
    tensors["batchnorm.variance"] = np.full(3, -1, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "state_fault", lambda *_: None)
        state_module.write_run(tmp_path / "run", artifact, tensors, {"step": "2", "seed": "7"})
    assert saved_step(tmp_path / "run") == 1


class Failing(io.FileIO):
    """A file of which only the first ``left`` bytes can be read."""

    number, left = errno.EIO, 0

    def readinto(self, buffer: Any) -> int:
        if self.left <= 0:
            raise OSError(self.number, os.strerror(self.number))
        count = super().readinto(memoryview(buffer)[: self.left]) or 0
        self.left -= count
        return count


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("where", ["stat", "open", 0, 8, 500, 720, 780])
def test_a_slot_that_cannot_be_read_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: Any
) -> None:
    """A bad sector anywhere, a network folder that went away, a file that is not ours."""
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1, 2])
    run = Artifact.read(tmp_path / "run")
    newest = tmp_path / "run" / "state.safetensors"
    assert newest.stat().st_size > 780
    real_open, real_stat = Path.open, Path.is_file

    def opened(self: Path, *arguments: Any, **more: Any) -> Any:
        if self != newest:
            return real_open(self, *arguments, **more)
        if where == "open":
            raise OSError(number, os.strerror(number), str(self))
        stream = Failing(self)
        stream.number, stream.left = number, where
        return stream

    def is_file(self: Path) -> bool:
        if self == newest and where == "stat":
            raise OSError(number, os.strerror(number), str(self))
        return real_stat(self)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "is_file", is_file)
    tensors, metadata = read_state(run)
    assert metadata["step"] == "1" and np.all(tensors["coo.value"] == 1)
    (tmp_path / "run" / "state.previous.safetensors").write_bytes(b"")
    with pytest.raises(EdgeBcsError, match=r"state\.safetensors cannot be read: ") as caught:
        read_state(run)
    assert os.strerror(number) in str(caught.value) and "\n" not in str(caught.value)


UNREADABLE = Path("/proc/self/mem")  # a file whose first byte the kernel answers with EIO
needs_unreadable = pytest.mark.skipif(not UNREADABLE.exists(), reason="there is no file that gives EIO")


@needs_unreadable
def test_what_the_kernel_cannot_read(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1, 2])
    newest = tmp_path / "run" / "state.safetensors"
    newest.unlink()
    newest.symlink_to(UNREADABLE)
    assert saved_step(tmp_path / "run") == 1
    with pytest.raises(EdgeBcsError, match=r"^/proc/self/mem cannot be read: Input/output error\.$"):
        sha256_of(UNREADABLE)


CUT_OFF = """
import subprocess, sys
from pathlib import Path
from edge_bcs.runtime import state
from edge_bcs.runtime.artifact import Artifact
run, real = Artifact.read(sys.argv[1]), state.counters

def cut_off(metadata):
    state.counters = real
    newest = Path(sys.argv[1]) / "state.safetensors"
    subprocess.run([sys.executable, "-c", "import os, sys; os.truncate(sys.argv[1], 0)", newest], check=True)
    return real(metadata)

state.counters = cut_off  # called when the header was read and the numbers were not
print(state.read_state(run)[1]["step"])
"""


def test_a_slot_that_another_process_cuts_off_falls_back(tmp_path: Path) -> None:
    """Where a file is mapped, this is SIGBUS, and the end of the process; a bad sector is the same."""
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1, 2])
    command = [sys.executable, "-c", CUT_OFF, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_a_state_is_read_into_what_is_there(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1, 2])
    given = {name: np.zeros_like(array) for name, array in state().items()}
    tensors, _ = read_state(Artifact.read(tmp_path / "run"), given)
    assert all(tensors[name] is given[name] for name in given) and np.all(given["coo.value"] == 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("tensor", "place", "where"),
    [
        ("coo.value", 3, "conv.weight"),
        ("coo.momentum", 4, "linear.weight"),
        ("dense.value", 2, "bn.weight"),
        ("dense.momentum", 3, "rest"),
        ("batchnorm.mean", 0, "bn"),
        ("batchnorm.variance", 1, "bn"),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved(
    tmp_path: Path, value: float, tensor: str, place: int, where: str
) -> None:
    """Two such saves would leave no slot that can be read."""
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    tensors = run_with(tmp_path / "run", artifact, [1, 2])
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    tensors[tensor][place] = value
    for folder in (tmp_path / "run", tmp_path / "run", tmp_path / "new"):
        message = f"{tensor} of {where} holds {value:g}, which is not finite; earlier saves are kept"
        with pytest.raises(EdgeBcsError, match=message):
            write_run(folder, artifact, tensors, {"step": "3", "seed": "7"})
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"), [fault[1:] for fault in STATE_FAULTS[:8]], ids=[f[0] for f in STATE_FAULTS[:8]]
)
def test_what_could_not_be_read_again_is_not_saved(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    tensors = run_with(tmp_path / "run", artifact, [1])
    change(tensors)
    with pytest.raises(EdgeBcsError, match=message):
        write_run(tmp_path / "run", artifact, tensors, {"step": "2", "seed": "7"})
    assert saved_step(tmp_path / "run") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_an_artifact_that_no_file_can_be_opened_for(tmp_path: Path) -> None:
    import resource

    folder = write_artifact(tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        for read in (lambda: Artifact.read(folder), lambda: sha256_of(folder / "eval_model.onnx")):
            with pytest.raises(EdgeBcsError, match=r"(json|onnx) cannot be read: Too many open files\.$"):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("place", ["manifest.json", "eval_model.onnx", "state.safetensors"])
@pytest.mark.parametrize("call", ["open", "is_file", "stat"])
def test_a_file_of_an_artifact_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: str
) -> None:
    folder, real = write_artifact(tmp_path / "a"), getattr(Path, call)

    def failing(self: Path, *arguments: Any, **more: Any) -> Any:
        if self == folder / place:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, call, failing)
    with pytest.raises(EdgeBcsError) as caught:
        Artifact.read(folder)
    assert str(caught.value) == f"{folder / place} cannot be read: Input/output error."


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_full_or_read_only_disk_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    run_with(tmp_path / "run", artifact, [1])

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(EdgeBcsError, match=message):
            run_with(tmp_path / "run", artifact, [2])
    assert saved_step(tmp_path / "run") == 1


def test_a_run_does_not_overwrite_anything_else(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    other = Artifact.read(write_artifact(tmp_path / "b"))
    with pytest.raises(EdgeBcsError, match="exported artifact"):
        write_run(tmp_path / "a", artifact, state(), METADATA)
    run_with(tmp_path / "run", artifact, [1])
    (tmp_path / "b" / "eval_model.onnx").write_bytes(b"another network")
    seal(tmp_path / "b", manifest())
    other = Artifact.read(tmp_path / "b")
    with pytest.raises(EdgeBcsError, match="another artifact"):
        write_run(tmp_path / "run", other, state(), METADATA)
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgeBcsError, match="is a file"):
        write_run(tmp_path / "file", artifact, state(), METADATA)
    assert saved_step(tmp_path / "run") == 1


DIFFERENCES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("epsilon", lambda d: d["objective"].update(epsilon=4 / 255),
     r"its objective\.epsilon is 0\.031, this artifact's 0\.016"),
    ("a little", lambda d: d["objective"].update(epsilon=8 / 255 + 1e-6),
     r"its objective\.epsilon is 0\.03137\d*, this artifact's 0\.03137\d*"),
    ("steps", lambda d: d["objective"].update(attack_steps=7), "attack_steps is 10, this artifact's 7"),
    ("rate", lambda d: d["hyper"].update(learning_rate=0.01), r"rate is 0\.1, this artifact's 0\.01"),
    ("name", lambda d: d["objective"].update(name="mixed"), 'name is "at", this artifact\'s "mixed"'),
    ("batch", lambda d: d.update(batch_size=64), "its batch_size is 128, this artifact's 64"),
    ("norm", lambda d: d.update(batch_norm="batch"), 'its batch_norm is "frozen", this artifact\'s "batch"'),
    ("seed", lambda d: d.update(seed=8), "its seed is 7, this artifact's 8"),
    ("layer", lambda d: d["layers"][1].update(padding=1), r"layers\[1\]\.padding is 0, this artifact's 1"),
    ("budget", lambda d: d["memory"].update(budget=5000), r"memory\.budget is not set, this artifact's 5000"),
    ("more", lambda d: d.update(mean=[0.5]), r"its mean is not set, this artifact's \[0\.5\]"),
    ("classes", lambda d: d.update(classes=["cat", "dog"]), "its classes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in DIFFERENCES], ids=[case[0] for case in DIFFERENCES]
)
def test_a_run_is_of_one_artifact_in_every_setting(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """The same graphs, to the byte, with another setting: neither saved into nor gone on with."""
    named = message == "its classes"
    first = write_artifact(tmp_path / "a", lambda d: d.update(classes=["ant", "bee"]) if named else None)
    other = Artifact.read(write_artifact(tmp_path / "b", change))
    run_with(tmp_path / "run", Artifact.read(first), [1, 2])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(EdgeBcsError, match=f"holds a run of another artifact: .*{message}.*; choose") as told:
        run_with(tmp_path / "run", other, [3])
    assert "\n" not in str(told.value)
    with pytest.raises(EdgeBcsError, match=message):
        check_is_run_of(tmp_path / "run", other)
    check_is_run_of(tmp_path / "run", Artifact.read(first))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    run_with(tmp_path / "run", Artifact.read(tmp_path / "run"), [3])
    assert saved_step(tmp_path / "run") == 3


def test_names_and_versions_make_no_other_artifact(tmp_path: Path) -> None:
    """A run may have got names of classes; an artifact may have been exported again, by another version."""
    plain = Artifact.read(write_artifact(tmp_path / "a"))
    named = Artifact.read(write_artifact(tmp_path / "named", lambda d: d.update(classes=["ant", "bee"])))
    newer = Artifact.read(write_artifact(tmp_path / "newer", lambda d: d.update(created_by="edge-bcs 9.9")))
    run_with(tmp_path / "run", plain, [1])
    write_run(tmp_path / "named-run", plain, state(), METADATA, ["ant", "bee"])
    for run in (tmp_path / "run", tmp_path / "named-run"):
        for artifact in (plain, named, newer):
            check_is_run_of(run, artifact)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"name": "app", "icons": []}', b'{"files": {}}', b"[" * 100_000, b"\xff",
     b'{"format": "edge-bcs-artifact", "version": 1}',
     b'{"format": "edge-bcs-artifact", "version": 1, "files": []}',
     b'{"format": "edge-bcs-artifact", "version": 1, "files": {}, "classes": 5}',
     b'{"format": "edge-bcs-artifact", "version": 1, "files": {}, "m": ' + b"[" * 900 + b"]" * 900 + b"}"],
)  # fmt: skip
def test_a_folder_with_another_manifest_is_no_run(tmp_path: Path, content: bytes) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_bytes(content)
    with pytest.raises(EdgeBcsError) as told:
        run_with(tmp_path / "app", artifact, [1])
    assert "\n" not in str(told.value)
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["manifest.json"]


def test_a_run_is_not_made_over_files_of_others(tmp_path: Path) -> None:
    artifact = Artifact.read(write_artifact(tmp_path / "a"))
    for name in ("state.safetensors", "state.previous.safetensors", "eval_model.onnx"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(EdgeBcsError, match=rf"holds no run, but a {name} that the run would replace"):
            run_with(folder, artifact, [1])
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    run_with(tmp_path / "notes", artifact, [1])  # beside each other they may lie
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine" and saved_step(tmp_path / "notes") == 1
