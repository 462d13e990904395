"""Files that somebody damaged or made: the C interface says so in one sentence, and nothing else happens.

`make test-sanitized` runs this with a library that is built with sanitizers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from helpers.c_interface import ERROR, CError, Network

from edge_bcs.core.text import shown

Make = Callable[..., Path]
NAMES = ("manifest.json", "program.bin", "state.safetensors")
Files = dict[str, bytes]
ROUNDS = 300


@pytest.fixture
def files(tiny_artifact: Make) -> Files:
    path = tiny_artifact()
    return {name: (path / name).read_bytes() for name in NAMES}


@pytest.fixture
def run_files(tiny_artifact: Make, tmp_path: Path) -> Files:
    """Of a run, whose manifest does not list its state."""
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit((np.zeros((4, 1, 8, 8), np.uint8), np.arange(4)), steps=1, progress=False)
        trainer.save(tmp_path / "run")
    return {name: (tmp_path / "run" / name).read_bytes() for name in NAMES}


def refused(files: Files) -> str:
    """The sentence with which files are refused."""
    with pytest.raises(CError) as error:
        Network.of_files(files).close()
    assert error.value.status == ERROR
    text = str(error.value)
    assert text and shown(text) == text and len(text) < 2000
    return text


def changed(content: bytes, rng: random.Random) -> bytes:
    """The content with some bytes changed, cut off, doubled or put in."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, size = rng.randrange(len(made)), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[place : place + size]
        elif kind == 2:
            made[place:place] = made[place : place + size]
        elif kind == 3:
            made[place : place + size] = rng.randbytes(size)
        else:
            made[place:place] = rng.choice(
                (b"\0", b'"', b"{", b"]", b"9" * 20, b"-1", b"\xff", b"1e999", b"\\u")
            )
        if not made:
            return b""
    return bytes(made)


def sealed(files: Files, content: Files) -> Files:
    """``files`` with other ``content``, which the manifest lists as it then is."""
    manifest = json.loads(files["manifest.json"])
    for name, data in content.items():
        if name in manifest["files"]:
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return {**files, **content, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize("name", NAMES)
def test_every_changed_byte_is_noticed(files: Files, name: str) -> None:
    rng = random.Random(1)
    for _ in range(ROUNDS):
        content = changed(files[name], rng)
        if content == files[name]:
            continue
        try:
            Network.of_files({**files, name: content}).close()
        except CError as error:
            assert error.status == ERROR and shown(str(error)) == str(error)
        else:  # a field that nobody reads, or another number that may be
            assert name == "manifest.json"


@pytest.mark.parametrize("name", ["program.bin", "state.safetensors"])
def test_what_was_changed_and_sealed_again(files: Files, name: str) -> None:
    rng, opened = random.Random(2), 0
    x, y = np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, np.int64)
    for _ in range(ROUNDS):
        try:
            with Network.of_files(sealed(files, {name: changed(files[name], rng)})) as network:
                opened += 1
                network.step(x, y)
                network.evaluate(x, y, attack_steps=1)
                network.state_written()
        except CError as error:
            assert shown(str(error)) == str(error)
    assert opened  # some of what was changed makes sense


def test_names_in_a_program_do_not_act_on_a_terminal(files: Files) -> None:
    content = files["program.bin"].replace(b"BuildLists", b"B\x1b[2J\xe2\x80\xae\xffz")  # as long
    assert "the operator B?[2J??z is not known" in refused(sealed(files, {"program.bin": content}))


def test_a_run_whose_state_was_changed(run_files: Files) -> None:
    rng = random.Random(3)
    with Network.of_files(run_files) as network:
        assert network.steps == 1
    for _ in range(ROUNDS):
        state = changed(run_files["state.safetensors"], rng)
        if state != run_files["state.safetensors"]:
            assert "state.safetensors" in refused({**run_files, "state.safetensors": state})


FAULTS: list[tuple[str, Any, str]] = [
    ("format", "zip", "does not describe an edge-bcs artifact"),
    ("version", 3, "format version is 3, and its training attack pgd"),
    ("version", 5, "has format 5, and this library reads up to 4"),
    ("objective.training_attack", "n-fgsm", "format version is 1, and its training attack n-fgsm"),
    ("objective.training_attack", "fgsm", "training_attack must be pgd or fgsm-rs or n-fgsm, not 'fgsm'"),
    ("version", True, "field version must be a whole number"),
    ("version", 2, "it says nothing of a part that is trained"),
    ("kappa", 0, "field kappa must be a whole number from 1"),
    ("kappa", 10**9, "kappa 1000000000 above the network's size"),
    ("kappa", 1.0, "field kappa must be a whole number"),
    ("kappa", 100, "lists_length is .*; its layers need"),
    ("size", 5000, "layers hold .* positions and its size is 5000"),
    ("seed", -1, "field seed must be a whole number"),
    ("seed", 2**64, "field seed must be a whole number"),
    ("layers.0.offset", 1, "layers table has a gap or overlap at 0"),
    ("layers.0.shape", [8, 1, 3], "shape must be a list of 2 or 4 numbers"),
    ("layers.0.shape", [2**30, 2**30, 3, 3], "more numbers than any buffer"),
    ("layers.0.algorithm", "magic", "algorithm must be sparse or dense"),
    ("layers", {}, "field layers must be a list"),
    (
        "dense",
        [{"offset": 0, "shape": [2**30]}, {"offset": 2**30, "shape": [2**30]}],
        "more numbers than any",
    ),
    ("statistics.0.channels", 3, "statistics table has a gap or overlap at 3"),
    ("network", [], "manifest's network is not an object"),
    ("network.input_shape", [1, 2**31, 8], "input_shape must be a list of whole numbers"),
    ("network.num_classes", 1, "num_classes must be a whole number from 2"),
    ("network.name", "a\x1b[2J", "control characters could act on a terminal"),
    ("objective.name", "hinge", "must be an objective that this version knows"),
    ("objective.start", "gaussian", "is not what this version knows by that name"),
    ("objective.epsilon", 1.5, "epsilon must be a finite number from 0 to 1"),
    ("objective.epsilon", "0.1", "epsilon must be a finite number"),
    ("objective.attack_steps", 10**6, "attack_steps must be a whole number from 0 to 100000"),
    ("batch_norm", "running", "batch_norm must be frozen or batch"),
    ("micro_batch", 2**17, "micro_batch must be a whole number from 1 to 65536"),
    ("micro_batch", 8, "program.bin does not fit the manifest: the buffer input"),
    ("attack_micro_batch", 8, "attack_micro_batch is 8, with a micro-batch of 4 and the format version 1"),
    ("attack_micro_batch", 4, "attack_micro_batch must be a whole number from 8 to 65536"),
    ("hyper.momentum", None, "hyper.momentum must be a finite number"),
    ("hyper.noise", 1e39, "hyper.noise must be a finite number"),
    ("memory", None, "manifest's memory is not an object"),
    ("memory.budget", 0, "memory.budget must be a whole number from 1"),
    ("release", 0, "field release must be a whole number from 1"),
    ("classes", ["a"], "classes must be 10 names, not 1"),
    ("classes", ["a"] * 10, "must be distinct, but there are two 'a'"),
    ("classes", [" ", *"bcdefghij"], "must be printable names"),
    ("classes", "abcdefghij", "field classes must be a list"),
    ("files", {}, "manifest's files.training_model.onnx is not an object"),
    ("files.program\\.bin", None, "lists no program.bin"),
    ("files.\\./x", {"bytes": 1, "sha256": ""}, "which does not lie in the artifact's folder"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), FAULTS)
def test_a_manifest_that_cannot_be_right(files: Files, field: str, value: Any, sentence: str) -> None:
    manifest = json.loads(files["manifest.json"])
    escaped = field.replace("\\.", "\0")
    *parents, last = (name.replace("\0", ".") for name in escaped.split("."))
    place: Any = manifest
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(CError, match=sentence):
        Network.of_files({**files, "manifest.json": json.dumps(manifest).encode()})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"0," * 300_000 + b"0]", "it holds too much"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"a": "\ud800A"}', "half of a surrogate pair"),
        (rb'{"a": "\x41"}', "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b'{"a": 1} {}', "goes on behind its end"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"7", "the manifest's content is not an object"),
    ],
)
def test_json_that_is_none(files: Files, content: bytes, sentence: str) -> None:
    assert sentence in refused({**files, "manifest.json": content})


def test_what_lies_in_a_folder(tiny_artifact: Make, tmp_path: Path) -> None:
    path = tiny_artifact()

    def opened(name: str, folder: Path) -> None:
        with pytest.raises(CError, match=name):
            Network(folder)

    opened("does not exist", tmp_path / "none")
    opened("is a file", path / "manifest.json")
    opened("manifest.json is missing", tmp_path)
    folder = tmp_path / "made"
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).symlink_to(file)
    with Network(folder):
        pass
    for name in ("eval_model.onnx", "program.bin", "state.safetensors"):
        (folder / name).unlink()
        opened(f"{name} is missing", folder)
        (folder / name).write_bytes((path / name).read_bytes()[:-1])
        opened(f"{name} is truncated", folder)
        (folder / name).write_bytes(b"\0" + (path / name).read_bytes()[1:])
        opened(f"{name} was altered", folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        opened(f"{name}: it is not a regular file", folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        opened(f"{name}: it is not a regular file", folder)
        (folder / name).rmdir()
        (folder / name).symlink_to(path / name)


def test_arguments_that_are_none(tiny_artifact: Make) -> None:
    with pytest.raises(CError, match="threads must lie between 1 and 1024, not be 5000"):
        Network(tiny_artifact(), threads=5000)
    with pytest.raises(CError, match=r"the files|manifest.json is missing"):
        Network.of_files({})
    with Network(tiny_artifact()) as network:
        for call in ("step", "predict", "evaluate", "train", "begin", "set_rates", "get_rates", "get_info"):
            with pytest.raises(CError, match=r"NULL|no training was begun"):
                network.call(call, None, None, None)
    closed = Network.__new__(Network)
    closed.handle = type(network.handle)()
    for call in ("step", "predict", "evaluate", "train", "begin", "save", "get_info", "get_tensor", "skip"):
        with pytest.raises(CError, match="handle"):
            closed.call(call, None, None, None)
