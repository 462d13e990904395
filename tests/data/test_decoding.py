"""One image file into pixels: what every kind becomes, and what that takes."""

# mypy: disable-error-code="arg-type, attr-defined"

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import decoding, open_data
from edge_bcs.data.decoding import decode

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

HEIGHT, WIDTH = 6, 8
RAMP = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 5
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def encoded(image: Any, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if hasattr(image, "save") else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def pixels(data: bytes, channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return decode(data, (channels, height, width), "it").transpose(1, 2, 0)


# Orientation


@pytest.mark.parametrize("form", ["PNG", "TIFF", "packed TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_images_stand_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "packed TIFF": {"compression": "tiff_lzw"}}.get(form, {})
    if orientation in (0, 9):  # which libtiff does not write
        options.pop("compression", None)
    data = encoded(COLOURS, form.split()[-1], exif=exif, **options)
    expected = {
        2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
        5: COLOURS.swapaxes(0, 1), 6: np.rot90(COLOURS, -1), 7: COLOURS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(COLOURS),
    }.get(orientation, COLOURS)  # fmt: skip
    np.testing.assert_array_equal(pixels(data, 3, *expected.shape[:2]), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photograph_on_its_side(orientation: int) -> None:
    """A JPEG, resized: as Pillow turns it, within the rounding of a filter that goes the other way first."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(COLOURS).resize((320, 240), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = np.asarray(upright.resize((20, 20), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels(data, 3, 20, 20) - expected).max() <= 3


def test_damaged_exif_counts_as_none() -> None:
    data = encoded(COLOURS, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(data), COLOURS)


# Kinds of pixels

HALF = np.dstack([np.full((HEIGHT, WIDTH, 3), (255, 0, 0)), np.full((HEIGHT, WIDTH), 102)]).astype(np.uint8)
"""Red of two fifths."""


def palette_with_transparency() -> Any:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([9, 9, 9, 0, 0, 255])
    image.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    return image


def two_frames() -> bytes:
    frames = [Image.new("P", (WIDTH, HEIGHT), number) for number in (0, 1)]
    for frame in frames:
        frame.putpalette([0, 200, 0, 200, 0, 0])
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def grey16(bits: int) -> np.ndarray:
    return (RAMP.astype(np.uint16) << bits - 8) + 1


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in three channels, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def over_white(colour: tuple[int, int, int], alpha: float) -> list[int]:
    return [round(255 + alpha * (value - 255)) for value in colour]


GREY = np.repeat(RAMP[:, :, None], 3, axis=2)
KINDS: dict[str, tuple[Callable[[], bytes], Any]] = {
    "16 bits, PNG": (lambda: encoded(grey16(16), "PNG"), GREY),
    "16 bits, TIFF": (lambda: encoded(grey16(16), "TIFF"), GREY),
    "16 bits, PGM": (lambda: encoded(Image.fromarray(grey16(16).astype(np.int32)), "PPM"), GREY),
    "16 bits in colours": (lambda: deep_png(COLOURS.astype(np.uint16) * 256 + 1), COLOURS),
    "floats": (lambda: encoded((RAMP / np.float32(255)).astype(np.float32), "TIFF"), GREY),
    "RGBA": (lambda: encoded(HALF, "PNG"), over_white((255, 0, 0), 0.4)),
    "RGBA, WebP": (lambda: encoded(HALF, "WEBP", lossless=True, exact=True), over_white((255, 0, 0), 0.4)),
    "RGBA, clear": (lambda: encoded(HALF * np.uint8([1, 1, 1, 0]), "PNG"), [255, 255, 255]),
    "LA": (lambda: encoded(HALF[:, :, 2:], "PNG"), over_white((0, 0, 0), 0.4)),
    "a transparent colour": (
        lambda: encoded(np.full((HEIGHT, WIDTH, 3), 7, np.uint8), "PNG", transparency=(7, 7, 7)), [255] * 3,
    ),
    "a transparent grey": (
        lambda: encoded(np.full((HEIGHT, WIDTH), 7, np.uint8), "PNG", transparency=7), [255] * 3,
    ),
    "a palette": (lambda: encoded(palette_with_transparency(), "PNG"),
                  np.array([[[9, 9, 9]] * 4 + [[0, 0, 255]] * 4] * HEIGHT)),
    "a palette with transparency": (lambda: encoded(palette_with_transparency(), "PNG", transparency=0),
                                    np.array([[[255] * 3] * 4 + [[0, 0, 255]] * 4] * HEIGHT)),
    "a palette with half of it": (
        lambda: encoded(palette_with_transparency(), "PNG", transparency=bytes([255, 102])),
        np.array([[[9, 9, 9]] * 4 + [over_white((0, 0, 255), 0.4)] * 4] * HEIGHT),
    ),
    "an animation": (two_frames, [0, 200, 0]),
    "CMYK": (lambda: encoded(Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 0, 51)), "TIFF"), [204, 0, 204]),
    "CMYK, JPEG": (lambda: encoded(Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 0, 51)), "JPEG", quality=95),
                   [204, 0, 204]),
    "grey, JPEG": (lambda: encoded(np.full((HEIGHT, WIDTH), 90, np.uint8), "JPEG"), [90, 90, 90]),
    "WebP": (lambda: encoded(COLOURS, "WEBP", lossless=True), COLOURS),
    "one bit": (lambda: encoded(Image.new("1", (WIDTH, HEIGHT), 1), "PNG"), [255, 255, 255]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_every_kind_becomes(name: str) -> None:
    make, expected = KINDS[name]
    found = pixels(make()).astype(int)
    assert np.abs(found - np.broadcast_to(expected, found.shape)).max() <= 1  # rounding
    luma = pixels(make(), 1)[:, :, 0].astype(int)
    assert np.abs(luma - found @ [0.299, 0.587, 0.114]).max() <= 1


def test_every_reader_gives_the_same(tmp_path: Path) -> None:
    contents = {f"a/{number:02}.tif": make() for number, (make, _) in enumerate(KINDS.values())}
    folder = tmp_path / "folder"
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for mode in ("w", "w:gz", "w:xz"):
        file = tmp_path / f"x.tar{mode[1:].replace(':', '.')}"
        with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
            archive.add(folder, "x")
    shape = (3, 4, 5)
    specs = (folder, *tmp_path.glob("x.tar*"))
    places = np.arange(len(KINDS) - len(KINDS) // 10)  # the others are held out
    found = [open_data(spec, "train", shape).images(places).tobytes() for spec in specs]
    again = open_data(tmp_path / "x.tar.gz", "train", shape).images(places)
    assert len(specs) == 4 and set(found) == {again.tobytes()}


REFUSED = {
    "whole numbers of 32 bits": (lambda: encoded(RAMP.astype(np.int32) * 9999, "TIFF"), "what is white"),
    "with a sign": (lambda: encoded(RAMP.astype(np.int16) - 9, "TIFF"), "nothing says what is white"),
    "floats above 1": (lambda: encoded(RAMP.astype(np.float32), "TIFF"), "floats from 0 to 235 as pixels"),
    "not a number": (lambda: encoded(np.full((6, 8), np.nan, np.float32), "TIFF"), "floats from nan to nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(EdgeBcsError, match=message) as caught:
        pixels(make())
    assert "\n" not in str(caught.value)


# JPEG


def photograph(width: int, height: int, **options: Any) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return encoded(
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_without_its_end_is_truncated(options: dict[str, Any]) -> None:
    """Also where the blocks that never reached the medium read as zeros, which libjpeg decodes as grey."""
    whole = photograph(320, 240, quality=90, **options)
    pixels(whole)
    pixels(whole + bytes(5000))
    pixels(whole + b"something of the camera's")
    for kept in (len(whole) - 2, len(whole) * 9 // 10, len(whole) // 2, 700):
        for padded in (b"", bytes(len(whole) - kept), b"\xff" * (len(whole) - kept)):
            with pytest.raises(EdgeBcsError, match="truncated"):
                pixels(whole[:kept] + padded)


def test_a_png_without_its_end_or_with_a_wrong_checksum() -> None:
    whole = encoded(Image.fromarray(COLOURS).resize((400, 300)), "PNG")
    noise = encoded(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8), "PNG")
    for data in (whole, noise):
        pixels(data + b"something after it")
        for kept in (len(data) - 12, len(data) * 9 // 10, len(data) // 2):
            for padded in (b"", bytes(len(data) - kept)):
                with pytest.raises(EdgeBcsError, match=r"truncated|a checksum of the PNG differs"):
                    pixels(data[:kept] + padded)
    # In a stored block of deflate a pixel may change without a complaint but this one.
    stored = bytearray(encoded(COLOURS, "PNG", compress_level=0))
    stored[stored.index(b"IDAT") + 30] ^= 1
    with pytest.raises(EdgeBcsError, match="a checksum of the PNG differs"):
        pixels(bytes(stored))


def test_a_large_jpeg_is_decoded_near_the_size_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No closer than twice the network's input; about as it would have been."""
    image_class = type(Image.open(io.BytesIO(photograph(64, 64))))
    loaded: list[tuple[int, int]] = []
    load = image_class.load

    def spied(self: Any) -> Any:
        loaded.append(self.size)
        return load(self)

    monkeypatch.setattr(image_class, "load", spied)
    data = photograph(802, 602, quality=92)
    expected = {32: (101, 76), 64: (201, 151), 100: (401, 301), 150: (401, 301), 152: (802, 602)}
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    for side, size in expected.items():
        loaded.clear()
        found = pixels(data, 3, side, side).astype(int)
        assert loaded[0] == size
        exact = np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR))
        difference = np.abs(found - exact)
        assert difference.mean() < 1 and difference.max() < 12
        assert side != 152 or not difference.any()


# Memory

MEASURE = """
import io, os, sys
from PIL import Image
from edge_bcs.data import decoding
Image.init()
folder, memory, needs = sys.argv[1], decoding.memory_needed, []
decoding.memory_needed = lambda *arguments: needs.append(memory(*arguments)) or needs[-1]
def now(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
for name in sorted(os.listdir(folder)):
    with open(f"{folder}/{name}", "rb") as stream:
        data = stream.read()
    stream = io.BytesIO()  # what the first call loads
    Image.new("RGB", (64, 64)).save(stream, Image.open(f"{folder}/{name}").format)
    decoding.decode(stream.getvalue(), (3, 8, 8), "it")
    if not os.fork():
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = now("VmRSS")
        decoding.decode(data, (3, 200, 200), "it")
        print(name, needs[-1], now("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
def test_decoding_takes_no_more_than_was_asked_for(tmp_path: Path) -> None:
    """In a process of its own for each kind; a MiB or three of libraries come with the first use."""
    side = 1200
    small = np.random.default_rng(0).integers(0, 256, (side // 50, side // 50, 3), np.uint8)
    image = Image.fromarray(small).resize((side, side))
    kinds = {"l.png": "L", "p.png": "P", "rgba.png": "RGBA", "la.png": "LA", "cmyk.tif": "CMYK", "p.gif": "P"}
    for name in ("rgb.png", "rgb.webp", "rgb.bmp", "rgb.ppm", "rgb.tif", "rgb.jpg"):
        image.save(tmp_path / name, **({"compress_level": 1} if name.endswith("png") else {"method": 0}))
    image.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    image.save(tmp_path / "lzw.tif", compression="tiff_lzw", strip_size=1 << 30)
    Image.fromarray(np.zeros((side, side), np.uint16)).save(tmp_path / "i16.png")
    for name, mode in kinds.items():
        image.convert(mode).save(tmp_path / name, **({"compress_level": 1} if name.endswith("png") else {}))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 15, done.stderr
    for name, need, taken in lines:
        assert int(taken) <= int(need) + (4 << 20), name
        assert int(need) <= 4 * int(taken) + (16 << 20), name  # nor refused for nothing


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.ThisMachine, "free_memory", lambda self: 40 << 20)


@pytest.mark.usefixtures("little_memory")
def test_what_takes_more_than_half_of_what_is_free_is_refused() -> None:
    large = Image.new("RGB", (2500, 2200))
    message = (
        r"it \(2500×2200 pixels, PNG\) takes 22.0 MiB of memory to decode, and 20.0 MiB may be taken of the "
        "40.0 MiB that are free: make it smaller, or a JPEG"
    )
    with pytest.raises(EdgeBcsError, match=message):
        pixels(encoded(large, "PNG"))
    assert decode(encoded(large, "PNG"), (3, 8, 8), "it", share=0.9).shape == (3, 8, 8)
    pixels(encoded(large.resize((2000, 2200)), "PNG"))
    pixels(encoded(large.resize((4000, 3000)), "JPEG"))  # of which a 64th is decoded
    # Progressive, or with a pass for each colour: all of it is gathered before the first pixel.
    separate = bytearray(encoded(large, "JPEG"))
    separate[separate.index(b"\xff\xda") + 4] = 1
    for gathered in (encoded(large, "JPEG", progressive=True), bytes(separate)):
        with pytest.raises(EdgeBcsError, match=r"JPEG.* takes .* to decode"):
            pixels(gathered)


@pytest.mark.usefixtures("little_memory")
def test_a_tiff_in_one_tile_of_giant_size() -> None:
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 65536, 323: 65536, 324: 8, 325: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    small = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(EdgeBcsError, match=r"TIFF.* takes 4\.0 GiB of memory"):
        pixels(small)


def test_text_in_a_png_is_bounded() -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for number in range(8):
        text.add_text(f"text {number}", "x" * 1_000_000, zip=True)
    with pytest.raises(EdgeBcsError, match="damaged or truncated"):
        pixels(encoded(COLOURS, "PNG", pnginfo=text))
