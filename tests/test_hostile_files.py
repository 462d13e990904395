"""Files from elsewhere: damaged, declaring more than they are, or made to run something when read."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import random
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import decoding, open_data
from edge_bcs.data.decoding import decode

ROOT = Path(__file__).parents[1]
SHAPE = (3, 4, 4)
specification = importlib.util.spec_from_file_location(
    "fuzz_readers", Path(__file__).parent / "fuzz/readers.py"
)
assert specification and specification.loader
fuzz = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fuzz)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_files_get_one_sentence(target: str) -> None:
    """Cut off anywhere, with bytes changed, or with values of the form replaced: EdgeBcsError or nothing."""
    pytest.importorskip("scipy")
    chance = random.Random(0)
    form = fuzz.FORMS.get(target)
    refused = 0
    for seed in fuzz.seeds(target):
        fuzz.TARGETS[target](seed)
        for number in range(150):
            damaged = bytearray(seed)
            if form is not None and number % 3:
                damaged = bytearray(form(seed, chance))
            elif number % 3 == 1:
                del damaged[chance.randrange(len(seed)) :]
            else:
                for _ in range(chance.randrange(1, 4)):
                    damaged[chance.randrange(len(seed))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, 0x30])
            try:
                fuzz.TARGETS[target](bytes(damaged))
            except EdgeBcsError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 30


# Files that declare more than they are


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


IMAGE_BOMBS = {
    "PNG": png(100_000, 100_000),
    "a PNG below Pillow's own limit": png(9000, 9000),
    "JPEG": jpeg(65_000, 65_000),
    "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0) + b"\x2c" + bytes(4)
    + struct.pack("<HHB", 65_000, 65_000, 0) + b"\x02\x02\x4c\x01\x00\x3b",
    "PPM": b"P6 60000 60000 255\n",
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_BOMBS)
def test_image_bombs_are_refused_by_what_they_declare(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EdgeBcsError, match="pixels, which is refused"):
        decode(IMAGE_BOMBS[name], SHAPE, "it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_an_image_is_never_given_to_another_program(tmp_path: Path) -> None:
    """PostScript in a file called .png: Pillow would run Ghostscript on it."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(EdgeBcsError, match="not an image"):
        decode(content, SHAPE, "it")


def zipped(members: dict[str, bytes], declared: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


def npy(shape: tuple[int, ...], dtype: str, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


NPZ_FAULTS = {
    "labels without end": ({"y.npy": npy((1 << 40,), "<i8"), "x.npy": b""}, "at most"),
    "a bomb of labels": ({"y.npy": npy((1 << 27,), "<i8", bytes(1 << 24)), "x.npy": b""}, "at most"),
    "labels that are not there": ({"y.npy": npy((9,), "<i8", b"x" * 9), "x.npy": b""}, "is truncated"),
    "a negative size": ({"y.npy": npy((-1,), "<i8", bytes(64)), "x.npy": b""}, "impossible shape"),
    "a size that wraps": ({"y.npy": npy((1,), "|u1", b"x"), "x.npy": npy((1, 1 << 32, 1 << 32, 1), "|u1")},
                          "larger than 64 MiB"),
    "a large image": ({"y.npy": npy((1,), "<i8", bytes(8)), "x.npy": npy((1, 1 << 30), "|u1")}, "64 MiB"),
    "more than the disk takes": ({"y.npy": npy((1 << 20,), "|u1", bytes(1 << 20)),
                                  "x.npy": npy((1 << 20, 3, 100, 100), "|u1")}, "larger than 16 GiB"),
    "a bomb of images": ({"y.npy": npy((80,), "|u1", bytes(80)),
                          "x.npy": npy((80, 3, 4, 4), "|u1", bytes(80 << 20))}, "unpack to .*is refused"),
    "images that are not there": ({"y.npy": npy((99,), "|u1", bytes(99)),
                                   "x.npy": npy((99, 3, 4, 4), "|u1", b"x")}, "it has 129 bytes of 4880"),
    "labels beyond all numbers": ({"y.npy": npy((1,), "<u8", b"\xff" * 8),
                                   "x.npy": npy((1, 3, 4, 4), "|u1", bytes(48))}, "label 1844674407370955"),
    "an object array": ({"y.npy": npy((1,), "|O"), "x.npy": b""}, "array of numbers"),
    "a header that is code": ({"y.npy": b"\x93NUMPY\x01\x00\x20\x00__import__('os').system('true') \n",
                               "x.npy": b""}, "not a numpy array"),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ_FAULTS)
def test_npz_files_that_declare_too_much(tmp_path: Path, name: str) -> None:
    members, message = NPZ_FAULTS[name]
    (tmp_path / "x.npz").write_bytes(zipped(members))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EdgeBcsError, match=message):
        open_data(tmp_path / "x.npz", shape=SHAPE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of memory that some work takes at its peak, beyond what was taken before."""

    def now(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")
    before = now("VmRSS")
    work()
    return now("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize("kind", [".npz", ".mat"])
def test_a_million_tiny_images_in_a_tiny_file(tmp_path: Path, kind: str) -> None:
    """2 KB of zeros, which once were a Python object each: 170 MB, and many seconds."""
    count, file = 1_000_000, tmp_path / f"train_32x32{kind}"
    if kind == ".npz":
        np.savez_compressed(file, x=np.zeros((count, 1, 1, 1), np.uint8), y=np.zeros(count, np.uint8))
    else:
        savemat = pytest.importorskip("scipy.io").savemat
        content = {"X": np.zeros((1, 1, 1, count), np.uint8), "y": np.zeros((count, 1), np.uint8)}
        savemat(file, content, do_compression=True)
    assert file.stat().st_size < 8192
    assert peak_of(lambda: open_data(file, shape=(1, 1, 1))) < 64 << 20


def test_labels_take_no_more_than_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.ThisMachine, "free_memory", lambda self: 30 << 20)
    count = 400_000
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((count, 1, 1), np.uint8), y=np.zeros(count, np.uint8))
    with pytest.raises(EdgeBcsError, match=r"x\.npz takes 18\.7 MiB of memory to decode, and 15\.0 MiB may"):
        open_data(tmp_path / "x.npz", shape=(1, 1, 1))


def with_dictionary(content: bytes, bits: int) -> bytes:
    """An .xz that asks for another dictionary: the property of its only filter, and the header's checksum."""
    changed = bytearray(content)
    end = 12 + 4 * (content[12] + 1)  # the header of the block follows that of the stream
    changed[16] = 2 * (bits - 12)
    changed[end - 4 : end] = struct.pack("<I", zlib.crc32(changed[12 : end - 4]))
    return bytes(changed)


def test_an_xz_asks_for_no_more_memory_than_it_may(tmp_path: Path) -> None:
    """4 GiB for the dictionary, from the kilobyte of a tar."""
    file = tmp_path / "x.tar.xz"
    image_folder(tmp_path / "x")
    with tarfile.open(file, "w:xz") as archive:
        archive.add(tmp_path / "x", ".")
    content = file.read_bytes()
    assert len(open_data(file, shape=SHAPE)) == 4
    file.write_bytes(with_dictionary(content, 24) + bytes(8) + content)  # two in a row, as xz allows
    assert len(open_data(file, shape=SHAPE)) == 4
    file.write_bytes(with_dictionary(content, 30))
    with pytest.raises(EdgeBcsError, match="takes more than 256 MiB of memory to unpack"):
        open_data(file, shape=SHAPE)
    for damaged in (content[:-30], content[:100], content[:60] + b"x" + content[61:]):
        file.write_bytes(damaged)
        with pytest.raises(EdgeBcsError, match="truncated or not a tar archive"):
            open_data(file, shape=SHAPE)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extended_headers_of_a_tar_are_bounded(tmp_path: Path, suffix: str, kind: bytes) -> None:
    """Python's tarfile reads them whole: 300 MiB here, from 300 KiB of gzip."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 300 << 20
    content = member.tobuf(tarfile.USTAR_FORMAT)
    if suffix == ".tar.gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as packed:
            packed.write(content)
            for _ in range(30):
                packed.write(bytes(10 << 20))
        content = buffer.getvalue()
    (tmp_path / f"x{suffix}").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EdgeBcsError, match="extended header of more than 1 MiB"):
        open_data(tmp_path / f"x{suffix}", shape=SHAPE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_tar_that_unpacks_without_end(tmp_path: Path) -> None:
    member = tarfile.TarInfo("rest.bin")
    member.size = 100 << 30
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    with pytest.raises(EdgeBcsError, match="unpacks to more than 64 GiB"):
        open_data(tmp_path / "x.tar.gz", shape=SHAPE)


def test_a_mat_file_is_judged_by_what_it_declares(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    file = tmp_path / "train_32x32.mat"
    images = np.random.default_rng(0).integers(0, 255, (4, 4, 3, 9), np.uint8)
    for compress in (False, True):  # what scipy writes is read as scipy reads it
        content = {"other": "text", "X": images, "y": np.arange(1, 10)[:, None] + 1.0}
        scipy_io.savemat(file, content, do_compression=compress)
        data = open_data(file, shape=SHAPE)
        for found, number in zip(data.images(np.arange(len(data))), np.r_[0:9], strict=False):
            expected = images[..., number].transpose(2, 0, 1) / np.float32(255)
            if number < 8:
                np.testing.assert_allclose(found, expected, atol=1e-6)
        assert set(data.labels) <= set(range(10))
    scipy_io.savemat(file, {"X": images, "y": np.array([["a"]] * 9, object)})
    with pytest.raises(EdgeBcsError, match="has no labels y"):
        open_data(file, shape=SHAPE)
    whole = bytearray()
    scipy_io.savemat(file, {"X": images, "y": np.ones((9, 1))})
    whole += file.read_bytes()
    place = whole.index(struct.pack("<4i", 4, 4, 3, 9))
    whole[place : place + 16] = struct.pack("<4i", 1 << 30, 1 << 30, 3, 9)
    file.write_bytes(whole)
    with pytest.raises(EdgeBcsError, match="not a readable MATLAB file"):
        open_data(file, shape=SHAPE)
    bomb = {"X": np.zeros((32, 32, 3, 30_000), np.uint8), "y": np.ones((30_000, 1), np.uint8)}
    scipy_io.savemat(file, bomb, do_compression=True)
    with pytest.raises(EdgeBcsError, match="packed bytes declare that they are 921600"):
        open_data(file, shape=(3, 32, 32))


# Folders


def image_folder(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(png(4, 4, bytes(13 * 4)))
    return folder


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    (folder / "c").symlink_to(folder / "a")
    (folder / "b" / "more.png").symlink_to(folder / "a" / "0.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(open_data(tmp_path / "link", shape=SHAPE)) == 3 * 2 + 1


@pytest.mark.parametrize("link", ["a/9.png", "z", "train"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, link: str) -> None:
    folder = image_folder(tmp_path / "data")
    outside = image_folder(tmp_path / "outside")
    (folder / link).symlink_to(outside / "a" / "0.png" if link.endswith("png") else outside)
    with pytest.raises(EdgeBcsError, match="is a link out of"):
        open_data(folder, shape=SHAPE)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    os.mkfifo(folder / "a" / "pipe.png")
    with pytest.raises(EdgeBcsError, match="is not a file"):
        open_data(folder, shape=SHAPE)


# Graphs


def test_a_graph_is_operators_of_ours_and_nothing_else() -> None:
    onnx = pytest.importorskip("onnx")
    from edge_bcs.runtime.onnx_file import require_operators

    helper = onnx.helper
    ours = helper.make_node("PackInput", ["x"], ["y"], domain="edge_bcs", lanes=1, halo=0)

    def refused(nodes: list[Any], message: str, change: Callable[[Any], Any] = lambda model: None) -> None:
        values = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge_bcs", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        require_operators(
            helper.make_model(helper.make_graph([ours], "g", *[[v] for v in values])).SerializeToString(),
            "edge_bcs",
            "it",
        )
        change(model)
        with pytest.raises(EdgeBcsError, match=message):
            require_operators(model.SerializeToString(), "edge_bcs", "it")

    refused([helper.make_node("Relu", ["x"], ["y"])], "holds the operator ':Relu'")
    refused([helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")], "com.microsoft:FusedConv")
    weights = helper.make_tensor("w", 1, [1], [1.0])
    refused([ours], "field 5 of its graph", lambda model: model.graph.initializer.append(weights))
    body = helper.make_graph([ours], "body", [], [])
    looping = helper.make_node("PackInput", ["x"], ["y"], domain="edge_bcs", body=body)
    refused([looping], "field 6 of its attribute")
    constant = helper.make_node("PackInput", ["x"], ["y"], domain="edge_bcs", value=weights)
    refused([constant], "field 5 of its attribute")
    function = helper.make_function("edge_bcs", "PackInput", ["x"], ["y"], [], [])
    refused([ours], "field 25 of its model", lambda model: model.functions.append(function))

    def two_domains(model: Any) -> None:
        model.graph.node[0].ParseFromString(
            model.graph.node[0].SerializeToString() + b"\x3a\x00"
        )  # a second domain, "": readers of protobuf use the last

    # Rewritten by protobuf, the last one stays; the raw bytes have both.
    node = ours.SerializeToString() + b"\x3a\x00"
    content = b"\x3a" + bytes([len(node) + 2]) + b"\x0a" + bytes([len(node)]) + node
    with pytest.raises(EdgeBcsError, match="which is not of edge_bcs"):
        require_operators(content, "edge_bcs", "it")
    refused([ours], "holds the operator", two_domains)


def test_an_artifact_with_another_operator_is_refused(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    onnx = pytest.importorskip("onnx")
    from edge_bcs.runtime.artifact import sha256_of
    from edge_bcs.runtime.trainer import Trainer

    folder = shutil.copytree(tiny_artifact(), tmp_path / "hostile")
    file = folder / "eval_model.onnx"
    model = onnx.load(file)
    model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["more"]))
    onnx.save(model, file)
    text = (folder / "manifest.json").read_text()
    described = __import__("json").loads(text)["files"]["eval_model.onnx"]
    text = text.replace(described["sha256"], sha256_of(file))
    text = text.replace(f'"bytes": {described["bytes"]}', f'"bytes": {file.stat().st_size}')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(EdgeBcsError, match="holds the operator ':Identity'"):
        Trainer(folder)
