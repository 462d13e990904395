"""An artifact as one file: a plain tar, NAME/manifest.json first; written by `export`, read as hostile.

Only what an artifact consists of is accepted: files (and the folder itself) in one folder, each named and
sized by the manifest. All headers are read and checked before anything else is; Python's tarfile is not used
to read, because it follows headers of extended formats whatever they declare. Files are then read where they
lie in the archive, so that a board needs no second copy of them, and a process that is killed leaves none.
"""

from __future__ import annotations

import io
import os
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import parse_object

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


class Folder:
    """The files of an artifact that is a folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none of that name."""
        file = self.path / name
        return file.stat().st_size if file.is_file() else None

    def open(self, name: str) -> io.RawIOBase:
        """Open a file for reading, without a buffer."""
        return (self.path / name).open("rb", buffering=0)

    def read_small(self, name: str, most: int) -> bytes:
        """Return a file of up to ``most`` bytes; EdgeBcsError if it has more."""
        return read_small(self.path / name, most)


class Archive:
    """The files of an archived artifact, read where they lie: nothing is unpacked.

    The archive stays open as long as this object or a file of it, so that one that takes its place changes
    nothing here.

    Attributes:
        path: the archive.

    Raises EdgeBcsError for an archive that is truncated, names anything but the files of its own manifest, or
    gives one another size or twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb")
            weakref.finalize(self, self._stream.close)
            members = _members(self._stream, path)
            self._members = _declared(self._stream, members, path)
        except OSError as error:
            raise EdgeBcsError(f"the archive {path} cannot be read: {error.strerror or error}.") from None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none of that name."""
        return self._members[name].size if name in self._members else None

    def open(self, name: str) -> io.RawIOBase:
        """Open a file for reading, without a buffer."""
        return _Part(self, self._members[name])

    def read_small(self, name: str, most: int) -> bytes:
        """Return a file of up to ``most`` bytes; EdgeBcsError if it has more."""
        if self._members[name].size > most:
            raise EdgeBcsError(f"{name} in {self.path} is larger than {most >> 10} KiB; it is not read.")
        with self.open(name) as stream:
            return stream.readall()

    def _read_into(self, view: memoryview, position: int) -> int:
        self._stream.seek(position)
        return self._stream.readinto(view)


class _Part(io.RawIOBase):
    """A member of an archive as a file of its own, read-only."""

    def __init__(self, archive: Archive, member: Member) -> None:
        self._archive, self._member, self._position = archive, member, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place and return it, counted from the beginning."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._member.size}[whence]
        self._position = max(0, begin + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read on into ``buffer``; return how many bytes, 0 at the end."""
        left = max(0, self._member.size - self._position)
        view = memoryview(buffer).cast("B")[:left]
        count = self._archive._read_into(view, self._member.offset + self._position) if view else 0
        self._position += count
        return count


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


def _declared(stream: IO[bytes], members: dict[str, Member], path: Path) -> dict[str, Member]:
    """The members by name, after checking that they are the manifest, its signature, and what it lists."""
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
    return members
