"""An ONNX file as what the importer needs of it: nodes in order, constants as arrays, one image in.

Nothing that the file says is believed: names must have been made before they are read, sizes are compared
with what is there, and external data is read from beside the file alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.text import shown

Array = NDArray[Any]

OPSETS = range(11, 22)
_MOST_NODES, _MOST_NUMBERS, _MOST_BYTES = 20_000, 1 << 28, 1 << 31
_SIDE = 1 << 14
_CONSTANTS: dict[int, type] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.BOOL: np.bool_,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT8: np.int8,
}
"""Element types of constants; arithmetic is float32."""


@dataclass(frozen=True)
class OnnxNode:
    """One node: ``inputs`` and ``outputs`` are names of tensors, '' for what is left out."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Its operator and what the file calls it, for a message."""
        return f"{self.operator} '{self.name or self.outputs[0]}'"


@dataclass(frozen=True)
class OnnxGraph:
    """A graph that is safe to walk.

    Attributes:
        nodes: each reads the image, constants, and what nodes before it made.
        constants: arrays by name; numbers are float32 or int64, or bool.
        image: name of the input f32 [batch, C, H, W]; shape: (C, H, W), None where the file leaves it open.
        batch: images of a run, where the file fixes them. output: name of the logits.
    """

    nodes: list[OnnxNode]
    constants: dict[str, Array]
    image: str
    shape: tuple[int, int, int] | None
    batch: int | None
    output: str


def read_graph(path: str | Path) -> OnnxGraph:
    """Read the graph of an ONNX file.

    Raises:
        EdgeBcsError: no ONNX file, another opset than 11 to 21, a graph that is none (cycles, missing inputs,
            names made twice), constants or external data that do not have their declared size, or that lie
            elsewhere than beside the file.
    """
    path = Path(path)
    if not path.is_file():
        raise EdgeBcsError(f"there is no file {path}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read_small(path, _MOST_BYTES))
    except (DecodeError, ValueError, RuntimeError):
        raise EdgeBcsError(f"{path} is no ONNX file") from None
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be read: {error.strerror}") from None
    if not model.HasField("graph") or not model.graph.node:
        raise EdgeBcsError(f"{path} is no ONNX file with a network in it")
    try:
        return _Reader(path, model).graph()
    except UnicodeDecodeError:
        raise EdgeBcsError(f"{path} has a name that is no text") from None


class _Reader:
    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path, self.model = path, model
        self.numbers = 0

    def fail(self, what: str) -> EdgeBcsError:
        return EdgeBcsError(shown(f"{self.path}: {what}"))

    def graph(self) -> OnnxGraph:
        self._check_opset()
        proto = self.model.graph
        if len(proto.node) > _MOST_NODES:
            raise self.fail(f"the graph has {len(proto.node):,} nodes, and at most {_MOST_NODES:,} are taken")
        if proto.sparse_initializer:
            raise self.fail("sparse initializers are not supported; save the weights dense")
        constants = {tensor.name: self._array(tensor, tensor.name) for tensor in proto.initializer}
        inputs = [value for value in proto.input if value.name not in constants]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs[:4]) or "none"
            raise self.fail(f"the network must take one image, and its inputs are {names}")
        if len(proto.output) < 1:
            raise self.fail("the graph has no output")
        image = inputs[0]
        batch, shape = self._image(image)
        nodes = self._nodes(proto.node, {image.name, *constants}, constants)
        made = {name for node in nodes for name in node.outputs}
        output = proto.output[0].name
        if output not in made:
            raise self.fail(f"nothing makes the output '{output}'")
        return OnnxGraph(nodes, constants, image.name, shape, batch, output)

    def _check_opset(self) -> None:
        for opset in self.model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                if opset.version not in OPSETS:
                    raise self.fail(
                        f"it uses opset {opset.version}; supported are {OPSETS[0]} to {OPSETS[-1]}: export "
                        "it with opset_version=17"
                    )
                return
        raise self.fail("it does not say which opset it uses")

    def _image(self, value: onnx.ValueInfoProto) -> tuple[int | None, tuple[int, int, int] | None]:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or tensor.elem_type != TensorProto.FLOAT:
            raise self.fail(f"the input '{value.name}' is no float32 tensor")
        extents = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
        if tensor.HasField("shape") and len(extents) != 4:
            raise self.fail(f"the input '{value.name}' has {len(extents)} dimensions, not [batch, C, H, W]")
        if any(extent is not None and not 1 <= extent <= _SIDE for extent in extents):
            raise self.fail(f"the input '{value.name}' has the shape {extents}, not [batch, C, H, W]")
        if len(extents) != 4:
            return None, None
        batch, channels, height, width = extents
        if channels is None or height is None or width is None:
            return batch, None
        return batch, (channels, height, width)

    def _nodes(
        self, protos: Iterable[onnx.NodeProto], known: set[str], constants: dict[str, Array]
    ) -> list[OnnxNode]:
        """The nodes in their order; those that are constants become arrays."""
        known = {"", *known}
        nodes = []
        for proto in protos:
            node = self._node(proto)
            missing = [name for name in node.inputs if name not in known]
            if missing:
                raise self.fail(f"{node} reads '{missing[0]}', which nothing before it makes")
            again = [name for name in node.outputs if name and name in known]
            if again or not any(node.outputs):
                made = f"makes '{again[0]}', which is there already" if again else "makes nothing"
                raise self.fail(f"{node} {made}")
            known |= set(node.outputs)
            if node.operator == "Constant":
                constants[node.outputs[0]] = self._constant(node)
            else:
                nodes.append(node)
        return nodes

    def _node(self, proto: onnx.NodeProto) -> OnnxNode:
        outputs = tuple(proto.output)
        node = OnnxNode(proto.op_type, proto.name, tuple(proto.input), outputs or ("",))
        if proto.domain not in ("", "ai.onnx"):
            raise self.fail(
                f"{node} is of the domain {proto.domain!r}; only ONNX's own operators are supported"
            )
        for attribute in proto.attribute:
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                raise self.fail(f"{node} has a graph inside: control flow is not supported")
            if attribute.type == onnx.AttributeProto.TENSOR:
                node.attributes[attribute.name] = self._array(attribute.t, f"{node}")
                continue
            try:
                found = onnx.helper.get_attribute_value(attribute)
            except ValueError:
                raise self.fail(f"{node} has the attribute '{attribute.name}' of an unknown kind") from None
            node.attributes[attribute.name] = found.decode() if isinstance(found, bytes) else found
        return node

    def _constant(self, node: OnnxNode) -> Array:
        for name, kind in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                           ("value_ints", np.int64)):  # fmt: skip
            if name in node.attributes:
                return np.array(node.attributes[name], kind)
        if isinstance(node.attributes.get("value"), np.ndarray):
            found: Array = node.attributes["value"]
            return found
        raise self.fail(f"{node} holds no number")

    # Arrays

    def _array(self, tensor: TensorProto, name: str) -> Array:
        kind = _CONSTANTS.get(tensor.data_type)
        if kind is None:
            known = TensorProto.DataType.values()
            said = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in known else "unknown"
            raise self.fail(f"the constant '{name}' is of the type {said}; export the network in float32")
        if any(extent < 0 for extent in tensor.dims):
            raise self.fail(f"the constant '{name}' has the shape {list(tensor.dims)}")
        count = prod(tensor.dims)
        self.numbers += count
        if self.numbers > _MOST_NUMBERS:
            raise self.fail(f"it has more than {_MOST_NUMBERS:,} numbers")
        if tensor.data_location == TensorProto.EXTERNAL:
            found = self._external(tensor, name, np.dtype(kind), count)
        else:
            try:
                found = numpy_helper.to_array(tensor)
            except (ValueError, TypeError):
                raise self.fail(
                    f"the constant '{name}' lacks some of the {count:,} numbers of its shape "
                    f"{list(tensor.dims)}"
                ) from None
        if found.dtype.kind == "f":
            if not np.isfinite(found).all():
                raise self.fail(f"the constant '{name}' holds a number that is not finite")
            return found.astype(np.float32)
        return found if found.dtype == np.bool_ else found.astype(np.int64)

    def _external(self, tensor: TensorProto, name: str, kind: np.dtype[Any], count: int) -> Array:
        """Numbers that lie in a file of their own, which must lie in the folder of the ONNX file."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        location, size = said.get("location", ""), count * kind.itemsize
        numbers = said.get("offset", "0"), said.get("length", str(size))
        if not all(number.isascii() and number.isdigit() and len(number) < 16 for number in numbers):
            raise self.fail(f"the constant '{name}' lies at no place of its file")
        offset, length = map(int, numbers)
        folder = os.path.realpath(self.path.parent)
        place = os.path.realpath(os.path.join(folder, location))
        if (
            not location
            or "\0" in location
            or os.path.isabs(location)
            or not place.startswith(folder + os.sep)
        ):
            raise self.fail(
                f"the constant '{name}' lies in {location!r}; external data is read from the file's own "
                "folder alone"
            )
        if length != size:
            raise self.fail(f"the constant '{name}' has {size:,} bytes, and {length:,} of external data")
        if not os.path.isfile(place):
            raise self.fail(f"there is no file {location!r}, which holds its weights")
        try:
            with open(place, "rb") as stream:
                there = os.fstat(stream.fileno()).st_size
                if offset + length > there:
                    raise self.fail(
                        f"the constant '{name}' ends beyond the end of {location!r}, which has {there:,} "
                        "bytes"
                    )
                stream.seek(offset)
                data = stream.read(length)
        except OSError as error:
            raise self.fail(
                f"{location!r}, which holds its weights, cannot be read: {error.strerror}"
            ) from None
        return np.frombuffer(data, kind.newbyteorder("<"), count).reshape(tuple(tensor.dims))
