"""ONNX Runtime's own `checkpoint` file, read and written without the training build.

The file is a FlatBuffer with the identifier "ODTC": parameters, the optimizer's state and a bag of
properties. A table is reached through offsets, each relative to where it is stored; every access is checked
against the end of the file, so that a truncated or altered file gives one sentence (the flatbuffers package,
which writes it, reads without such checks).

| table | fields, in order |
| --- | --- |
| Checkpoint | version, module_state, optimizer_groups, property_bag |
| ModuleState | requires_grad_params, frozen_params, is_nominal_state, has_external_data |
| Tensor | name, doc_string, dims i64[], data_type, raw_data u8[], … |
| OptimizerGroup | group_name, step i64, initial_learning_rate f32, optimizer_states |
| ParameterOptimizerState | param_name, momentums (Tensors) |
| PropertyBag | ints, floats, strings (each a list of name and value) |
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import counters
from edge_bcs.core.state import STATE_NAMES, VERSION, is_state

CHECKPOINT = "checkpoint"
IDENTIFIER = b"ODTC"
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
}
_LONGEST_LIST = 1 << 20
_LARGEST = 2 << 30  # bytes that FlatBuffers can point at
_GROUP = "group0"  # as 1.19.2 calls the one group of parameters that it makes
Array = np.ndarray[Any, Any]


class _Table:
    """One FlatBuffer table: `field` gives the position of a field's data, 0 where it is absent."""

    def __init__(self, content: bytes, position: int) -> None:
        self.content, self.position = content, position
        self.map = position - self.number("<i", position)
        self.entries = (self.number("<H", self.map) - 4) // 2

    def number(self, form: str, position: int) -> Any:
        if not 0 <= position <= len(self.content) - struct.calcsize(form):
            raise ValueError(f"an offset leads to byte {position} of {len(self.content)}")
        return struct.unpack_from(form, self.content, position)[0]

    def field(self, number: int) -> int:
        offset = self.number("<H", self.map + 4 + 2 * number) if number < self.entries else 0
        return self.position + offset if offset else 0

    def scalar(self, number: int, form: str, otherwise: Any) -> Any:
        position = self.field(number)
        return self.number(form, position) if position else otherwise

    def vector(self, number: int, width: int) -> tuple[int, int]:
        """(position of the first element, number of elements) of a list of elements of ``width`` bytes."""
        position = self.field(number)
        if not position:
            return 0, 0
        position += self.number("<I", position)
        length = self.number("<I", position)
        if position + 4 + length * width > len(self.content):
            raise ValueError(f"a list of {length} elements goes beyond the end")
        return position + 4, length

    def text(self, number: int) -> str:
        first, length = self.vector(number, 1)
        return self.content[first : first + length].decode()

    def table(self, number: int) -> _Table | None:
        position = self.field(number)
        return _Table(self.content, position + self.number("<I", position)) if position else None

    def tables(self, number: int) -> list[_Table]:
        first, length = self.vector(number, 4)
        if length > _LONGEST_LIST:
            raise ValueError(f"a list has {length} entries")
        places = range(first, first + 4 * length, 4)
        return [_Table(self.content, place + self.number("<I", place)) for place in places]


@dataclass(frozen=True)
class OptimizerState:
    """Where an optimizer of ONNX Runtime stands.

    Attributes:
        step: steps done. learning_rate: that it began with.
        moments: parameter name → its moments, each of the parameter's shape: two for AdamW; one, which stays
            0, for SGD without momentum.
    """

    step: int
    learning_rate: float
    moments: dict[str, list[Array]]


@dataclass(frozen=True)
class OrtCheckpoint:
    """What a checkpoint holds.

    Attributes:
        version: of the format.
        trainable, frozen: parameter name → array, those that require a gradient and the others.
        optimizer: its state, or None before the first step. properties: name → int, float or text.
    """

    version: int
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    optimizer: OptimizerState | None
    properties: dict[str, int | float | str]

    @property
    def parameters(self) -> dict[str, Array]:
        """All parameters by name."""
        return {**self.trainable, **self.frozen}

    def serialize(self) -> bytes:
        """The file's content, which CheckpointState of a training build reads."""
        return _Writer().checkpoint(self)


def is_ort_checkpoint(path: Path) -> bool:
    """Whether a file begins as ORT's checkpoints do."""
    try:
        with path.open("rb") as stream:
            return stream.read(8)[4:] == IDENTIFIER
    except OSError:
        return False


def read_ort_checkpoint(path: str | Path) -> OrtCheckpoint:
    """Read a complete checkpoint of ONNX Runtime's training API (format of 1.17 to 1.19.2).

    Raises:
        EdgeBcsError: no such file, one that is truncated, altered or something else, a nominal checkpoint (it
            has no parameters), or one that keeps its numbers in a second file.
    """
    path = Path(path)
    try:
        content = read_small(path, _LARGEST)
    except OSError as error:
        raise EdgeBcsError(f"the checkpoint {path} cannot be read: {error.strerror}.") from None
    if content[4:8] != IDENTIFIER:
        raise EdgeBcsError(f"{path} is not a checkpoint of ONNX Runtime's training API.")
    try:
        return _parse(content)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{path}: {error}") from None
    except (ValueError, struct.error) as error:
        raise EdgeBcsError(f"{path} is truncated or altered ({error}); copy it again.") from None


def read_state(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of an edge-bcs state in a checkpoint that `edge-bcs export` or `OrtTrainer` wrote.

    Raises EdgeBcsError as `read_ort_checkpoint` does, and for the checkpoint of another kind of network.
    """
    checkpoint = read_ort_checkpoint(path)
    metadata = {name: str(value) for name, value in checkpoint.properties.items()}
    if not is_state(metadata):
        raise EdgeBcsError(f"{path} is a checkpoint, but not of an edge-bcs network of version {VERSION}.")
    try:
        counters(metadata)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{path}: {error}") from None
    held, tensors = checkpoint.parameters, {}
    for name in STATE_NAMES:
        # What is empty, such as the statistics of a network without batch norm, has no place in the file.
        tensors[name] = held.get(name, np.zeros(0, np.float32))
        if name.startswith("coo.") and not tensors[name].size:
            raise EdgeBcsError(f"{path} lacks {name}.")
    return tensors, metadata


def _parse(content: bytes) -> OrtCheckpoint:
    root = _Table(content, struct.unpack_from("<I", content, 0)[0])
    module = root.table(1)
    if module is None:
        raise EdgeBcsError("the checkpoint has no parameters.")
    if module.scalar(2, "<?", False):
        raise EdgeBcsError("this is a nominal checkpoint, which has no numbers; use the complete one.")
    if module.scalar(3, "<?", False):
        raise EdgeBcsError("the checkpoint keeps its numbers in a second file, which is not supported.")
    trainable = _named_tensors(module.tables(0))
    frozen = _named_tensors(module.tables(1))
    if both := trainable.keys() & frozen.keys():
        raise ValueError(f"the parameter {min(both)} occurs twice")
    properties: dict[str, int | float | str] = {}
    bag = root.table(3)
    if bag is not None:
        properties |= {item.text(0): int(item.scalar(1, "<q", 0)) for item in bag.tables(0)}
        properties |= {item.text(0): float(item.scalar(1, "<f", 0.0)) for item in bag.tables(1)}
        properties |= {item.text(0): item.text(1) for item in bag.tables(2)}
    return OrtCheckpoint(root.scalar(0, "<i", 0), trainable, frozen, _optimizer(root.tables(2)), properties)


def _named_tensors(tables: list[_Table]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for table in tables:
        name, array = _tensor(table)
        if name in tensors:
            raise ValueError(f"the parameter {name} occurs twice")
        tensors[name] = array
    return tensors


def _optimizer(groups: list[_Table]) -> OptimizerState | None:
    if len(groups) > 1:
        raise EdgeBcsError(f"the checkpoint has {len(groups)} groups of parameters; one is supported.")
    if not groups:
        return None
    (group,) = groups
    moments = {state.text(0): [_tensor(table)[1] for table in state.tables(1)] for state in group.tables(3)}
    return OptimizerState(int(group.scalar(1, "<q", 0)), float(group.scalar(2, "<f", 0.0)), moments)


def _tensor(table: _Table) -> tuple[str, Array]:
    """(name, a copy of the numbers)."""
    name = table.text(0)
    first, rank = table.vector(2, 8)
    shape = [table.number("<q", first + 8 * axis) for axis in range(rank)]
    code = table.scalar(3, "<i", 0)
    if code not in _DTYPES:
        raise EdgeBcsError(f"the parameter {name} has the element type {code}, which is not supported.")
    dtype = _DTYPES[code]
    place, size = table.vector(4, 1)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"the parameter {name} of shape {shape} has {size} bytes")
    return name, np.frombuffer(table.content, dtype, math.prod(shape), place).reshape(shape).copy()


class _Writer:
    """A FlatBuffer is written from its end: what a table refers to comes before the table."""

    def __init__(self) -> None:
        import flatbuffers  # which every onnxruntime requires

        self.builder: Any = flatbuffers.Builder(1 << 16)

    def checkpoint(self, held: OrtCheckpoint) -> bytes:
        trainable = self.list(self.tensor(*item) for item in sorted(held.trainable.items()))
        frozen = self.list(self.tensor(*item) for item in sorted(held.frozen.items()))
        module = self.table(("UOffsetTRelative", trainable), ("UOffsetTRelative", frozen))
        groups = self.list([self.group(held.optimizer)]) if held.optimizer else 0
        bag = self.properties(held.properties)
        places = (("UOffsetTRelative", place) for place in (module, groups, bag))
        self.builder.Finish(self.table(("Int32", held.version), *places), file_identifier=IDENTIFIER)
        return bytes(self.builder.Output())

    def tensor(self, name: str, array: Array) -> int:
        code = next(code for code, dtype in _DTYPES.items() if dtype == array.dtype)
        text = self.builder.CreateString(name)
        shape = self.builder.CreateNumpyVector(np.array(array.shape, "<i8"))
        numbers = self.builder.CreateNumpyVector(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return self.table(
            ("UOffsetTRelative", text),
            ("UOffsetTRelative", 0),
            ("UOffsetTRelative", shape),
            ("Int32", code),
            ("UOffsetTRelative", numbers),
        )

    def group(self, state: OptimizerState) -> int:
        states = []
        for name, moments in sorted(state.moments.items()):
            text = self.builder.CreateString(name)
            tensors = self.list(self.tensor(f"momentum{i}", moment) for i, moment in enumerate(moments))
            states.append(self.table(("UOffsetTRelative", text), ("UOffsetTRelative", tensors)))
        listed, text = self.list(states), self.builder.CreateString(_GROUP)
        return self.table(
            ("UOffsetTRelative", text),
            ("Int64", state.step),
            ("Float32", state.learning_rate),
            ("UOffsetTRelative", listed),
        )

    def properties(self, properties: Mapping[str, int | float | str]) -> int:
        lists: dict[type, list[int]] = {int: [], float: [], str: []}
        kinds = {int: "Int64", float: "Float32", str: "UOffsetTRelative"}
        for name, value in sorted(properties.items()):
            kind = type(value)
            text = self.builder.CreateString(name)
            stored = self.builder.CreateString(value) if kind is str else value
            lists[kind].append(self.table(("UOffsetTRelative", text), (kinds[kind], stored)))
        return self.table(*[("UOffsetTRelative", self.list(tables)) for tables in lists.values()])

    def list(self, tables: Iterable[int]) -> int:
        places = [*tables]
        self.builder.StartVector(4, len(places), 4)
        for place in reversed(places):
            self.builder.PrependUOffsetTRelative(place)
        return int(self.builder.EndVector())

    def table(self, *fields: tuple[str, Any]) -> int:
        """The place of a table with ``fields`` (kind, value); one that is 0 is left out of the file."""
        self.builder.StartObject(len(fields))
        for number, (kind, value) in enumerate(fields):
            getattr(self.builder, f"Prepend{kind}Slot")(number, value, 0)
        return int(self.builder.EndObject())
