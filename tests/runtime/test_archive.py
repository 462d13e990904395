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


Member = tuple[tarfile.TarInfo, bytes]


def members(file: Path) -> list[Member]:
    with tarfile.open(file) as content:
        return [(item, content.extractfile(item).read()) for item in content]  # type: ignore[union-attr]


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = len(content), kind, target
    return made, content


def write(file: Path, content: list[Member], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(file, "w", format=form) as made:
        for member, data in content:
            made.addfile(member, io.BytesIO(data))


def with_header(offset: int, field: bytes, member: int = 0) -> Callable[[Path], None]:
    """Change a field of a member's header, and make its checksum right."""

    def change(file: Path) -> None:
        with tarfile.open(file) as content:
            start = content.getmembers()[member].offset
        data = bytearray(file.read_bytes())
        data[start + offset : start + offset + len(field)] = field
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        file.write_bytes(data)

    return change


def added(*more: Member) -> Callable[[Path], None]:
    return lambda file: write(file, members(file) + list(more))


def renamed(name: str, number: int = 1) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = members(file)
        content[number][0].name = name
        write(file, content)

    return change


def truncated(length: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, length)


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("path traversal", renamed("tiny/../../escaped"), "does not lie in"),
    ("parent", renamed("../escaped"), "does not lie in"),
    ("absolute name", renamed("/tmp/escaped"), "does not lie in"),
    ("deep name", renamed("tiny/a/b"), "does not lie in"),
    ("backslash", renamed("tiny/..\\escaped"), "does not lie in"),
    ("no folder", renamed("escaped"), "does not lie in"),
    ("two folders", renamed("other/state.safetensors"), "does not lie in"),
    ("a folder inside", added(entry("tiny/inner/", kind=tarfile.DIRTYPE)), "one folder of files"),
    ("symbolic link", added(entry("tiny/x", kind=tarfile.SYMTYPE, target="/etc/passwd")), "symbolic link"),
    ("hard link", added(entry("tiny/x", kind=tarfile.LNKTYPE, target="tiny/manifest.json")), "hard link"),
    ("device", added(entry("tiny/x", kind=tarfile.CHRTYPE)), "a device"),
    ("block device", added(entry("tiny/x", kind=tarfile.BLKTYPE)), "a device"),
    ("pipe", added(entry("tiny/x", kind=tarfile.FIFOTYPE)), "a pipe"),
    ("sparse file", with_header(156, b"S"), "a sparse file"),
    ("unknown kind", with_header(156, b"Z"), "something unknown"),
    ("duplicate", lambda f: write(f, members(f) + members(f)[:2]), "twice"),
    ("not listed", added(entry("tiny/more.bin", b"x")), "does not list"),
    ("lacking", lambda f: write(f, members(f)[:-1]), "lacks 'training_model.onnx'"),
    ("no manifest", lambda f: write(f, members(f)[1:]), "holds no manifest.json"),
    ("many members", added(*(entry(f"tiny/{n}") for n in range(100))), "more than 64 files"),
    ("many folders", added(*(entry("tiny", kind=tarfile.DIRTYPE) for _ in range(200))), "more than 64"),
    ("longer than listed",
     lambda f: write(f, [*members(f)[:-1], entry("tiny/training_model.onnx", b"x" * 999)]), "999 bytes"),
    ("declared beyond the end", with_header(124, b"77777777777\0", 3), "beyond its end"),
    ("size in base 256", with_header(124, b"\x80" + b"\xff" * 11, 3), "beyond its end"),
    ("no size", with_header(124, b"9" * 11, 3), "beyond its end"),
    ("large manifest", lambda f: write(f, [entry("tiny/manifest.json", bytes(17 << 20)), *members(f)[1:]]),
     "larger than 16 MiB"),
    ("broken manifest", lambda f: write(f, [entry("tiny/manifest.json", b"{"), *members(f)[1:]]), "damaged"),
    ("listing nothing", lambda f: write(f, [entry("tiny/manifest.json", b"[]"), *members(f)[1:]]), "damaged"),
    ("a long signature", added(entry("tiny/manifest.json.sig", bytes(9000))), "9000 bytes"),
    ("a wrong checksum", lambda f: f.write_bytes(f.read_bytes().replace(b"/eval", b"/evil")), "damaged"),
    ("empty", truncated(0), "truncated"),
    ("half a header", truncated(300), "truncated"),
    ("half a member", truncated(700), "beyond its end"),
    ("compressed", lambda f: f.write_bytes(b"\x1f\x8b\x08" + bytes(600)), "not a tar archive"),
    ("zeros", lambda f: f.write_bytes(bytes(2048)), "holds no manifest.json"),
    ("bad UTF-8", with_header(0, b"\xff\xfe"), "not UTF-8"),
]  # fmt: skip


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
