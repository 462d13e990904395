"""No pickle runs anything, and nothing of ours takes one or evaluates text."""

from __future__ import annotations

import ast
import io
import os
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import open_data
from edge_bcs.data.readers import unpickle

ROOT = Path(__file__).parents[1]
SHAPE = (3, 4, 4)


class Command:
    """Unpickling this runs a shell command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def as_npz(content: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([content], object), y=np.zeros(1, int))
    return buffer.getvalue()


def as_labels(content: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((1, *SHAPE), np.uint8), y=np.array([content], object))
    return buffer.getvalue()


PICKLES: dict[str, Callable[[Any], bytes]] = {
    "data.npz": as_npz,
    "train.npz": as_labels,
    "data_batch_1": lambda content: pickle.dumps({b"data": content, b"labels": [1]}),
    "test_batch": pickle.dumps,
    "checkpoint.pt": pickle.dumps,
    "checkpoint.safetensors": pickle.dumps,
    "manifest.json": pickle.dumps,
    "data.pickle": pickle.dumps,
}


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_runs_anything(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    file = tmp_path / "in" / name
    file.parent.mkdir()
    file.write_bytes(PICKLES[name](Command(mark)))
    for read in (
        lambda: open_data(file, shape=SHAPE),
        lambda: open_data(file.parent, shape=(3, 32, 32)),
        lambda: __import__("edge_bcs.loading").loading.load(file),
        lambda: __import__("edge_bcs.loading").loading.load(file.parent),
        lambda: unpickle(io.BytesIO(file.read_bytes()), name),
        lambda: __import__("edge_bcs.data.pseudo_labelled").data.pseudo_labelled.open_pseudo_labelled(
            file, SHAPE, trust_pickle=True
        ),
    ):
        with pytest.raises(EdgeBcsError):
            read()
    assert not mark.exists()


def raw(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


HOSTILE_PICKLES = {
    "eval": raw(b"cbuiltins\neval\n(U\x011tR"),
    "an attribute of a class": raw(b"cnumpy\nndarray.__class__\n"),
    "a nested name": raw(b"cnumpy\ndtype.__init__\n"),
    "another function of numpy": raw(b"cnumpy\nload\n"),
    "an object array": raw(b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR"),
    "a persistent object": raw(b"Pname\n"),
    "an extension": raw(b"\x82\x01"),
    "attributes of what is called": raw(b"cnumpy\ndtype\nN}U\x08__call__Nsb\x86b"),
    "state of a builtin": raw(b"cnumpy\nndarray\n}U\x01aK\x01sb"),
    "the largest memo": raw(b"}r\xff\xff\xff\x7f"),
    "a memo by text": raw(b"}p4000000000\n"),
    "a large string": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "no dictionary": raw(b"K\x01"),
    "a great many parts": raw(b"(" + b"}" * (3 << 20) + b"t"),
    "deep": raw(b"(" * 100_000),
    "an array larger than its bytes": raw(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01\x8a\x05\x00\x00\x00\x00\x7f\x85cnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89U\x01xtb"
    ),
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EdgeBcsError, match="is not a CIFAR python batch") as caught:
        unpickle(io.BytesIO(HOSTILE_PICKLES[name]), "it")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    """By name, in every module: one place has an unpickler, which is the one attacked above."""
    found = set()
    for folder in ("edge_bcs", "exporters", "runtime", "targets"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                place = str(file.relative_to(ROOT))
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    found |= {(place, n) for n in names if n.split(".")[0] in UNSAFE_MODULES}
                elif isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in UNSAFE_CALLS:
                        found.add((place, called))
                    arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if arguments.get("allow_pickle", "False") != "False":
                        found.add((place, "allow_pickle"))
                    if called in ("torch.load", "np.load"):
                        safe = "weights_only" if called == "torch.load" else "allow_pickle"
                        assert safe in arguments, f"{place}: {called} says nothing of {safe}"
    assert found == {("edge_bcs/data/readers.py", name) for name in ("pickle", "pickletools")}


UNSAFE_MODULES = {"pickle", "pickletools", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal",
                  "shelve", "yaml"}  # fmt: skip
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
