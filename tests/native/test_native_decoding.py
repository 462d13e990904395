"""The decoder of edge-bcs-run against the one of Python: the same pixels, the same files refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_decoder import ENOUGH, chunk, decoded, png

from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.data.decoding import decode
from edge_bcs.data.faults import BadImageError

Image = pytest.importorskip("PIL.Image")
Save = Callable[..., None]
WIDTH, HEIGHT = 161, 97


def picture(width: int = WIDTH, height: int = HEIGHT) -> Any:
    """An image of soft colours."""
    small = np.random.default_rng(0).integers(0, 256, (13, 17, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def turned(number: int) -> bytes:
    """EXIF data with this orientation."""
    exif = Image.Exif()
    exif[0x0112] = number
    return bytes(exif.tobytes())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Image files of every kind that is read."""
    folder, image, made = tmp_path_factory.mktemp("images"), picture(), []

    def save(kind: Any, name: str, **how: Any) -> None:
        kind.save(folder / name, **how)
        made.append(folder / name)

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        made.append(folder / name)

    for sampling in (0, 1, 2):
        save(image, f"sampled{sampling}.jpg", subsampling=sampling)
        save(image, f"progressive{sampling}.jpg", subsampling=sampling, progressive=True)
    save(image.convert("L"), "grey.jpg")
    save(image.convert("CMYK"), "cmyk.jpg")
    save(picture(1301, 777), "large.jpg")
    save(picture(777, 1301), "tall.jpg")
    for number in range(1, 9):
        save(image, f"turned{number}.jpg", exif=turned(number))
        save(image, f"turned{number}.png", exif=turned(number))
    grey, palette = image.convert("L"), image.quantize(7)
    for mode in ("1", "L", "P", "RGB"):
        save(image.convert(mode), f"{mode}.png")
    clear = Image.fromarray(np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint8))
    for mode in ("RGBA", "LA"):
        with_alpha = image.convert(mode)
        with_alpha.putalpha(clear)
        save(with_alpha, f"{mode}.png")
    for bits in (1, 2, 4):
        save(image.quantize(1 << bits), f"palette{bits}.png", bits=bits)
    save(image.convert("P"), "clear-in-palette.png", transparency=5)
    save(palette, "half-clear-in-palette.png", transparency=bytes([0, 100, 255, 3]))
    save(grey, "clear-grey.png", transparency=grey.getpixel((0, 0)))
    save(image, "clear-colour.png", transparency=image.getpixel((3, 3)))
    save(image.convert("1"), "clear-black.png", transparency=0)
    save(image.convert("1"), "clear-white.png", transparency=1)
    pixels, draws = np.asarray(image), np.random.default_rng(1)
    write("interlaced.png", png(pixels, 2, interlaced=True))
    write("interlaced-grey.png", png(np.asarray(grey)[:, :, None], 0, interlaced=True))
    for name, colour_type, channels in (
        ("grey", 0, 1),
        ("colour", 2, 3),
        ("grey-alpha", 4, 2),
        ("alpha", 6, 4),
    ):
        deep = draws.integers(0, 256, (HEIGHT, WIDTH, 2 * channels)).astype(np.uint8)
        write(f"deep-{name}.png", png(deep, colour_type, depth=16))
    exif_behind = chunk(b"eXIf", turned(6)[6:])
    write("turned-behind.png", png(pixels, 2, after=exif_behind))
    return made


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48), (3, 224, 200)])
@pytest.mark.parametrize("resize", [SQUASH, Resize(0.875)], ids=["squash", "crop"])
def test_pixels_are_those_of_python(files: list[Path], shape: tuple[int, int, int], resize: Resize) -> None:
    for file, found in zip(files, decoded(files, shape, resize.crop), strict=True):
        assert not isinstance(found, str), (file.name, found)
        assert (found == decode(file.read_bytes(), shape, "it", resize=resize)).all(), file.name


def test_damaged_files_are_refused_as_by_python_and_harm_nothing(files: list[Path], tmp_path: Path) -> None:
    """Cut off, changed, with parts missing; the program runs under sanitizers."""
    draws, damaged = np.random.default_rng(2), []
    for file in files:
        if file.name == "large.jpg":
            continue
        for attempt in range(6):
            content = bytearray(file.read_bytes())
            place = int(draws.integers(0, len(content)))
            if attempt < 2:
                del content[place:]
            elif attempt < 4:  # in the header, where most is decided
                content[int(draws.integers(2, min(600, len(content))))] = int(draws.integers(0, 256))
            elif attempt < 5:
                content[place] ^= 1 << int(draws.integers(0, 8))
            else:
                del content[place : place + int(draws.integers(1, 40))]
            damaged.append(tmp_path / f"{attempt}-{file.name}")
            damaged[-1].write_bytes(content)
    refused = 0
    for file, found in zip(damaged, decoded(damaged, (3, 24, 24)), strict=True):
        try:
            wanted = decode(file.read_bytes(), (3, 24, 24), "it")
        except BadImageError:
            refused += 1
            continue
        if not isinstance(found, str):
            assert (found == wanted).all(), file.name
    assert refused > 100


def test_what_is_cut_off_is_named_as_such(files: list[Path], tmp_path: Path) -> None:
    cut = []
    for name in ("sampled2.jpg", "progressive2.jpg", "RGB.png", "interlaced.png"):
        content = next(file for file in files if file.name == name).read_bytes()
        for share in (0.3, 0.9, 1):
            cut.append(tmp_path / f"{share}-{name}")
            cut[-1].write_bytes(content[: int(share * len(content)) - 2])
    # The blocks of a JPEG that never reached the medium: its size is right, and its end is zeros.
    content = files[0].read_bytes()
    cut.append(tmp_path / "zeros.jpg")
    cut[-1].write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    for file, found in zip(cut, decoded(cut, (3, 24, 24)), strict=True):
        assert isinstance(found, str) and "is truncated: the end of the" in found, (file.name, found)


def test_an_image_in_passes_that_needs_more_memory_than_the_plan_has_is_named(tmp_path: Path) -> None:
    image = picture(1000, 700)
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.save(tmp_path / "baseline.jpg")
    (tmp_path / "interlaced.png").write_bytes(png(np.asarray(image), 2, interlaced=True))
    named = [tmp_path / name for name in ("progressive.jpg", "interlaced.png", "baseline.jpg")]
    progressive, interlaced, baseline = decoded(named, (3, 24, 24))
    assert isinstance(progressive, str) and isinstance(interlaced, str) and not isinstance(baseline, str)
    assert progressive.startswith("(1000×700 pixels, a progressive JPEG) takes 2200320 bytes")
    assert progressive.endswith("make it smaller, or save it without progression")
    assert interlaced.startswith("(1000×700 pixels, an interlaced PNG) takes 2100000 bytes")
    with_memory = decoded(named, (3, 24, 24), workspace=8 << 20)
    assert (with_memory[0] == decode(named[0].read_bytes(), (3, 24, 24), "it")).all()
    assert (with_memory[1] == decode(named[1].read_bytes(), (3, 24, 24), "it")).all()


@pytest.mark.parametrize("workspace", [0, 100, 20_000])
def test_too_little_memory_is_told(files: list[Path], workspace: int) -> None:
    for found in decoded([files[0], files[-1]], (3, 24, 24), workspace=workspace):
        assert isinstance(found, str) and "memory" in found


def test_what_is_no_jpeg_or_png_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "it.gif")
    (tmp_path / "empty.jpg").write_bytes(b"")
    huge = png(np.zeros((1, 1, 3), np.uint8), 2).replace(
        chunk(b"IHDR", bytes([0, 0, 0, 1] * 2) + bytes([8, 2, 0, 0, 0])),
        chunk(b"IHDR", bytes([0, 1, 0, 0] * 2) + bytes([8, 2, 0, 0, 0])),
    )
    (tmp_path / "huge.png").write_bytes(huge)
    gif, empty, large = decoded([tmp_path / name for name in ("it.gif", "empty.jpg", "huge.png")], (3, 8, 8))
    assert gif == empty == "is neither a JPEG nor a PNG, and other images are not read here"
    assert large == "declares 65536×65536 pixels, which is refused"


def test_a_workspace_for_what_cameras_make(tmp_path: Path) -> None:
    """12 megapixels, from which a quarter of the width is decoded, and all of it for a large input."""
    picture(4032, 3024).save(tmp_path / "camera.jpg")
    for shape in ((3, 224, 224), (3, 1200, 1600)):
        found = decoded([tmp_path / "camera.jpg"], shape, workspace=ENOUGH)[0]
        assert (found == decode((tmp_path / "camera.jpg").read_bytes(), shape, "it")).all()
