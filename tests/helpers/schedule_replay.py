"""The peak of a memory plan, found by replaying the file with reference counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from helpers.schedule_checker import IN_PLACE


def bytes_of(array: np.ndarray) -> int:
    """Size of a tensor of the interpreter, whose float64 stands for float32."""
    return array.size * (4 if array.dtype == np.float64 else array.itemsize)


def check_schedule(model: onnx.ModelProto, tensors: dict[str, Any]) -> int:
    """Replay the file with reference counts and the interpreter's actual arrays; returns the peak in bytes.

    Fails if a node reads memory that is not written yet or already given back.
    """
    memory = {value.name: f"bound {value.name}" for value in model.graph.input}
    bound_outputs = {value.name for value in model.graph.output}
    readers: dict[str, int] = {}
    owner = dict(memory)
    for node in model.graph.node:  # first pass: who owns what, and how often it is read
        for name in node.input:
            if name:
                readers[owner[name]] = readers.get(owner[name], 0) + 1
        for position, name in enumerate(node.output):
            if name:
                source = IN_PLACE.get(node.op_type, {}).get(position)
                owner[name] = name if source is None else owner[node.input[source]]
    # ONNX Runtime gives back what nobody reads when the run ends.
    unread = {name for name in owner.values() if name not in readers}
    alive: dict[str, int] = {}
    peak = 0
    for node in model.graph.node:
        made = []
        for position, name in enumerate(node.output):
            fresh = position not in IN_PLACE.get(node.op_type, {}) and name not in bound_outputs
            if name and fresh:
                alive[name] = bytes_of(np.asarray(tensors[name]))
                made.append(name)
        for name in filter(None, node.input):
            root = owner[name]
            assert root.startswith("bound ") or root in bound_outputs or root in alive, (node.name, name)
        work = 0
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if attributes.get("algorithm") in (b"dense", b"winograd"):
            kernel = attributes["kernel"]
            work = 4 * attributes["out_channels"] * attributes["in_channels"] * kernel[0] * kernel[1]
            if attributes["algorithm"] == b"winograd":
                work += work // 3  # its form of three weights is four numbers
        peak = max(peak, sum(alive.values()) + work)
        for name in filter(None, node.input):
            readers[owner[name]] -= 1
        for root in {owner[name] for name in [*node.input, *made] if name}:
            if root not in unread and not readers.get(root):
                alive.pop(root, None)
    assert alive.keys() <= unread
    return peak
