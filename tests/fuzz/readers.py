"""Every reader of files from elsewhere, as a function of the bytes: it returns, or raises EdgeBcsError.

    python tests/fuzz/readers.py TARGET [libFuzzer options]      # needs atheris; `make fuzz` runs all of them

tests/test_hostile_files.py feeds the same functions damaged copies of the seeds, without atheris.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.scratch import ScratchFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

_SCRATCH = ScratchFolder("fuzz")
_PLACE = _SCRATCH.path
SHAPE = (3, 4, 4)


def _file(name: str, content: bytes) -> Path:
    file = _PLACE / name
    file.write_bytes(content)
    return file


def _drain(rows: Iterator[Any]) -> None:
    for _ in rows:
        pass


# Targets


def manifest(content: bytes) -> None:
    """manifest.json: of an artifact whose files are intact, and what the simulator reads of it."""
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.targets.plans import plan_of

    described = Artifact.read(_with_manifest(content))
    plan_of(described.manifest["memory"])
    _ = (described.network, described.predicted_peak_bytes)


def _artifact() -> Path:
    """An intact artifact, made once."""
    from helpers.artifacts import write_artifact

    folder = _PLACE / "artifact"
    return folder if folder.exists() else write_artifact(folder)


def _with_manifest(content: bytes) -> Path:
    folder = _PLACE / "changed"
    if not folder.exists():
        shutil.copytree(_artifact(), folder)
    (folder / "manifest.json").write_bytes(content)
    return folder


def state(content: bytes) -> None:
    """state.safetensors: header, metadata, and the invariants of the COO buffers."""
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.state import read_state

    folder = _PLACE / "state"
    if not folder.exists():
        shutil.copytree(_artifact(), folder)
        state.artifact = Artifact.read(folder)  # type: ignore[attr-defined]
    (folder / "state.safetensors").write_bytes(content)
    read_state(state.artifact)  # type: ignore[attr-defined]


def checkpoint(content: bytes) -> None:
    """A host's checkpoint.safetensors, and the network that it describes."""
    from edge_bcs.loading import load

    load(_file("checkpoint.safetensors", content))


def archive(content: bytes) -> None:
    """NAME.tar."""
    from edge_bcs.runtime.artifact import Artifact

    Artifact.read(_file("artifact.tar", content))


def onnx(content: bytes) -> None:
    """An ONNX model: as an artifact's graph, and as one of ONNX Runtime's training artifacts."""
    from edge_bcs.runtime.onnx_file import read_model, require_operators

    from edge_bcs.core.errors import EdgeBcsError

    try:
        require_operators(content, "edge_bcs", "the model")
    except EdgeBcsError:
        read_model(content, "the model").serialize()


def onnx_network(content: bytes) -> None:
    """A user's network as an ONNX file."""
    from edge_bcs.exporters.frontends.onnx import from_onnx

    from_onnx(_file("net.onnx", content), SHAPE)


def ort_checkpoint(content: bytes) -> None:
    """ONNX Runtime's `checkpoint`."""
    from edge_bcs.runtime.ort.checkpoint import read_ort_checkpoint

    read_ort_checkpoint(_file("checkpoint", content))


def npz(content: bytes) -> None:
    """Images and labels in an .npz."""
    from edge_bcs.data.readers import npz_rows

    _drain(npz_rows(_file("data.npz", content), "train", SHAPE))


def cifar(content: bytes) -> None:
    """A CIFAR batch, which is a pickle."""
    from edge_bcs.data.readers import cifar_classes, cifar_rows, unpickle

    found = unpickle(io.BytesIO(content), "the batch")
    cifar_classes(found, 10)
    _drain(cifar_rows(found, "train", (3, 32, 32), "the batch"))


def tar(content: bytes) -> None:
    """Image files in a plain tar."""
    from edge_bcs.data.listing import archive_entries

    _drain(archive_entries(_file("data.tar", content)))


def compressed_tar(content: bytes) -> None:
    """The same in a compressed one."""
    from edge_bcs.data.readers import compressed_rows

    _drain(compressed_rows(_file("data.tar.gz", content), "train", SHAPE))


def image(content: bytes) -> None:
    """An image file."""
    from edge_bcs.data.decoding import decode

    decode(content, SHAPE, "the image")


def mat(content: bytes) -> None:
    """SVHN's .mat."""
    from edge_bcs.data.readers import svhn_rows

    _drain(svhn_rows(_file("train_32x32.mat", content), "train", SHAPE))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(manifest, state, checkpoint, archive, onnx, onnx_network, ort_checkpoint),
        *(npz, cifar, tar, compressed_tar, image, mat),
    )
}


INSTRUMENTED = (
    *("runtime.archive", "runtime.artifact", "runtime.onnx_file", "runtime.ort.checkpoint", "runtime.state"),
    *("checkpoint", "data.classes", "data.decoding", "data.images", "data.listing", "data.matlab"),
    *("data.readers", "loading"),
    *("core.metadata", "core.state", "core.tensor_file", "models", "models.geometry", "targets.plans"),
    *(f"exporters.frontends.{name}" for name in ("onnx", "onnx_file", "onnx_module", "onnx_rules")),
)


# Seeds: small files that each target reads without complaint


def seeds(target: str) -> list[bytes]:
    """Return intact files of a target."""
    return [content for name, content in _seeds() if name == target]


def _seeds() -> Iterator[tuple[str, bytes]]:
    from edge_bcs.runtime import archive as archives
    from PIL import Image
    from scipy.io import savemat

    from edge_bcs import models
    from edge_bcs.checkpoint import save_checkpoint
    from edge_bcs.method.connectivity import sparsify

    folder = _artifact()
    description = json.loads((folder / "manifest.json").read_text())
    phase = {"peak_bytes": 1000, "peak_node": "a", "categories": {"work": 4}, "nodes": ["a"], "flops": [1],
             "bytes": [1], "tensors": [["y", 4, "work", 0, 0]], "walks": [[]]}  # fmt: skip
    description["classes"] = [f"class {label}" for label in range(description["network"]["num_classes"])]
    description["memory"] |= {"bound": {"x": 996}, "phases": {"eval": phase}}
    yield "manifest", json.dumps(description).encode()
    yield "state", (folder / "state.safetensors").read_bytes()
    sparse = sparsify(models.vgg16(width=1 / 16), 0.99)
    sparse.classes = tuple("abcdefghij")
    save_checkpoint(_PLACE / "seed", sparse)
    yield "checkpoint", (_PLACE / "seed").read_bytes()
    packed = io.BytesIO()
    archives.pack(folder, packed, "seed")
    yield "archive", packed.getvalue()
    for file in sorted((Path(__file__).parents[1] / "ort_training" / "dense" / "mobile").glob("*.onnx")):
        if file.stat().st_size < 20_000:
            yield "onnx", file.read_bytes()
    yield "onnx", _model()
    yield "onnx_network", _network()
    smallest = min((Path(__file__).parents[1] / "ort_training").rglob("checkpoint"), key=os.path.getsize)
    yield "ort_checkpoint", smallest.read_bytes()
    x, y = np.arange(6 * 48, dtype=np.uint8).reshape(6, *SHAPE), np.arange(6) % 3
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, x=x, y=y)
        yield "npz", buffer.getvalue()
    for protocol in (2, 4):
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 4], b"label_names": [b"a", b"b"]}
        yield "cifar", pickle.dumps(batch, protocol=protocol)
    picture = Image.fromarray(x[0].transpose(1, 2, 0))
    encoded = {}
    for form in ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        encoded[form] = buffer.getvalue()
        yield "image", encoded[form]
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for target, mode in (("tar", "w"), ("compressed_tar", "w:gz"), ("compressed_tar", "w:xz")):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode=mode, format=form) as made:  # type: ignore[call-overload]
                for name in ("train/a/1.png", "train/b/2.png", "test/ä/3.png"):
                    member = tarfile.TarInfo(name)
                    member.size = len(encoded["PNG"])
                    made.addfile(member, io.BytesIO(encoded["PNG"]))
            yield target, buffer.getvalue()
    for compress in (False, True):
        buffer = io.BytesIO()
        savemat(buffer, {"X": x.transpose(2, 3, 1, 0), "y": y[:, None] + 1}, do_compression=compress)
        yield "mat", buffer.getvalue()


def _model() -> bytes:
    from edge_bcs.runtime.onnx_file import FLOAT, FileNode, attribute, make_model

    node = FileNode("PackInput", "edge_bcs", ["x"], ["y"], raw=[attribute("lanes", 4), attribute("halo", 1)])
    return make_model([node], {"x": FLOAT}, {"y": FLOAT}, {"": 21, "edge_bcs": 1})


def _network() -> bytes:
    """Branches, shapes that are computed, and constants of both kinds."""
    from onnx import TensorProto, helper, numpy_helper

    make, arrays = helper.make_node, np.random.default_rng(1)
    constants = {
        "stem.weight": arrays.normal(size=(4, 3, 3, 3)), "b": arrays.normal(size=4), "two": np.float64(2),
        "head.weight": arrays.normal(size=(5, 64)), "variance": arrays.uniform(1, 2, 4),
    }  # fmt: skip
    whole = {"zero": np.array(0), "first": np.array([0]), "halves": np.array([2, 2]), "rest": np.array([64])}
    nodes = [
        make("Conv", ["x", "stem.weight", "b"], ["c"], pads=[1, 1, 1, 1], strides=[1, 2], group=1),
        make("BatchNormalization", ["c", "b", "b", "b", "variance"], ["n"], epsilon=1e-3),
        make("Split", ["n", "halves"], ["l", "r"], axis=1),
        make("Sigmoid", ["l"], ["s"]),
        make("Mul", ["s", "r"], ["m"]),
        make("Mul", ["m", "two"], ["d"]),
        make("Concat", ["d", "r"], ["j"], axis=1),
        make("MaxPool", ["j"], ["p"], kernel_shape=[2, 2], pads=[0, 1, 1, 0], ceil_mode=1),
        make("Transpose", ["p"], ["t"], perm=[0, 2, 1, 3]),
        make("Resize", ["t", "", "scales"], ["z"], coordinate_transformation_mode="asymmetric",
             mode="nearest", nearest_mode="floor"),
        make("Shape", ["z"], ["e"]),
        make("Gather", ["e", "zero"], ["g"]),
        make("Unsqueeze", ["g", "first"], ["u"]),
        make("Concat", ["u", "rest"], ["w"], axis=0),
        make("Slice", ["z", "zeros", "twos", "axes"], ["k"]),
        make("Reshape", ["k", "w"], ["f"]),
        make("Gemm", ["f", "head.weight"], ["y"], transB=1),
    ]  # fmt: skip
    constants["scales"] = np.array([1, 1, 2, 2])
    whole |= {"zeros": np.array([0, 0]), "twos": np.array([4, 4]), "axes": np.array([2, 3])}
    typed = {name: np.asarray(array, np.float32) for name, array in constants.items()} | whole
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in typed.items()],
    )
    opsets = [helper.make_opsetid("", 13)]
    content: bytes = helper.make_model(graph, ir_version=8, opset_imports=opsets).SerializeToString()
    return content


# Mutation that knows the form


def mutate_onnx(content: bytes, chance: random.Random) -> bytes:
    """A name, a number or an operator of the graph becomes another."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return content
    nodes, numbers = model.graph.node, [0, -1, 1, 2, 3, 7919, 1 << 14, 1 << 31, (1 << 63) - 1, -(1 << 63)]
    names = [name for node in nodes for name in (*node.input, *node.output)] + ["", "nowhere"]
    if not nodes:
        return content
    node, kind = chance.choice(nodes), chance.randrange(6)
    if kind == 0 and node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice(names)
    elif kind == 1 and node.output:
        node.output[chance.randrange(len(node.output))] = chance.choice(names)
    elif kind == 2:
        node.op_type = chance.choice(
            [other.op_type for other in nodes] + ["Loop", "Erf", "ReduceMean", "Pad"]
        )
    elif kind == 3 and node.attribute:
        attribute = chance.choice(node.attribute)
        attribute.i, attribute.f = chance.choice(numbers), chance.choice([0.0, -1.0, 1e38, float("nan")])
        if attribute.ints:
            attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(numbers)
    elif kind == 4 and model.graph.initializer:
        tensor = chance.choice(model.graph.initializer)
        if tensor.dims:
            tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(numbers)
    elif kind == 5:
        del nodes[chance.randrange(len(nodes))]
    return model.SerializeToString()  # type: ignore[no-any-return]


def mutate_json(content: bytes, chance: random.Random) -> bytes:
    """One value of a JSON document becomes another."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            visit(value[key])

    visit(document)
    if not places:
        return content
    parent, key = chance.choice(places)
    if isinstance(parent[key], str) and parent[key][:1] in ("{", "[") and chance.random() < 0.8:
        parent[key] = mutate_json(parent[key].encode(), chance).decode()  # JSON in JSON: a state's metadata
        return json.dumps(document).encode()
    values: list[Any] = [None, True, "", "x" * 300, [], {}, [[]], 0, -1, 1, 2**31, 2**63, 10**400, 1e308, 0.5,
                         float("nan"), float("inf"), "../x", "/etc/passwd", "0" * 64]  # fmt: skip
    if isinstance(parent[key], int):
        values += [parent[key] + 1, parent[key] - 1, parent[key] * 2] * 3
    if chance.random() < 0.15 and isinstance(parent, dict):
        del parent[key]
    elif chance.random() < 0.15:
        other = chance.choice(places)
        parent[key] = other[0][other[1]]
    else:
        parent[key] = chance.choice(values)
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):
        return content


def mutate_safetensors(content: bytes, chance: random.Random) -> bytes:
    """The header as JSON, its length, or the numbers."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= len(content) - 8 or chance.random() < 0.3:
        return content
    header = mutate_json(content[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


FORMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "manifest": mutate_json,
    "state": mutate_safetensors,
    "checkpoint": mutate_safetensors,
    "onnx_network": mutate_onnx,
}


def mend_zip(content: bytes) -> bytes:
    """A zip with right checksums again, so that a changed member is looked at; else the content as it is."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as given:
            made = io.BytesIO()
            with zipfile.ZipFile(made, "w") as written:
                for item in given.infolist()[:8]:
                    with given.open(item) as stream:
                        stream._expected_crc = None  # type: ignore[attr-defined]
                        written.writestr(item.filename, stream.read(1 << 20))
            return made.getvalue()
    except Exception:
        return content


def main() -> None:
    """Fuzz one target with atheris."""
    import atheris

    target = sys.argv[1]
    with atheris.instrument_imports(include=["edge_bcs"]):
        for module in INSTRUMENTED:
            importlib.import_module(f"edge_bcs.{module}")
    from edge_bcs.core.errors import EdgeBcsError

    run, form = TARGETS[target], FORMS.get(target)

    def one(content: bytes) -> None:
        try:
            run(content)
        except EdgeBcsError as error:
            if "\n" in str(error):
                raise RuntimeError("the message has more than one line") from error

    def mutator(content: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if form is not None and chance.random() < 0.8:
            return form(content, chance)[:most]
        changed = bytes(atheris.Mutate(content, most))
        return mend_zip(changed)[:most] if target == "npz" and chance.random() < 0.5 else changed

    folder = _PLACE / "seeds"
    folder.mkdir()
    for number, content in enumerate(seeds(target)):
        (folder / str(number)).write_bytes(content)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder)], one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
