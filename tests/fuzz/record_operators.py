"""A pytest plugin that writes each operator call of the native tests as a case for tests/fuzz/operators.cpp.

    EDGE_BCS_FUZZ_CORPUS=FOLDER pytest -p record_operators tests/native

The smallest calls of every operator are kept; those of many thousand numbers teach a fuzzer nothing. An
operator of the library that no call reached is an error: the fuzzer would not find its name by itself.
"""

# mypy: disable-error-code="dict-item"

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.library import library_path
from helpers import operators

_LARGEST, _KEPT = 32 << 10, 40
_cases: dict[tuple[str, str], set[bytes]] = defaultdict(set)


def _name(text: str) -> bytes:
    return struct.pack("<B", len(text)) + text.encode()


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _name(name) + b"\x02" + _name(value)
    if isinstance(value, float):
        return _name(name) + struct.pack("<Bf", 1, value)
    if isinstance(value, Iterable):
        value = list(value)
        if any(isinstance(item, float) for item in value):
            return _name(name) + struct.pack(f"<BB{len(value)}f", 4, len(value), *value)
        numbers = [int(item) for item in value]
        return _name(name) + struct.pack(f"<BB{len(numbers)}q", 3, len(numbers), *numbers)
    return _name(name) + struct.pack("<Bq", 0, int(value))


def _input(array: Any) -> bytes:
    if array is None:
        return b"\0"
    array = np.ascontiguousarray(array)
    kind = operators.ELEMENT_TYPE[array.dtype]
    head = struct.pack(f"<BB{array.ndim}iI", kind, array.ndim, *array.shape, array.nbytes)
    return head + array.tobytes()


def encode(
    domain: str,
    operator: str,
    inputs: Mapping[str, Any],
    outputs: Iterable[bool],
    attributes: Mapping[str, Any],
) -> bytes:
    """Return one case, as `decode` of operators.cpp reads it."""
    wanted = sum(1 << number for number, there in enumerate(outputs) if there)
    parts = [_name(domain), _name(operator), struct.pack("<B", len(attributes))]
    parts += [_attribute(*item) for item in attributes.items()]
    parts += [struct.pack("<B", len(inputs)), *map(_input, inputs.values())]
    return b"".join([*parts, struct.pack("<BI", 1, wanted)])


def _recording(run: Callable[..., Any], domain: str) -> Callable[..., Any]:
    def recorded(operator: str, inputs: Any, outputs: Any, *, threads: int = 1, **attributes: Any) -> Any:
        flat = [len(value) for value in attributes.values() if isinstance(value, (list, tuple))]
        size = sum(0 if array is None else np.asarray(array).nbytes for array in inputs.values())
        if size <= _LARGEST and max(flat, default=0) < 256:
            there = [dtype is not None for dtype in outputs.values()]
            _cases[domain, operator].add(encode(domain, operator, inputs, there, attributes))
        extra = {"threads": threads} if threads != 1 else {}
        return run(operator, inputs, outputs, **extra, **attributes)

    return recorded


def pytest_configure(config: pytest.Config) -> None:
    """Record before the test modules import the function."""
    operators.run = _recording(operators.run, "edge_bcs")


def pytest_collection_finish(session: pytest.Session) -> None:
    """The tests of the training operators have a function of their own."""
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        if module.__name__ == "test_native_ort_training":
            module.run = _recording(module.run, "com.microsoft")


def _more() -> Iterator[tuple[str, str, dict[str, Any], int, dict[str, Any]]]:
    """Calls of operators that the tests give only large tensors, or several at once."""
    rng = np.random.default_rng(0)

    def real(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    index = np.array([0, 3, 4, 9, 12, 19], np.int32)
    for rate, noise, size in ((0.1, 1e-6, 20), (1.0, 0.0, 20), (5.0, 1.0, 20), (5.0, 0.1, 1 << 20)):
        hyper, counter = np.array([rate, 5e-4, 0.9, noise], np.float32), np.array([7, 3], np.int64)
        step = {"value": real(6), "index": index, "momentum": real(6), "gradient": real(6)}
        yield "edge_bcs", "RewireStep", {**step, "hyper": hyper, "counter": counter}, 4, {"size": size}
    yield "edge_bcs", "GradientReady", {"buffer": real(3)}, 1, {}
    yield "edge_bcs", "ResetGradient", {"buffer": real(3), "lazy_reset_grad": np.array([True])}, 1, {}
    for name in ("ReluGrad", "LeakyReluGrad", "SigmoidGrad", "TanhGrad", "QuickGeluGrad"):
        attributes = {"alpha": 0.5} if name[0] in "LQ" else {}
        yield "com.microsoft", name, {"dY": real(2, 3), "value": real(2, 3)}, 1, attributes
    for flag in (None, np.array([True]), np.array([False])):
        given = {"buffer": real(5), "gradient": real(5), "overwrite": flag}
        yield "com.microsoft", "InPlaceAccumulatorV2", given, 2, {}
    window = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}
    shapes: dict[str, Any] = {"dY": real(2, 4, 3, 5), "X": real(2, 2, 6, 5), "W": real(4, 2, 3, 2)}
    yield "com.microsoft", "ConvGrad", shapes, 3, {**window, "dilations": [1, 1], "group": 1}
    grouped = {**shapes, "W": real(4, 1, 3, 2)}
    yield "com.microsoft", "ConvGrad", grouped, 3, {**window, "dilations": [1, 1], "group": 2}
    pooled, image = real(2, 2, 3, 5), real(2, 2, 6, 5)
    places = np.arange(60, dtype=np.int64).reshape(2, 2, 3, 5) * 2
    yield "com.microsoft", "MaxPoolGrad", {"dY": pooled, "Indices": places, "X": image}, 1, {}
    for include in (0, 1):
        attributes = {**window, "count_include_pad": include}
        yield "com.microsoft", "AveragePoolGrad", {"dY": pooled, "X": image}, 1, attributes


def _declared() -> set[str]:
    """The operators of the library's own domain."""
    library = ctypes.CDLL(str(library_path()))
    library.edge_bcs_operators.restype = ctypes.c_char_p
    return {line.partition(" ")[0] for line in library.edge_bcs_operators().decode().splitlines()}


def _dense_convolutions() -> Iterator[tuple[str, dict[str, Any], int, dict[str, Any]]]:
    """Convolutions with all their weights there, of which the tests give them many: operator, inputs, number
    of outputs, attributes."""
    rng = np.random.default_rng(1)
    for algorithm, groups, stride in (
        ("dense", 1, 1),
        ("dense", 2, 2),
        ("winograd", 1, 1),
        ("depthwise", 4, 2),
    ):
        lanes, size = (16, 4) if algorithm == "winograd" else (4, 5)
        out = (size - 1) // stride + 1
        weights, channels = rng.normal(size=4 * 4 // groups * 9).astype(np.float32), 4
        images = rng.normal(size=(lanes, channels, size, size)).astype(np.float32)
        results = rng.normal(size=(lanes, channels, out, out)).astype(np.float32)
        x, dy = operators.pack(images, lanes, 1), operators.pack(results, lanes, 1)
        affine = rng.normal(size=2 * channels).astype(np.float32)
        attributes: dict[str, Any] = {
            **{"in_channels": channels, "in_height": size, "in_width": size, "in_halo": 1, "lanes": lanes},
            **{"out_channels": channels, "out_height": out, "out_width": out, "out_halo": 1},
            **{"kernel": [3, 3], "strides": [stride] * 2, "pads": [1] * 4, "dilations": [1] * 2},
            **{"groups": groups, "algorithm": algorithm, "weight": 0, "affine": 0, "activation": "relu6"},
        }
        given: dict[str, Any] = {"x": x, "value": weights, "affine": affine, "residual": dy}
        yield "DenseConv", given, 3, attributes
        attributes |= {"dy_halo": 1, "dx_halo": 1, "mask_kind": 2, "mask_activation": "relu6"}
        given = {"dy": dy, "value": weights, "affine": affine, "addend": x}
        given["mask"] = operators.pack_bits(images, lanes)
        yield "DenseConvInputGrad", given, 1, attributes
        sums = {"gradient": np.zeros_like(weights), "affine_grad": np.zeros_like(affine)}
        given = {"dy": dy, "x": x, **{name: given[name] for name in list(given)[1:]}, **sums}
        yield "DenseConvGrad", given, 3, attributes


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the smallest cases of each operator."""
    for domain, operator, inputs, outputs, attributes in _more():
        _cases[domain, operator].add(encode(domain, operator, inputs, [True] * outputs, attributes))
    for operator, inputs, outputs, attributes in _dense_convolutions():
        _cases["edge_bcs", operator].add(encode("edge_bcs", operator, inputs, [True] * outputs, attributes))
    missing = _declared() - {operator for domain, operator in _cases if domain == "edge_bcs"}
    if missing:
        raise pytest.UsageError(f"no call of {', '.join(sorted(missing))} is small enough for the fuzzer.")
    folder = Path(os.environ["EDGE_BCS_FUZZ_CORPUS"])
    folder.mkdir(parents=True, exist_ok=True)
    for (_, operator), cases in _cases.items():
        for case in sorted(cases, key=len)[:_KEPT]:
            (folder / f"{operator}-{hashlib.sha256(case).hexdigest()[:12]}").write_bytes(case)
