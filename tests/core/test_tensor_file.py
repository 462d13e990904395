"""Our safetensors files: what safetensors writes is read, what is no such file is refused, and what is
written is what safetensors would write."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TESTS
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_bcs.core.tensor_file import TensorFile, write_tensors

Array = np.ndarray[Any, Any]
TENSORS: dict[str, Array] = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "index": np.array([1, 5, 9], np.int32),
    "none": np.zeros((0, 4), np.float32),
    "scalar": np.array(0.25),
    "truth": np.array([True, False, True]),
    "value": np.linspace(-1, 1, 7, dtype=np.float32),
}


def written(folder: Path, content: bytes, name: object = "x") -> Path:
    file = folder / f"{name}.safetensors"
    file.write_bytes(content)
    return file


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    with TensorFile(written(tmp_path, save(TENSORS, {"a": "ä\n", "step": "3"}))) as stored:
        assert stored.metadata == {"a": "ä\n", "step": "3"} and stored.tensors.keys() == TENSORS.keys()
        for name, expected in TENSORS.items():
            found = stored.read(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert np.array_equal(found, expected)
        given = np.zeros(7, np.float32)
        assert stored.read("value", given) is given and np.array_equal(given, TENSORS["value"])
        for other in (np.zeros(7), np.zeros(6, np.float32)):
            with pytest.raises(ValueError, match="value is F32"):
                stored.read("value", other)


def parts(content: bytes) -> tuple[int, Any, bytes]:
    """(bytes of the header, what it says, what lies behind it) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length]), content[8 + length :]


def test_what_is_written_is_what_safetensors_writes() -> None:
    types = ("u1", "i1", "?", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")
    tensors = {f"of {kind}": np.arange(3).astype(kind) for kind in types} | TENSORS
    tensors["turned"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    metadata = {"step": "3", "a": "ä", "m": "x"}
    stream = io.BytesIO()
    size = write_tensors(stream, tensors, metadata)
    length, header, data = parts(stream.getvalue())
    assert (header, data) == parts(save({**tensors, "turned": tensors["turned"].copy()}, metadata))[1:]
    assert (length % 8, size) == (0, len(stream.getvalue()))
    again = io.BytesIO()
    write_tensors(again, dict(reversed(tensors.items())), dict(sorted(metadata.items())))
    assert again.getvalue() == stream.getvalue()


def test_writing_takes_no_second_copy(tmp_path: Path) -> None:
    array = np.ones(1 << 20, np.float32)
    with (tmp_path / "x").open("wb") as stream:
        tracemalloc.start()
        write_tensors(stream, {"value": array}, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def with_header(header: str | bytes, data: int = 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry()}
FAULTS: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x10\0\0",
    "a length beyond the end": with_header("{}", 0, 1 << 40),
    "the largest length": with_header("{}", 0, 2**64 - 1),
    "no JSON": with_header("{a", 0),
    "a list": with_header("[]", 0),
    "leading blanks": with_header(" " + json.dumps(GOOD)),
    "UTF-16": with_header(json.dumps(GOOD).encode("utf-16-le")),
    "half a surrogate pair": with_header('{"\\ud800": ' + json.dumps(entry()) + "}"),
    "half a pair in the metadata": with_header('{"__metadata__": {"a": "\\ud800"}}', 0),
    "without end": with_header('{"a": ' + "[" * 100_000),
    "metadata of numbers": with_header(json.dumps({"__metadata__": {"a": 1}, **GOOD})),
    "metadata of lists": with_header(json.dumps({"__metadata__": ["a"], **GOOD})),
    "a name twice": with_header(json.dumps({"a": entry(), "b": entry()}).replace('"b"', '"a"')),
    "no tensor": with_header(json.dumps({"a": 5})),
    "no shape": with_header(json.dumps({"a": {"dtype": "F32", "data_offsets": [0, 8]}})),
    "an unknown type": with_header(json.dumps({"a": entry("F33")})),
    "a type that is no text": with_header(json.dumps({"a": entry(["F32"])})),
    "a negative size": with_header(json.dumps({"a": entry(shape=[-2])})),
    "a size that is true": with_header(json.dumps({"a": entry("F64", [True])})),
    "a size of 2.0": with_header(json.dumps({"a": entry(shape=[2.0])})),
    "a size of many digits": with_header(json.dumps(GOOD).replace("[2]", "[" + "9" * 5000 + "]")),
    "a size that wraps": with_header(json.dumps({"a": entry(shape=[2**62, 2**3, 2])})),
    "axes without end": with_header(json.dumps({"a": entry(shape=[1] * 1000 + [2])})),
    "one offset": with_header(json.dumps({"a": entry(offsets=[8])})),
    "offsets backwards": with_header(json.dumps({"a": entry(offsets=[8, 0])})),
    "offsets beyond the end": with_header(json.dumps({"a": entry(offsets=[8, 16])})),
    "a hole": with_header(json.dumps({"a": entry(shape=[1], offsets=[0, 4]),
                                      "b": entry(shape=[1], offsets=[8, 12])}), 12),
    "a hole at the beginning": with_header(json.dumps({"a": entry(shape=[1], offsets=[4, 8])})),
    "an overlap": with_header(json.dumps({"a": entry(), "b": entry(offsets=[4, 12])}), 12),
    "the same bytes twice": with_header(json.dumps({"a": entry(), "b": entry()})),
    "a byte too few": with_header(json.dumps(GOOD), 7),
    "a byte too many": with_header(json.dumps(GOOD), 9),
    "another size than its shape has": with_header(json.dumps({"a": entry(shape=[3])})),
}  # fmt: skip


def refused_by_safetensors(file: Path) -> bool:
    try:
        with safe_open(str(file), framework="numpy"):
            return False
    except (SafetensorError, OSError):
        return True


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, FAULTS[name])
    with pytest.raises(ValueError) as caught:
        TensorFile(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    if name not in ("leading blanks", "a name twice", "axes without end"):  # safetensors reads those
        assert refused_by_safetensors(file)


def test_it_is_as_strict_as_safetensors(tmp_path: Path) -> None:
    """Of files changed at random, header values and bytes, it reads none that safetensors refuses."""
    import importlib.util

    place = TESTS / "fuzz/readers.py"
    specification = importlib.util.spec_from_file_location("fuzz_tensors", place)
    assert specification and specification.loader
    fuzz = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fuzz)
    chance, counts = random.Random(0), [0, 0]
    whole = save(TENSORS, {"step": "3"})
    for number in range(900):
        content = bytearray(fuzz.mutate_safetensors(whole, chance))
        if number % 2:
            content[chance.randrange(min(len(content), 300))] = chance.randrange(256)
        file = written(tmp_path, bytes(content), number)
        try:
            with TensorFile(file) as stored:
                for name in stored.tensors:
                    stored.read(name)
        except ValueError:
            counts[0] += 1
        else:
            counts[1] += 1
            assert not refused_by_safetensors(file), bytes(content)
    assert min(counts) > 100


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """A tensor of 4 MiB goes from the file into the array that is there for it."""
    file = written(tmp_path, save({"a": np.arange(1 << 20, dtype=np.int32)}))
    given = np.zeros(1 << 20, np.int32)
    tracemalloc.start()
    try:
        with TensorFile(file) as stored:
            stored.read("a", given)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert np.array_equal(given, np.arange(1 << 20))


def test_reads_that_give_less_than_asked_for_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Slow(io.FileIO):
        """Seven bytes at a time, as a network file system or a signal may have it."""

        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:7]) or 0

    file = written(tmp_path, save(TENSORS))
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Slow(self))
    with TensorFile(file) as stored:
        assert all(np.array_equal(stored.read(name), TENSORS[name]) for name in TENSORS)
