"""What stays of a folder where an export is cut off: full and read-only disks, and kill -9."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.artifact import Artifact
from helpers.artifacts import write_artifact
from helpers.commands import run
from helpers.export_folders import EXPORT, content, refused, seed, write

from edge_bcs.core.errors import EdgeBcsError

pytest.importorskip("torch")
pytest.importorskip("onnx")
from edge_bcs.exporters import publish
from edge_bcs.exporters.publish import publishing

# Full and read-only disks


WRITING: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (Path, "write_bytes"),
    (Path, "write_text"), (publish, "exchange"), (shutil, "copyfileobj"),
)  # fmt: skip


def before_each(
    call: Callable[[int, str], object], monkeypatch: pytest.MonkeyPatch, *more: tuple[Any, str]
) -> list[str]:
    """Have ``call`` called with number and name before each call that writes (and of ``more``); return the
    growing list of names."""
    names: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            names.append(name)
            call(len(names) - 1, name)
            return real(*arguments, **more)

        return instead

    for module, name in (*WRITING, *more):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return names


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("once", [False, True], ids=["for good", "once"])
@pytest.mark.parametrize("name", ["a", "a.tar"])
def test_a_disk_that_fails_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, once: bool, old: bool
) -> None:
    """The n-th call that writes fails, alone or with all after it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes long
    target = tmp_path / "disk" / name
    for number in range(100):
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        target.parent.mkdir()
        if old:
            with publishing(target) as folder:
                write_artifact(folder)
        before = content(tmp_path)

        def fail(count: int, name: str, number: int = number) -> None:
            if count == number or (count > number and not once):
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            calls = before_each(fail, patch)
            try:
                with publishing(target) as folder:
                    write(folder)
                failed = False
            except EdgeBcsError as error:
                assert re.search("the disk is full|No space left", str(error)) and str(target) in str(error)
                assert "\n" not in str(error)
                failed = True
        left = [path.name for path in target.parent.iterdir()]
        assert left == [name] or not (left or old)
        assert not left or seed(target) in (7, 8)  # whole
        if failed and once and name == "a":
            assert content(tmp_path) == before
        if number >= len(calls):
            break
    assert not failed and number > 8 and seed(target) == 8


def test_a_full_and_a_read_only_disk(small_disk: Path, tmp_path: Path) -> None:
    """Real ones, at the command line; what is there stays, and nothing else is left."""
    command = (*EXPORT, "-o", small_disk / "a")
    result = run(*command)
    assert result.exit_code == 0, result.output
    before = content(small_disk)
    left = os.statvfs(small_disk)
    filler = small_disk / "filler"
    free = left.f_bavail * left.f_frsize
    for size in (8192, 65536):  # of the artifact's 200 kB this much still finds room
        filler.write_bytes(b"\0" * (free - size))
        for name in ("a", "b", "c.tar"):
            sentence = refused(run(*EXPORT, "-o", small_disk / name))
            assert f"{small_disk / name} cannot be exported to: the disk is full" in sentence
            assert ("what is there is kept" in sentence) == (name == "a")
        filler.unlink()
        assert content(small_disk) == before and [path.name for path in small_disk.iterdir()] == ["a"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("a", "b", "c.tar", "d/e"):
        sentence = refused(run(*EXPORT, "-o", small_disk / name))
        assert "the disk is read-only" in sentence
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert content(small_disk) == before and run(*command).exit_code == 0
    (tmp_path / "file").write_text("mine")
    assert "Not a directory" in refused(run(*EXPORT, "-o", tmp_path / "file" / "a"))


# Killed


DELETING = ((os, "unlink"), (os, "rmdir"))


def killed(publishes: Callable[[], object], number: int) -> bool:
    """Have a forked process publish and be killed before its n-th call that writes or deletes; False if it
    came to its end."""
    process = os.fork()
    if not process:
        try:
            with pytest.MonkeyPatch.context() as patch:

                def kill(count: int, name: str) -> None:
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)

                before_each(kill, patch, *DELETING)
                publishes()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


class Failure(Exception):  # noqa: N818
    pass


def copies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], object]:
    """What `write` does, in one call, during which nobody is killed."""
    made = write_artifact(tmp_path_factory.mktemp("made") / "a", lambda d: d.update(seed=8))
    return lambda folder: shutil.copytree(made, folder, dirs_exist_ok=True)


def fail_to_export(target: Path) -> None:
    """Begin an export and give it up."""
    with pytest.raises(Failure), publishing(target):
        raise Failure


forking = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.mark.parametrize("name", [pytest.param("a", marks=forking), pytest.param("a.tar", marks=forking)])
def test_killed_at_any_call_the_old_or_the_new_artifact_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """And what the killed export left beside it goes with the next one; what is the user's stays."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes long
    target, mine = tmp_path / name, tmp_path / f".{name}.mine"
    (mine / name).mkdir(parents=True)
    (tmp_path / f".{name}.0123abcd").mkdir()
    (tmp_path / f".{name}.0123abcd" / "manifest.json").write_text("mine")  # but for the name, nothing is ours

    fill = write if name == "a" else copies(tmp_path_factory)

    def publishes() -> None:
        with publishing(target) as folder:
            fill(folder)

    seen = set()
    for number in range(200):
        if not target.exists() or seed(target) != 7:
            with publishing(target) as folder:
                write_artifact(folder)
        was_killed = killed(publishes, number)
        assert seed(target) in (7, 8)
        seen.add((seed(target), len(list(tmp_path.iterdir()))))
        fail_to_export(target)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == [f".{name}.0123abcd", f".{name}.mine", name] and seed(target) in (7, 8)
        if not was_killed:
            break
    assert seed(target) == 8 and number > 8
    assert {(7, 4), (8, 4), (8, 3)} <= seen  # the old one and the new one beside a scratch folder
    assert (tmp_path / f".{name}.0123abcd" / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize("name", [pytest.param("a", marks=forking)])
def test_killed_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """Between the two renamings there is none; the next export moves the old one back, whatever becomes of
    itself, and until then the sentence says where it is."""
    target, missing, copy = tmp_path / name, 0, copies(tmp_path_factory)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes long
    monkeypatch.setattr(publish, "exchange", lambda one, other: False)

    def publishes() -> None:
        with publishing(target) as folder:
            copy(folder)

    for number in range(200):
        if not target.exists() or seed(target) != 7:
            with publishing(target) as folder:
                write_artifact(folder)
        was_killed = killed(publishes, number)
        if not target.exists():
            missing += 1
            with pytest.raises(
                EdgeBcsError, match=rf"was killed, .*/\.{name}\.[0-9a-f]+/replaced; move"
            ) as told:
                Artifact.read(target)
            assert seed(Path(re.findall(r"/\S*replaced", str(told.value))[0])) == 7
        fail_to_export(target)
        assert seed(target) in (7, 8) and [path.name for path in tmp_path.iterdir()] == [name]
        if not was_killed:
            break
    assert missing == 1 and seed(target) == 8


@pytest.mark.parametrize("name", [pytest.param("a", marks=forking)])
def test_an_export_under_way_is_not_swept_away(tmp_path: Path, name: str) -> None:
    """By another export to the same place, in this process or in another one."""
    target = tmp_path / name

    def publishes() -> None:
        with publishing(target) as folder:
            write_artifact(folder)

    with publishing(target) as first:
        write(first)
        publishes()
        assert not killed(publishes, 1000)
        assert seed(target) == 7
    assert seed(target) == 8 and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_comes_in_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After everything was looked at, before the exchange: the exchange is taken back."""
    real = publish.exchange
    for exchanges in (True, False):
        target = write_artifact(tmp_path / f"a{exchanges}")

        def late(one: Path, other: Path, exchanges: bool = exchanges, target: Path = target) -> bool:
            (target / "notes.txt").write_text("mine") if not (target / "notes.txt").exists() else None
            return real(one, other) if exchanges else False

        monkeypatch.setattr(publish, "exchange", late)
        with pytest.raises(EdgeBcsError, match=r"holds notes\.txt"), publishing(target) as folder:
            write(folder)
        assert (target / "notes.txt").read_text() == "mine" and seed(target) == 7
