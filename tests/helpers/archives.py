"""Archived artifacts, and what is wrong with those that are hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

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


def size_of(file: Path, member: int) -> int:
    with tarfile.open(file) as content:
        return content.getmembers()[member].size


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
    ("a true size in base 256", lambda f: with_header(124, b"\x80" + size_of(f, 3).to_bytes(11, "big"), 3)(f),
     "beyond its end"),
    ("a size and more", lambda f: with_header(124, b"%06o\0junk\0" % size_of(f, 3), 3)(f), "beyond its end"),
    ("no size", with_header(124, b"9" * 11, 3), "beyond its end"),
    ("a folder of no size",
     lambda f: (added(entry("tiny/", kind=tarfile.DIRTYPE))(f), with_header(124, b" " * 12, -1)(f)),
     "beyond its end"),
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
"""What it is called, what changes the archive of an artifact "tiny", and what of it is said."""
