"""One encoded image into pixels: any kind that Pillow reads safely, in memory that is known beforehand.

| image | pixels |
| --- | --- |
| EXIF orientation (also of PNG, WebP, TIFF) | turned and mirrored as it says |
| transparency (RGBA, LA, a palette's or PNG's transparent colour) | laid over white |
| palette, CMYK, YCbCr, 1 bit | Pillow's conversion; colour profiles are not looked at |
| 16 bits a channel (PNG, TIFF, PPM), 12 (TIFF) | the upper 8 |
| TIFF of floats | 0 is black and 1 white; other values are refused |
| TIFF of 32-bit or signed whole numbers | refused: nothing says what is white |
| animation (GIF, PNG, WebP), several pages | the first picture |

Whatever is larger than the network's input is resized, bilinearly over all pixels that fall into one: both
sides, or a crop from the middle with the input's proportions (`edge_bcs.core.resizing`). Of a JPEG at least
four times as large, only a half, a quarter or an eighth of the size is decoded, which is still at least twice
the network's input: faster, in a fraction of the memory, and within some grey levels of the whole.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.machine import ThisMachine
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.units import format_bytes
from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.faults import BadImageError
from edge_bcs.data.resampling import Resizer

LARGEST_FILE = 64 << 20
_LARGEST_PIXELS = 64 << 20
_LARGEST_TEXT = 4 << 20
_LEAST_TRAP, _MOST_PACKED = 64 << 20, 250
SMALL = 8 << 20
"""Bytes that decoding takes without asking what is free, and in several threads at once."""
# Pillow knows many more by their content, whatever their names, and gives some (PostScript) to programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_SIDEWAYS = 5
_BITS, _ROWS, _TILE_WIDTH, _TILE_LENGTH = 258, 278, 322, 323  # TIFF tags
# What formats take for each pixel beside the image itself (measured), rare cases included: WebP's canvases,
# and run lengths in BMP and text in PPM, which Pillow gathers in Python.
_BYTES_BESIDE = {"WEBP": 16, "BMP": 2, "PPM": 8, "GIF": 1}
_STRIP = 1 << 16  # pixels that are converted at a time
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# The first byte after 0xFF that is neither data nor padding nor one of the marks between intervals.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
_large = threading.RLock()


def require_memory(
    need: int, what: str, remedy: str, share: float = 0.5, kind: type[EdgeBcsError] = EdgeBcsError
) -> None:
    """Raise an error of this kind if ``need`` bytes are more than a share of the memory that is free now.

    Args:
        need: bytes. what: begins the sentence, such as "x.npz". remedy: ends it.
        share: of what is free; what the machine does not tell is not limited.
    """
    free = None if need <= SMALL else ThisMachine().free_memory()
    if free is not None and need > share * free:
        part = f"{format_bytes(round(share * free))} may be taken of the " if share < 1 else "only "
        raise kind(
            f"{what} takes {format_bytes(need)} of memory to decode, and {part}{format_bytes(free)} that "
            f"are free: {remedy}."
        )


def one_at_a_time(size: int) -> contextlib.AbstractContextManager[Any]:
    """A block in which no other thread is if this one takes more than 8 MiB for ``size`` bytes."""
    return _large if size > SMALL else contextlib.nullcontext()


def is_trap(declared: int, packed: int) -> bool:
    """Whether so few packed bytes that declare to be so many are meant to fill a disk: more than 64 MiB, and
    250 times as many. Drawings of two colours come to 120 times as many, photographs to twice."""
    return declared > max(_LEAST_TRAP, _MOST_PACKED * packed)


def decode(data: bytes, shape: Shape, source: str, share: float = 0.5, resize: Resize = SQUASH) -> Array:
    """Return the pixels u8 [C, H, W] of an encoded image, resized to ``shape``, as the module's table says.

    Args:
        data: the file. shape: C is 1 (grey) or 3. source: begins every sentence about it.
        share: of the free memory that this may take, where it takes more than 8 MiB.
        resize: how it is brought to ``shape``.

    Raises:
        BadImageError: it is damaged, truncated or of a kind that is not read, declares more than 64 Mi
            pixels, or takes more memory than ``share`` allows.
        EdgeBcsError: Pillow is missing.
    """
    with quietly():
        return decode_aloud(data, shape, source, share, resize)


def decode_aloud(
    data: bytes, shape: Shape, source: str, share: float = 0.5, resize: Resize = SQUASH
) -> Array:
    """`decode` without silencing Pillow, which a caller with several threads does once, by `quietly`."""
    image_module = _pillow()
    from PIL import UnidentifiedImageError

    try:
        with image_module.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _pixels(image, data, shape, source, share, resize)
    except UnidentifiedImageError:
        raise BadImageError(f"{source} is not an image that Pillow can read.") from None
    except image_module.DecompressionBombError:
        raise BadImageError(f"{source} declares far too many pixels, which is refused.") from None
    except MemoryError:
        raise BadImageError(f"{source} takes more memory to decode than there is: make it smaller.") from None
    except EdgeBcsError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise BadImageError(f"{source} is damaged or truncated ({reason(error)}).") from None


def reason(error: Exception) -> str:
    """What another library says of a fault, in one line that is not long."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise EdgeBcsError("reading image files needs Pillow: run `pip install pillow`.") from None
    return Image


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings about what is damaged, of which all that matters ends in an exception, and
    with less text in a PNG than the 64 MiB that it would unpack."""
    _pillow()
    from PIL import PngImagePlugin

    before = PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_MEMORY = min(before, _LARGEST_TEXT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        PngImagePlugin.MAX_TEXT_MEMORY = before


def _pixels(image: Any, data: bytes, shape: Shape, source: str, share: float, resize: Resize) -> Array:
    image_module = _pillow()
    channels, height, width = shape
    whole = image.size
    if whole[0] * whole[1] > _LARGEST_PIXELS:
        raise BadImageError(f"{source} declares {whole[0]}×{whole[1]} pixels, which is refused.")
    jpeg = data[:2] == b"\xff\xd8"
    drafted = None
    if jpeg:  # twice the network's input is left for the filter, however the image is turned
        side = math.ceil(2 * max(height, width) / (resize.crop or 1))
        drafted = image.draft("", (side, side))
    mode = "L" if channels == 1 else "RGB"
    need = memory_needed(image, data, whole)
    remedy = "make it smaller" + (
        "" if jpeg else ", or a JPEG, which can be decoded at a fraction of its size"
    )
    described = f"{source} ({whole[0]}×{whole[1]} pixels, {image.format})"
    require_memory(need, described, remedy, share, BadImageError)
    _require_whole(image, data, source)
    with one_at_a_time(need):
        image.load()
        orientation = _orientation(image)
        # The last pixels of a draft may stand for less than a whole one.
        extent = drafted[1][2:] if drafted else (float(image.width), float(image.height))
        size = (height, width) if orientation >= _SIDEWAYS else (width, height)
        with Resizer(image.size, channels, resize.box(extent, size), size) as resizer:
            for strip in _flat_strips(image, mode, source):
                resizer.take(np.asarray(strip))
        pixels = resizer.result
        if orientation in _TURNS:
            small = image_module.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
            turned = small.transpose(getattr(image_module.Transpose, _TURNS[orientation]))
            pixels = np.array(turned, np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _orientation(image: Any) -> int:
    """EXIF's number of how a loaded image is turned; 1, upright, where nothing that can be read says."""
    if image.format == "TIFF":  # which Pillow turns when it is loaded
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # what lies beside an image may be damaged in any way
        return 1
    return orientation if orientation in _TURNS else 1


def memory_needed(image: Any, data: bytes, whole: tuple[int, int]) -> int:
    """Bytes that decoding takes at most beside the file: the image, what its format takes for itself, and a
    strip of it that is converted."""
    pixels = image.width * image.height
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    need: int = pixels * (stored + _BYTES_BESIDE.get(image.format, 0)) + 16 * min(pixels, _STRIP)
    if data[:2] == b"\xff\xd8" and _is_gathered(data):
        need += 2 * whole[0] * whole[1] * len(image.getbands())
    if image.format in ("TIFF", "WEBP"):
        need += len(data)
    if image.format == "TIFF":
        need += _piece_of_tiff(image)
    return need


def _piece_of_tiff(image: Any) -> int:
    """Bytes of a strip or tile, which are unpacked whole."""
    tags = image.tag_v2
    bits = tags.get(_BITS, (1,))
    depth = sum(bits) if len(bits) <= 8 else 64
    width = tags.get(_TILE_WIDTH) or image.width
    length = tags.get(_TILE_LENGTH) or min(tags.get(_ROWS) or image.height, image.height)
    return int(width) * int(length) * int(depth) // 8


def _is_gathered(jpeg: bytes) -> bool:
    """Whether a JPEG comes in several passes over the image, so that all of it is gathered first."""
    components, place = 0, 2
    while True:
        found = _MARKER.search(jpeg, place)
        if found is None or found.end() + 8 > len(jpeg):
            return False
        marker, place = found[1][0], found.end()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            components = jpeg[place + 7]
            if marker not in (0xC0, 0xC1):
                return True
        elif marker == 0xDA:
            return jpeg[place + 2] < components
        place += int.from_bytes(jpeg[place : place + 2], "big")


def _ends(jpeg: bytes) -> bool:
    """Whether a JPEG has its end, perhaps with something after it.

    What is cut off and filled with zeros (a file whose last blocks never reached the medium) decodes without
    a complaint, grey below.
    """
    if jpeg[-2:] == b"\xff\xd9":
        return True
    place = 2
    while True:
        found = _MARKER.search(jpeg, place)
        if found is None:
            return False
        if found[1] == b"\xd9":
            return True
        place = found.end()
        place += int.from_bytes(jpeg[place : place + 2], "big")


def _require_whole(image: Any, data: bytes, source: str) -> None:
    """Raise BadImageError for what Pillow decodes although something is missing, where the format tells."""
    if data[:2] == b"\xff\xd8" and not _ends(data):
        raise BadImageError(f"{source} is truncated: the end of the JPEG is missing.")
    place, view = 8, memoryview(data)
    while image.format == "PNG":
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        if len(data) < end + 4:
            raise BadImageError(f"{source} is truncated: the end of the PNG is missing.")
        kind, check = data[place + 4 : place + 8], int.from_bytes(view[end : end + 4], "big")
        # What begins with a small letter is beside the image, and Pillow's to judge.
        if not kind[:1].islower() and zlib.crc32(view[place + 4 : end]) != check:
            raise BadImageError(f"{source} is damaged: a checksum of the PNG differs.")
        if kind == b"IEND":
            return
        place = end + 4


def _transparent(image: Any) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _flat_strips(image: Any, mode: str, source: str) -> Iterator[Any]:
    """A loaded image in the mode "L" or "RGB", in strips from the top on, so that there is no copy of it."""
    plain = image.mode == mode and not _transparent(image)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield strip if plain else _flat_strip(strip, image, mode, source)


def _flat_strip(strip: Any, image: Any, mode: str, source: str) -> Any:
    image_module = _pillow()
    if strip.mode.startswith("I;16") or strip.mode == "I":
        bits = 16
        if image.format == "TIFF":
            depth = image.tag_v2.get(_BITS, (32,))
            if strip.mode == "I" or depth not in ((16,), (12,)):
                raise BadImageError(
                    f"{source} has whole numbers of 32 bits or with a sign as pixels, and nothing says what "
                    "is white: save it with 8 or 16 bits."
                )
            bits = depth[0]
        grey = (np.asarray(strip).astype(np.int32) >> bits - 8).clip(0, 255).astype(np.uint8)
        return image_module.fromarray(grey).convert(mode)
    if strip.mode == "F":
        values = np.asarray(strip)
        if not (values.min() >= 0 and values.max() <= 1):  # nor what is not a number
            raise BadImageError(
                f"{source} has floats from {values.min():g} to {values.max():g} as pixels, and 0 to 1 was "
                "expected."
            )
        return image_module.fromarray(np.rint(values * 255).astype(np.uint8)).convert(mode)
    try:
        if _transparent(image):
            clear = strip.convert("RGBA")
            strip = image_module.new("RGB", strip.size, (255, 255, 255))
            strip.paste(clear, mask=clear)
        return strip.convert(mode)
    except ValueError:
        raise BadImageError(f"{source} has pixels of the kind {strip.mode}, which are not read.") from None
