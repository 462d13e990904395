"""Whose folders and files are: what an export replaces and what stays, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import state, write_artifact
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError

pytest.importorskip("torch")
pytest.importorskip("onnx")
from edge_bcs.exporters import publish
from edge_bcs.exporters.publish import check_target, publishing

EXPORT = (
    "export", "--model", "resnet18", "--width", 0.05, "--input-size", 8, "--sparsity", 0.9,
    "--micro-batch", 2, "--no-validate",
)  # fmt: skip


def refused(result: Result) -> str:
    """The one sentence of a command that failed."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def content(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder by name."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def a_run(folder: Path, artifact: Path) -> Path:
    for step in (1, 2):
        write_run(folder, Artifact.read(artifact), state(), {"step": str(step), "seed": "7"})
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "report.json").write_text("{}")
    return folder


def write(folder: Path) -> None:
    """Fill the folder of an export with an artifact that can be told from others: its seed is 8."""
    write_artifact(folder, change=lambda description: description.update(seed=8))


def seed(folder: Path) -> int:
    return Artifact.read(folder).seed


# What is replaced


def web_app(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "app.js").write_text("app()")
    (folder / "index.html").write_text("<html>")
    (folder / "manifest.json").write_text(json.dumps({"name": "app", "icons": [], "start_url": "/"}))


def described(**changes: Any) -> Callable[[Path], None]:
    """An artifact whose manifest says otherwise."""

    def make(folder: Path) -> None:
        write_artifact(folder)
        description = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**description, **changes}))

    return make


def with_file(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = write_artifact(folder) / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")

    return make


def linked(folder: Path) -> None:
    write_artifact(folder)
    (folder / "eval_model.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "eval_model.onnx").symlink_to(folder.parent / "elsewhere.onnx")


def run_with_notes(folder: Path) -> None:
    a_run(folder, write_artifact(folder.parent / "of"))
    (folder / "notes.txt").write_text("mine")


OTHERS: list[tuple[str, Callable[[Path], object], str]] = [
    ("web app", web_app, "has not the format edge-bcs-artifact"),
    ("file", lambda folder: folder.write_text("mine"), "is not an artifact but a file"),
    (
        "other files",
        lambda folder: (folder / "thesis").mkdir(parents=True),
        r"not an artifact \(it holds thesis",
    ),
    ("list", lambda f: (f.mkdir(), (f / "manifest.json").write_text("[]")), "is not that of one"),
    ("no list", described(files={}), "does not list an artifact's files"),
    ("other list", described(files={"thesis.txt": {"sha256": "", "bytes": 4}}), "does not list"),
    ("newer", described(version=3), "unknown version 3"),
    ("artifact and a file", with_file("notes.txt"), r"holds notes\.txt, which is not of edge-bcs"),
    ("artifact and a hidden file", with_file(".env"), r"holds \.env, which is not of edge-bcs"),
    ("artifact and a folder", with_file("photos/a.jpg"), "holds photos, which is not of edge-bcs"),
    ("artifact with a link", linked, r"holds eval_model\.onnx, which is not of edge-bcs"),
    ("artifact trained by hand", with_file("state.previous.safetensors"), "holds state.previous.safetensors"),
    ("run and a file", run_with_notes, r"holds notes\.txt, which is not of edge-bcs"),
]


@pytest.mark.parametrize(("make", "message"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_what_is_not_ours_stays(
    tmp_path: Path, make: Callable[[Path], object], message: str, force: bool
) -> None:
    make(tmp_path / "a")
    before = content(tmp_path)
    with pytest.raises(EdgeBcsError, match=message) as caught:
        check_target(tmp_path / "a", force)
    assert "\n" not in str(caught.value)
    # Not even if it came there while the export was under way.
    with pytest.raises(EdgeBcsError, match=message), publishing(tmp_path / "a", force) as folder:
        write(folder)
    assert content(tmp_path) == before


def test_the_command_leaves_a_web_app_alone(tmp_path: Path) -> None:
    web_app(tmp_path / "app")
    before = content(tmp_path)
    for force in ((), ("--force",)):
        assert "has not the format" in refused(run(*EXPORT, "-o", tmp_path / "app", *force))
    assert content(tmp_path) == before


def test_an_artifact_a_run_and_a_changed_artifact(tmp_path: Path) -> None:
    """Replaced; with --force; with --force."""
    target = write_artifact(tmp_path / "a")
    with publishing(target) as folder:
        write(folder)
    assert seed(target) == 8
    trained = a_run(tmp_path / "run", write_artifact(tmp_path / "of"))
    shutil.copytree(write_artifact(tmp_path / "changed"), tmp_path / "damaged")
    (tmp_path / "changed" / "state.safetensors").write_bytes(b"trained by hand")
    (tmp_path / "damaged" / "lists_model.onnx").write_bytes(b"")
    for place, message in (
        (trained, "holds a trained run; --force"),
        (tmp_path / "changed", r"whose state\.safetensors was changed; --force"),
        (tmp_path / "damaged", r"whose lists_model\.onnx was changed; --force"),
    ):
        before = content(tmp_path)
        with pytest.raises(EdgeBcsError, match=message):
            check_target(place)
        with pytest.raises(EdgeBcsError, match=message), publishing(place) as folder:
            write(folder)
        assert content(tmp_path) == before
        with publishing(place, force=True) as folder:
            write(folder)
        assert seed(place) == 8 and "metrics.jsonl" not in content(place)


def test_export_into_a_run(tmp_path: Path) -> None:
    assert run(*EXPORT, "-o", tmp_path / "a").exit_code == 0
    artifact = Artifact.read(tmp_path / "a")
    write_run(tmp_path / "run", artifact, read_state(artifact)[0], {"step": "5", "seed": "0"})
    before = content(tmp_path / "run")
    assert "holds a trained run" in refused(run(*EXPORT, "-o", tmp_path / "run"))
    for checkpoint, output in (
        ("run", "run"), ("a", "a"), ("a/state.safetensors", "a"), ("run", "b/../run"), ("run/", "run"),
    ):  # fmt: skip
        arguments = ("export", "--checkpoint", tmp_path / checkpoint, "--no-validate", "--force")
        assert "from which --checkpoint reads" in refused(run(*arguments, "-o", tmp_path / output))
    assert content(tmp_path / "run") == before
    assert run(*EXPORT, "-o", tmp_path / "run", "--force").exit_code == 0
    assert read_state(Artifact.read(tmp_path / "run"))[1]["step"] == "0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]


def test_the_output_is_looked_at_before_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(*arguments: object) -> None:
        raise AssertionError("the network was read first")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    monkeypatch.setattr("edge_bcs.models.create", too_early)
    sentence = refused(run(*EXPORT, "-o", tmp_path / "photos"))
    assert "is not an artifact (it holds 1.png)" in sentence
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "resnet18").mkdir(parents=True)
    (tmp_path / "out" / "resnet18" / "x").touch()
    assert "out/resnet18 exists and is not an artifact (it holds x)" in refused(run(*EXPORT))


def test_a_run_under_training_is_called_what_the_user_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(Path("run"), write_artifact(tmp_path / "a"))
    code = (
        "import sys; from edge_bcs.core.locks import FolderLock; lock = FolderLock('run'); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None and training.stdout.readline() == "\n"
        assert refused(run(*EXPORT, "-o", "run", "--force")).startswith(
            "Error: run is being written by process "
        )
        training.communicate("")


def test_places_that_are_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here" / "deeper"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    write_artifact(tmp_path / "artifact" / "of" / "mine").rename(here / "artifact")
    for target in (".", "", "..", "/", here, tmp_path / "here", tmp_path / "link", "artifact/.."):
        for force in (False, True):
            with pytest.raises(EdgeBcsError, match="is the current folder or one around it"):
                check_target(target, force)
    monkeypatch.chdir(here / "artifact")  # an artifact, but the shell stands in it
    with pytest.raises(EdgeBcsError, match="is the current folder"):
        check_target(".")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "artifact")
    with pytest.raises(EdgeBcsError, match="a disk is mounted at"):
        check_target(tmp_path / "artifact")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(EdgeBcsError, match="loop"):
        check_target(tmp_path / "loop")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "none yet")
    write_artifact(tmp_path / "disk" / "a")
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    for name in ("a", "new"):
        with publishing(tmp_path / name) as folder:
            write(folder)
        assert (tmp_path / name).is_symlink() and seed(tmp_path / name) == 8
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a", "none yet"]
    web_app(tmp_path / "disk" / "app")
    (tmp_path / "app").symlink_to(tmp_path / "disk" / "app")
    with pytest.raises(EdgeBcsError, match="has not the format"):
        check_target(tmp_path / "app")


def test_archives(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    for _ in range(2):  # it replaces one of its own
        with publishing(target) as folder:
            write(folder)
        assert seed(target) == 8
    (tmp_path / "backup.tar").write_bytes(target.read_bytes()[:3000])
    shutil.copy(Path(__file__), tmp_path / "tests.tar")
    web_app(tmp_path / "app.tar")
    write_artifact(tmp_path / "folder.tar")
    (tmp_path / f"{'n' * 160}.tar").symlink_to(target)
    before = content(tmp_path)
    for name, message in (
        ("backup", "not replaced: .* truncated"), ("tests", "not replaced: .* not a tar"),
        ("app", "is a folder"), ("folder", "is a folder"), ("n" * 160, "too long a name"),
    ):  # fmt: skip
        for force in (False, True):
            with pytest.raises(EdgeBcsError, match=message):
                check_target(tmp_path / f"{name}.tar", force)
    assert content(tmp_path) == before
    (tmp_path / "a.tar.partial").write_text("mine")
    with publishing(target) as folder:
        write(folder)
    assert (tmp_path / "a.tar.partial").read_text() == "mine" and seed(target) == 8


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
