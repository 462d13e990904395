"""Runs single operators of the library, and says in plain numpy what their data layouts are.

To add a case of an operator (tests/native; for one in a network see exporters/test_operator_table.py), call
``run("Name", inputs, outputs, **attributes)`` in the file of its kind and hold the result against torch in
float64 or plain numpy. Inputs and outputs are dictionaries in the order of the operator's ports, None where
one is absent. ``pack`` and ``unpack`` bring images into the operators' layout and back, and check its zeros.
The same call runs in ONNX Runtime, under a sanitizer and on an emulated board, and becomes a seed of the
fuzzer.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from edge_bcs.runtime import library
from onnx import TensorProto, helper

from helpers import programs

if TYPE_CHECKING:
    import torch

ELEMENT_TYPE = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.bool_): TensorProto.BOOL,
}


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    """One node of the domain edge_bcs; '' is an absent optional input or output."""
    return helper.make_node(operator, list(inputs), list(outputs), domain="edge_bcs", **attributes)


def session(
    nodes: Sequence[Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    threads: int = 1,
    environment_allocator: bool = False,
    half: bool = False,
) -> onnxruntime.InferenceSession:
    """A session over nodes; inputs and outputs map names to numpy dtypes (their shapes stay free)."""

    def value(name: str, dtype: Any) -> Any:
        return helper.make_tensor_value_info(name, ELEMENT_TYPE[np.dtype(dtype)], None)

    graph = helper.make_graph(
        list(nodes),
        "test",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge_bcs", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    if environment_allocator:
        options.add_session_config_entry("session.use_env_allocators", "1")
    library.register(options)
    with library.half_precision(half):
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def run(
    operator: str,
    inputs: Mapping[str, np.ndarray | None],
    outputs: Mapping[str, Any],
    *,
    threads: int = 1,
    half: bool = False,
    **attributes: Any,
) -> dict[str, np.ndarray]:
    """Runs one operator: in ONNX Runtime, or on an emulated machine (see `helpers.programs`).

    Args:
        operator: its name.
        inputs: name -> array, in the operator's order; None for an absent optional input.
        outputs: name -> dtype, in the operator's order; None for an absent optional output.
        threads: how many threads.
        half: whether its stacks are in half precision (see `helpers.half`).
        attributes: the node's attributes.

    Returns:
        name -> array of every output that is there; those that continue an input in place are new arrays.
    """
    if programs.EMULATOR:
        copies = {name: None if array is None else array.copy() for name, array in inputs.items()}
        return programs.run_operator(operator, copies, outputs, threads=threads, half=half, **attributes)
    given = {name: np.ascontiguousarray(array) for name, array in inputs.items() if array is not None}
    wanted = {name + ".out": dtype for name, dtype in outputs.items() if dtype is not None}
    made = node(
        operator,
        ["" if array is None else name for name, array in inputs.items()],
        ["" if dtype is None else name + ".out" for name, dtype in outputs.items()],
        **attributes,
    )
    opened = session(
        [made], {name: array.dtype for name, array in given.items()}, wanted, threads=threads, half=half
    )
    results = opened.run(list(wanted), given)
    return {name.removesuffix(".out"): result for name, result in zip(wanted, results, strict=True)}


def budget_library() -> ctypes.CDLL:
    """The library's C functions for the memory budget, with their types."""
    functions = ctypes.CDLL(str(library.library_path()))
    functions.edge_bcs_budget_begin.argtypes = [ctypes.c_int64]
    functions.edge_bcs_budget_begin.restype = ctypes.c_int64
    functions.edge_bcs_budget_end.restype = None
    functions.edge_bcs_budget_reserve.argtypes = [ctypes.c_int64]
    functions.edge_bcs_budget_release.argtypes = [ctypes.c_int64]
    functions.edge_bcs_budget_release.restype = None
    functions.edge_bcs_budget_current.restype = ctypes.c_int64
    functions.edge_bcs_budget_peak.restype = ctypes.c_int64
    functions.edge_bcs_budget_placed.restype = ctypes.c_int64
    functions.edge_bcs_budget_placed_peak.restype = ctypes.c_int64
    functions.edge_bcs_budget_reset_peak.restype = None
    functions.edge_bcs_isa.restype = ctypes.c_char_p
    functions.edge_bcs_last_refusal.argtypes = [ctypes.POINTER(ctypes.c_int64)] * 3
    functions.edge_bcs_last_refusal.restype = None
    return functions


def images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random images f32 [blocks · lanes, …] for a shape (blocks, lanes, …), others for another shape."""
    blocks, lanes, *rest = shape
    return np.random.default_rng([seed, *shape]).normal(size=(blocks * lanes, *rest)).astype(np.float32)


def sizes(shape: tuple[int, ...]) -> dict[str, int]:
    """Attributes of an operator on stacks of a shape (blocks, lanes, channels, height, width)."""
    _, lanes, channels, height, width = shape
    return {"channels": channels, "height": height, "width": width, "lanes": lanes}


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same in torch's float64, whose gradient is wanted."""
    import torch

    return torch.from_numpy(array.astype(np.float64)).requires_grad_()


def pack(images: np.ndarray, lanes: int, halo: int) -> np.ndarray:
    """f32 [n, C, H, W] as a stack [n / lanes, P, lanes]: zeros after each row and plane and in front."""
    n, channels, height, width = images.shape
    planes = np.zeros((n, channels, height + halo, width + halo), np.float32)
    planes[:, :, :height, :width] = images
    front = np.zeros((n, halo * (width + halo) + halo), np.float32)
    pixels = np.concatenate([front, planes.reshape(n, -1)], axis=1)
    return np.ascontiguousarray(pixels.reshape(n // lanes, lanes, -1).transpose(0, 2, 1))


def unpack(stack: np.ndarray, *sizes: int) -> np.ndarray:
    """The images f32 [n, C, H, W] of a stack, given C, H, W and the halo; fails if that is not zero."""
    channels, height, width, halo = sizes
    blocks, _, lanes = stack.shape
    pixels = stack.transpose(0, 2, 1).reshape(blocks * lanes, -1)
    origin = halo * (width + halo) + halo
    planes = pixels[:, origin:].reshape(blocks * lanes, channels, height + halo, width + halo)
    halos = (pixels[:, :origin], planes[:, :, height:], planes[:, :, :, width:])
    assert not any(part.any() for part in halos), "the halo is not zero"
    return planes[:, :, :height, :width].copy()


def pack_bits(images: np.ndarray, lanes: int) -> np.ndarray:
    """The ReLU bits u8 [NB, C·H, ceil(W·B / 8)] of images f32 [n, C, H, W]: which are positive."""
    n, channels, height, width = images.shape
    rows = images.reshape(n // lanes, lanes, channels * height, width).transpose(0, 2, 3, 1)
    return np.packbits(
        rows.reshape(n // lanes, channels * height, width * lanes) > 0, axis=2, bitorder="little"
    )


def lists_length(kappa: int, layers: Sequence[Mapping[str, Any]]) -> int:
    """M, the length of coo.lists, for layers with out_channels, in_channels and strides."""
    rows = sum(int(layer["out_channels"]) + 1 for layer in layers)
    columns = sum(int(layer["in_channels"]) * int(np.prod(layer["strides"])) + 1 for layer in layers)
    return 3 * kappa + rows + columns


def build_lists(
    index: np.ndarray, layers: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, list[int], list[int]]:
    """coo.lists of positions `index`, and each layer's offsets of its forward and transpose pointers.

    Args:
        index: i32[κ] strictly ascending.
        layers: in order, each with offset, out_channels, in_channels, kernel, strides, pads, dilations and
            groups.

    Returns:
        lists i32[M], forward_pointer of each layer, transpose_pointer of each layer (offsets into lists).
    """
    kappa = len(index)
    entries = []  # (layer, out, in, kpos) of each position in the arrays
    for position in index.tolist():
        number = max(i for i, layer in enumerate(layers) if layer["offset"] <= position)
        layer = layers[number]
        kh, kw = layer["kernel"]
        inputs, outputs = (layer[f"{side}_channels"] // layer["groups"] for side in ("in", "out"))
        out, rest = divmod(position - layer["offset"], inputs * kh * kw)
        channel, kpos = divmod(rest, kh * kw)
        entries.append((number, out, out // outputs * inputs + channel, kpos))
    forward = [i << 8 | kpos for _, _, i, kpos in entries]

    def key(t: int) -> tuple[int, int, int, int, int]:
        number, out, channel, kpos = entries[t]
        layer = layers[number]
        place = divmod(kpos, layer["kernel"][1])
        down, across = (
            (place[axis] * layer["dilations"][axis] - layer["pads"][axis]) % layer["strides"][axis]
            for axis in (0, 1)
        )
        return number, channel, down * layer["strides"][1] + across, out, kpos

    keys = [key(t) for t in range(kappa)]
    order = sorted(range(kappa), key=keys.__getitem__)
    transpose_row = [entries[t][1] << 8 | entries[t][3] for t in order]
    lists = forward + transpose_row + order
    forward_pointers, transpose_pointers = [], []
    rows = [entry[:2] for entry in entries]
    for number, layer in enumerate(layers):
        forward_pointers.append(len(lists))
        for out in range(layer["out_channels"] + 1):
            lists.append(bisect_left(rows, (number, out)))  # how many stand in earlier rows
    columns = [keys[t][:3] for t in order]
    for number, layer in enumerate(layers):
        transpose_pointers.append(len(lists))
        phases = int(np.prod(layer["strides"]))
        for slot in range(layer["in_channels"] * phases + 1):
            lists.append(bisect_left(columns, (number, *divmod(slot, phases))))
    return np.array(lists, np.int32), forward_pointers, transpose_pointers
