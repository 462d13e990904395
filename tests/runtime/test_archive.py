"""An artifact in one file: what is accepted, that all else is refused, and that nothing is unpacked."""

from __future__ import annotations

import gc
import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from edge_bcs.runtime import archive
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.archives import FAULTS, entry, members, write
from helpers.artifacts import GRAPHS, state, write_artifact

from edge_bcs.core.errors import EdgeBcsError


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files can be made nowhere: a service, for one, can write only to its run."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))


def archived(tmp_path: Path, name: str = "tiny") -> Path:
    folder = write_artifact(tmp_path / name)
    with (tmp_path / f"{name}.tar").open("wb") as stream:
        archive.pack(folder, stream, name)
    return tmp_path / f"{name}.tar"


def test_an_archive_is_read_like_its_folder(tmp_path: Path) -> None:
    file = archived(tmp_path)
    artifact, folder = Artifact.read(file), Artifact.read(tmp_path / "tiny")
    assert (artifact.manifest, artifact.layers) == (folder.manifest, folder.layers)
    assert artifact.path == file
    for graph in GRAPHS:
        assert artifact.read_graph(graph) == folder.read_graph(graph) == folder.graph(graph).read_bytes()
    assert {name: array.tolist() for name, array in read_state(artifact)[0].items()} == {
        name: array.tolist() for name, array in read_state(folder)[0].items()
    }


def test_a_run_begins_from_an_archive_as_from_its_folder(tmp_path: Path) -> None:
    tensors, metadata = state(), {"step": "4", "seed": "7"}
    write_run(tmp_path / "a", Artifact.read(archived(tmp_path)), tensors, metadata)
    write_run(tmp_path / "b", Artifact.read(tmp_path / "tiny"), tensors, metadata)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert len(files) == 2 + len(GRAPHS)


def test_an_archive_that_is_replaced_or_altered_while_it_is_in_use(tmp_path: Path) -> None:
    file = archived(tmp_path)
    artifact, graph = Artifact.read(file), (tmp_path / "tiny" / "eval_model.onnx").read_bytes()
    content = file.read_bytes()
    (tmp_path / "new").write_bytes(b"another one")
    os.replace(tmp_path / "new", file)
    assert artifact.read_graph("eval") == graph  # of the file that was opened and verified
    file.write_bytes(content)
    artifact = Artifact.read(file)
    place = content.index(graph)
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"X")
    with pytest.raises(EdgeBcsError, match="altered while it was in use"):
        artifact.read_graph("eval")
    with pytest.raises(EdgeBcsError, match="altered while it was in use"):
        write_run(tmp_path / "run", artifact, state(), {"step": "4", "seed": "7"})
    os.truncate(file, place)
    with pytest.raises(EdgeBcsError, match="altered while it was in use"):
        artifact.read_graph("eval")


def test_archives_are_closed_when_nobody_needs_them(tmp_path: Path) -> None:
    def opened() -> int:
        files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(file) and os.readlink(file).startswith(str(tmp_path)) for file in files)

    artifact = Artifact.read(archived(tmp_path))
    assert opened() == 1
    part = artifact.files.open("state.safetensors")
    del artifact
    gc.collect()
    assert len(part.readall()) == (tmp_path / "tiny" / "state.safetensors").stat().st_size
    del part
    gc.collect()
    assert opened() == 0


def test_an_archive_is_one_folder_for_tar_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = archived(tmp_path).read_bytes()
    os.utime(tmp_path / "tiny" / "manifest.json", (0, 0))
    (tmp_path / "tiny" / "eval_model.onnx").chmod(0o600)
    again = io.BytesIO()
    archive.pack(tmp_path / "tiny", again, "tiny")
    assert again.getvalue() == first
    with tarfile.open(tmp_path / "tiny.tar") as content:
        names = content.getnames()
    assert names[0] == "tiny/manifest.json" and len(names) == 7
    assert all(name.startswith("tiny/") for name in names)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_what_tar_itself_packs_is_read(tmp_path: Path, form: int) -> None:
    folder = write_artifact(tmp_path / "tiny")
    with tarfile.open(tmp_path / "own.tar", "w", format=form) as content:
        content.add(folder, "tiny")
    assert Artifact.read(tmp_path / "own.tar").kappa == 5


@pytest.mark.parametrize(("damage", "message"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS])
def test_hostile_archives_write_nothing(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    file = archived(tmp_path)
    damage(file)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EdgeBcsError, match=message) as caught:
        Artifact.read(file)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_extended_headers_are_refused(tmp_path: Path) -> None:
    file = archived(tmp_path)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write(file, [*members(archived(tmp_path)), entry("tiny/" + "x" * 200)], form)
        with pytest.raises(EdgeBcsError, match="an extended header"):
            Artifact.read(file)


def test_every_flipped_byte_of_an_archive_is_noticed(tmp_path: Path) -> None:
    """Or changes nothing that is read. The manifest's own bytes are what a signature is for."""
    file = archived(tmp_path)
    whole, expected = file.read_bytes(), Artifact.read(file).manifest
    manifest = range(512, 512 + (tmp_path / "tiny" / "manifest.json").stat().st_size)
    refused = 0
    for position in sorted({*range(0, 512, 5), *range(manifest.stop, len(whole), 29)}):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            assert Artifact.read(file).manifest == expected
        except EdgeBcsError:
            refused += 1
    assert refused > 200
