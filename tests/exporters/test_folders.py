"""Whose folders and files are: what an export replaces and what stays, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import state, write_artifact
from helpers.commands import run
from helpers.export_folders import EXPORT, content, refused, seed, write

from edge_bcs.core.errors import EdgeBcsError

pytest.importorskip("torch")
pytest.importorskip("onnx")
from edge_bcs.exporters.publish import check_target, publishing


def a_run(folder: Path, artifact: Path) -> Path:
    for step in (1, 2):
        write_run(folder, Artifact.read(artifact), state(), {"step": str(step), "seed": "7"})
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "report.json").write_text("{}")
    return folder


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
    ("newer", described(version=5), "unknown version 5"),
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
