"""The decoder of edge-bcs-run, compiled with sanitizers, for image files of tests."""

from __future__ import annotations

import functools
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.scratch import ScratchFolder
from helpers import ROOT

Array = np.ndarray[Any, Any]
Answer = Array | str
"""Pixels u8 [C, H, W], or why there are none."""
ENOUGH = 1 << 20  # bytes: `least_workspace`
_NATIVE = ROOT / "runtime" / "native"


@functools.cache
def _scratch() -> ScratchFolder:
    return ScratchFolder("decoder")


@functools.cache
def _program() -> Path:
    """The program; skips the test where libjpeg, libpng or a compiler with sanitizers is missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    program = _scratch().path / "decode_images"
    sources = [
        *sorted((_NATIVE / "decode").glob("*.cpp")),
        _NATIVE / "image" / "resize.cpp",
        _NATIVE / "ops" / "text.cpp",
    ]
    sources.append(ROOT / "tests" / "native" / "decode_images.cpp")
    options = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        f"-I{_NATIVE}",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
    ]
    options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    libraries = [f"-l:lib{name}.a" for name in ("jpeg", "png16", "z")]
    empty = "#include <decode/libjpeg.h>\n#include <png.h>\nint main() {}\n"
    command = [compiler, *options, "-x", "c++", "-", *libraries, "-o", str(program)]
    probe = subprocess.run(command, input=empty, capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip("libjpeg and libpng, or the sanitizers, are not installed")
    subprocess.run([compiler, *options, *sources, *libraries, "-o", str(program)], check=True)
    return program


def decoded(
    files: Sequence[Path], shape: tuple[int, int, int], crop: float | None = None, workspace: int = ENOUGH
) -> list[Answer]:
    """What each file holds; an AssertionError if a sanitizer finds something."""
    words = [*map(str, shape), repr(crop or 0), str(workspace), *map(str, files)]
    done = subprocess.run([_program(), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[Answer] = []
    for line in done.stdout.splitlines():
        kind, _, content = line.partition(" ")
        pixels = bytes.fromhex(content) if kind == "ok" else b""
        answers.append(np.frombuffer(pixels, np.uint8).reshape(shape) if kind == "ok" else content)
    assert len(answers) == len(files)
    return answers


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    check = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + check.to_bytes(4, "big")


def png(
    pixels: Array, colour_type: int, *, depth: int = 8, interlaced: bool = False, after: bytes = b""
) -> bytes:
    """A PNG of u8 [H, W, channels] (big-endian pairs of them for a depth of 16).

    ``after``: chunks that follow the pixels.
    """
    height, width = pixels.shape[:2]
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    head = chunk(b"IHDR", sizes + bytes([depth, colour_type, 0, 0, int(interlaced)]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")
