"""An artifact as one file: a plain tar, NAME/manifest.json first; written by `export`, read as hostile.

Only what an artifact consists of is accepted: files (and the folder itself) in one folder, each named and
sized by the manifest. All headers are read and checked before anything is written; Python's tarfile is not
used to read, because it follows headers of extended formats whatever they declare.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_bcs.errors import EdgeBcsError
from edge_bcs.metadata import parse_object

SUFFIX = ".tar"
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
LARGEST_MANIFEST = 16 << 20
LARGEST_SIGNATURE = 4 << 10
_MOST_MEMBERS = 64
_LARGEST = 8 << 30
_BLOCK = 512
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"x": "an extended header", b"g": "an extended header",
    b"L": "an extended header", b"K": "an extended header",
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One file of an archive: its name in the artifact's folder, and where its ``size`` bytes begin."""

    name: str
    offset: int
    size: int


def is_archive(path: str | Path) -> bool:
    """Whether ``path`` is a file whose name says that it is an archived artifact."""
    path = Path(path)
    return path.name.lower().endswith(SUFFIX) and path.is_file()


def is_artifact(path: str | Path) -> bool:
    """Whether there is an artifact or a run at ``path``: a folder with a manifest, or an archive."""
    return is_archive(path) or (Path(path) / MANIFEST).is_file()


def pack(folder: Path, stream: IO[bytes], name: str) -> None:
    """Write the files of ``folder`` as the archive of an artifact ``name``; the same bytes each time."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name not in (MANIFEST, SIGNATURE), file.name))
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in files:
            member = tarfile.TarInfo(f"{name}/{file.name}")
            member.size, member.mode = file.stat().st_size, 0o644
            with file.open("rb") as content:
                archive.addfile(member, content)


def unpack(path: Path) -> Path:
    """Unpack an archive into a new temporary folder and return that; the caller deletes it.

    Raises EdgeBcsError, and writes nothing, for an archive that is truncated, names anything but the files of
    its own manifest, gives one another size or twice, or does not fit the disk.
    """
    try:
        with path.open("rb") as stream:
            members = _members(stream, path)
            files = _declared(stream, members, path)
            room = shutil.disk_usage(tempfile.gettempdir()).free
            if sum(member.size for member in files) > room:
                raise EdgeBcsError(
                    f"unpacking {path} needs more than the {room >> 20} MiB free in {tempfile.gettempdir()}; "
                    "set TMPDIR to a folder on a larger disk."
                )
            folder = Path(tempfile.mkdtemp(prefix="edge-bcs-"))
            try:
                for member in files:
                    _copy(stream, member, folder / member.name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder
    except OSError as error:
        raise EdgeBcsError(f"the archive {path} cannot be unpacked: {error.strerror or error}.") from None


def _copy(stream: IO[bytes], member: Member, file: Path) -> None:
    stream.seek(member.offset)
    left = member.size
    with file.open("xb") as target:
        while left:
            piece = stream.read(min(left, 1 << 20))
            if not piece:
                raise EdgeBcsError(f"the archive of {member.name} became shorter while it was read.")
            target.write(piece)
            left -= len(piece)


def _members(stream: IO[bytes], path: Path) -> dict[str, Member]:
    """The files of the archive by name, after checking every header."""
    end = stream.seek(0, os.SEEK_END)
    if end > _LARGEST:
        raise EdgeBcsError(f"{path} is larger than 8 GiB, so it is not an archived artifact.")
    members: dict[str, Member] = {}
    top = None
    for kind, name, offset, size in _headers(stream, path, end):
        folder, _, file = name.rstrip("/").partition("/") if kind == b"5" else name.partition("/")
        if kind == b"5" and file == "":
            file = "."
        if (
            folder in ("", ".", "..")
            or file in ("", "..")
            or any(letter in file or letter in folder for letter in ("/", "\\", "\0"))
            or (top is not None and folder != top)
        ):
            raise EdgeBcsError(f"{path} holds {name!r}, which does not lie in the one folder of an artifact.")
        top = folder
        if kind == b"5":
            if file != "." or size:
                raise EdgeBcsError(f"{path} holds the folder {name!r}; an artifact is one folder of files.")
            continue
        if file in members:
            raise EdgeBcsError(f"{path} holds {name!r} twice.")
        if len(members) == _MOST_MEMBERS:
            raise EdgeBcsError(f"{path} holds more than {_MOST_MEMBERS} files, so it is not an artifact.")
        members[file] = Member(file, offset, size)
    return members


def _headers(stream: IO[bytes], path: Path, end: int) -> Iterator[tuple[bytes, str, int, int]]:
    """Yield (kind, name, position of the content, its size) of each member."""
    position, count = 0, 0
    while True:
        stream.seek(position)
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK:
            raise EdgeBcsError(f"{path} is truncated or not a tar archive; copy it again.")
        if not any(header):
            return
        stated = _octal(header[148:156])
        blank = header[:148] + b" " * 8 + header[156:]
        if stated != sum(blank) or header[257:262] != b"ustar":
            raise EdgeBcsError(f"{path} is damaged or not a tar archive; copy it again.")
        kind, size = header[156:157].replace(b"\0", b"0"), _octal(header[124:136])
        if kind not in (b"0", b"5"):
            what = _KINDS.get(kind, "something unknown")
            raise EdgeBcsError(
                f"{path} holds {what}, which an artifact does not have; pack it with `edge-bcs export "
                "--archive` or `tar --format=ustar`."
            )
        position += _BLOCK
        if size is None or position + size > end:
            raise EdgeBcsError(f"{path} is truncated: a file in it goes beyond its end; copy it again.")
        try:
            name, prefix = (part.split(b"\0")[0].decode() for part in (header[:100], header[345:500]))
        except UnicodeDecodeError:
            raise EdgeBcsError(f"{path} holds a name that is not UTF-8.") from None
        # GNU's headers have other fields where those of POSIX have the front of a long name.
        prefix = prefix if header[262:263] == b"\0" else ""
        yield kind, f"{prefix}/{name}" if prefix else name, position, size
        position += -(-size // _BLOCK) * _BLOCK
        count += 1
        if count > 2 * _MOST_MEMBERS:
            raise EdgeBcsError(f"{path} holds more than {_MOST_MEMBERS} files, so it is not an artifact.")


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if text.isdigit() and not set(text) & set(b"89") else None


def _declared(stream: IO[bytes], members: dict[str, Member], path: Path) -> list[Member]:
    """The members, after checking that they are the manifest, its signature, and the files that it lists."""
    manifest = members.get(MANIFEST)
    if manifest is None:
        raise EdgeBcsError(f"{path} holds no {MANIFEST}, so it is not an archived artifact.")
    if manifest.size > LARGEST_MANIFEST:
        raise EdgeBcsError(f"the manifest in {path} is larger than 16 MiB, so it is not one of edge-bcs.")
    stream.seek(manifest.offset)
    try:
        content = parse_object(stream.read(manifest.size))
        sizes: dict[str, Any] = {name: entry["bytes"] for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EdgeBcsError(f"the manifest in {path} is damaged; copy the archive again.") from None
    for name, member in members.items():
        if name == MANIFEST:
            continue
        if name == SIGNATURE:
            wrong = member.size > LARGEST_SIGNATURE
        elif name not in sizes:
            raise EdgeBcsError(f"{path} holds {name!r}, which its manifest does not list.")
        else:
            wrong = sizes[name] != member.size
        if wrong:
            raise EdgeBcsError(f"{name!r} in {path} has {member.size} bytes, not what its manifest says.")
    for name in sizes:
        if name not in members:
            raise EdgeBcsError(f"{path} lacks {name!r}; copy or export the artifact again.")
    return list(members.values())
