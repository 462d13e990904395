"""An archive as that of the photographs of hands."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest


def archive(folder: Path) -> Path:
    """Forty photographs, whose order in the archive is not that of their numbers."""
    image = pytest.importorskip("PIL.Image")
    file = folder / "signs.tar.gz"
    with tarfile.open(file, "w:gz") as stored:
        for number in reversed(range(40)):
            stream = io.BytesIO()
            image.new("RGB", (12, 10), (number, 0, 0)).save(stream, "PNG")
            member = tarfile.TarInfo(f"signs/{number % 10}/IMG_{100 + number}.JPG")
            member.size = len(stream.getvalue())
            stored.addfile(member, io.BytesIO(stream.getvalue()))
    return file
