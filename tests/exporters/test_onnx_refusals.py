"""ONNX files that are wrong, and those whose numbers lie in another file, get one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from edge_bcs.exporters.frontends.onnx import from_onnx
from helpers.onnx_files import same_as_onnxruntime, small
from onnx import TensorProto, helper

from edge_bcs.core.errors import EdgeBcsError

# External data


def with_external_data(folder: Path) -> Path:
    f, output = small()
    onnx.save(
        f.model(output),
        folder / "net.onnx",
        save_as_external_data=True,
        location="net.data",
        size_threshold=0,
    )
    return folder / "net.onnx"


def test_external_data_is_read_from_beside_the_file(tmp_path: Path) -> None:
    f, output = small()
    expected = same_as_onnxruntime(f.model(output), tmp_path)
    found = from_onnx(with_external_data(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("way", ["above", "absolute", "link", "empty"])
def test_external_data_elsewhere_is_refused(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = with_external_data(folder)
    os.rename(folder / "net.data", tmp_path / "net.data")
    place = {"above": "../net.data", "absolute": str(tmp_path / "net.data"), "link": "link", "empty": ""}[way]
    if way == "link":
        (folder / "link").symlink_to(tmp_path / "net.data")
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    file.write_bytes(model.SerializeToString())
    with pytest.raises(EdgeBcsError, match="external data is read from the file's own folder alone"):
        from_onnx(file)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("length", "4", "has 864 bytes, and 4 of external data"),
        ("offset", "1000000", "ends beyond the end of 'net.data'"),
        ("offset", "-4", "lies at no place of its file"),
        ("location", "other.data", "there is no file 'other.data'"),
        ("location", ".", "external data is read from the file's own folder alone"),
    ],
)
def test_external_data_of_another_size_is_refused(key: str, value: str, said: str, tmp_path: Path) -> None:
    file = with_external_data(tmp_path)
    model = onnx.load(file, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    file.write_bytes(model.SerializeToString())
    with pytest.raises(EdgeBcsError, match=said):
        from_onnx(file)


# Files that are wrong


def changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    f, output = small()
    model = f.model(output)
    change(model)
    return model


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[1].output[0]


def _missing(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def _huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20, 3, 3]


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-8, -3, 3, 3]


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [9, 3, 3, 3]


def _nan(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"\xff" * len(model.graph.initializer[0].raw_data)


def _opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _operator(name: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = name
        model.graph.node[1].domain = domain

    return change


def _image(*extents: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(extents))
        model.graph.input[0].CopyFrom(value)

    return change


def _bytes(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _second(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def _no_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "elsewhere"


def _strings(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


def _pads(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("pads", [1 << 40] * 4))


def _groups(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("group", 2))


def _stride(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("strides", [0, 1]))


def _inside(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[1].attribute.append(helper.make_attribute("then_branch", body))


WRONG = {
    "a cycle": (_cycle, "Conv 't0.0' reads 't1.0', which nothing before it makes"),
    "a missing input": (_missing, "Relu 't1.0' reads 'nowhere', which nothing before it makes"),
    "a name made twice": (_twice, "makes 't0.0', which is there already"),
    "a huge constant": (_huge, "more than 268,435,456 numbers"),
    "a negative extent": (_negative, r"has the shape \[-8, -3, 3, 3\]"),
    "too few numbers": (_short, "lacks some of the 243 numbers"),
    "not finite": (_nan, "'stem.weight' holds a number that is not finite"),
    "an old opset": (_opset(9), "uses opset 9; supported are 11 to 21"),
    "a new opset": (_opset(99), "uses opset 99; supported are 11 to 21"),
    "an unknown operator": (
        _operator("Einsum"),
        "Einsum 't1.0' is not supported; supported are Add, AveragePool,",
    ),
    "another domain": (_operator("Relu", "com.microsoft"), "of the domain 'com.microsoft'"),
    "a huge image": (_image(1, 3, 1 << 30, 1 << 30), "not \\[batch, C, H, W\\]"),
    "a vector": (_image(1, 3), "has 2 dimensions"),
    "bytes": (_bytes, "the input 'x' is no float32 tensor"),
    "two inputs": (_second, "must take one image, and its inputs are x, mask"),
    "no output": (_no_output, "nothing makes the output 'elsewhere'"),
    "strings": (_strings, "is of the type STRING; export the network in float32"),
    "huge pads": (_pads, "Conv 't0.0'"),
    "groups that do not fit": (_groups, "in 2 groups do not fit 3 channels"),
    "a stride of 0": (_stride, r"strides=\[0, 1\]; two positive numbers"),
    "control flow": (_inside, "control flow is not supported"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    change, said = WRONG[name]
    (tmp_path / "net.onnx").write_bytes(changed(change).SerializeToString())
    with pytest.raises(EdgeBcsError, match=said) as caught:
        from_onnx(tmp_path / "net.onnx")
    assert str(tmp_path / "net.onnx") in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04", bytes(range(256)) * 4):
        (tmp_path / "net.onnx").write_bytes(content)
        with pytest.raises(EdgeBcsError, match="is no ONNX file"):
            from_onnx(tmp_path / "net.onnx")
    with pytest.raises(EdgeBcsError, match="there is no file"):
        from_onnx(tmp_path / "none.onnx")
