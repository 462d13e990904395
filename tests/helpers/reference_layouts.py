"""How the operators' stacks, bits, lists and bfloat16 lie in memory, in plain numpy."""

# mypy: disable-error-code="arg-type, assignment, call-arg, no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray
Attributes = dict[str, Any]


# Stacks and bits


def pack(images: Array, lanes: int, halo: int) -> Array:
    """[n, C, H, W] → stack [NB, P, B]: the halo, then each plane of H + halo rows of W + halo pixels."""
    n, channels, height, width = images.shape
    planes = np.zeros((n // lanes, channels, height + halo, width + halo, lanes))
    blocks = images.reshape(n // lanes, lanes, channels, height, width)
    planes[:, :, :height, :width] = blocks.transpose(0, 2, 3, 4, 1)
    before = np.zeros((n // lanes, halo * (width + halo) + halo, lanes))
    return np.concatenate([before, planes.reshape(n // lanes, -1, lanes)], axis=1)


def unpack(stack: Array, channels: int, height: int, width: int, halo: int) -> Array:
    """Stack [NB, P, B] → [n, C, H, W]; fails unless everything outside the image is zero."""
    blocks, pixels, lanes = stack.shape
    before = halo * (width + halo) + halo
    assert pixels == before + channels * (height + halo) * (width + halo), (
        stack.shape,
        channels,
        height,
        halo,
    )
    planes = stack[:, before:].reshape(blocks, channels, height + halo, width + halo, lanes)
    outside = stack[:, :before].any() or planes[:, :, height:].any() or planes[:, :, :, width:].any()
    assert not outside, "the halo is not zero"
    images = planes[:, :, :height, :width].transpose(0, 4, 1, 2, 3)
    return images.reshape(blocks * lanes, channels, height, width)


def pack_bits(images: Array, lanes: int) -> Array:
    """[n, C, H, W] → ReLU mask u8 [NB, C·H, ceil(W·B/8)]."""
    n, channels, height, width = images.shape
    rows = images.reshape(n // lanes, lanes, channels * height, width).transpose(0, 2, 3, 1)
    return np.packbits(
        (rows > 0).reshape(n // lanes, channels * height, width * lanes), axis=-1, bitorder="little"
    )


def unpack_bits(bits: Array, channels: int, height: int, width: int, lanes: int) -> Array:
    """Inverse of ``pack_bits``: booleans [n, C, H, W]."""
    blocks = bits.shape[0]
    rows = np.unpackbits(bits, axis=-1, bitorder="little")[..., : width * lanes]
    rows = rows.reshape(blocks, channels, height, width, lanes).transpose(0, 4, 1, 2, 3)
    return rows.reshape(blocks * lanes, channels, height, width).astype(bool)


# Lists


def build_lists(index: Array, layers: list[int], length: int) -> Array:
    """coo.lists from the ascending positions; ``layers``: fourteen integers a layer (offset, O, I, kernel,
    strides, pads, dilations, groups)."""
    kappa = len(index)
    column, row, position = (np.zeros(kappa, np.int64) for _ in range(3))
    forward_pointers, transpose_pointers = [], []
    table = np.asarray(layers).reshape(-1, 14)
    for offset, out, inn, kh, kw, sy, sx, top, left, _, _, dy, dx, groups in table:
        first, last = np.searchsorted(index, [offset, offset + out * inn // groups * kh * kw])
        o, i, y, x = np.unravel_index(index[first:last] - offset, (out, inn // groups, kh, kw))
        i = i + o // (out // groups) * (inn // groups)
        kpos = y * kw + x
        column[first:last] = i << 8 | kpos
        phase = ((y * dy - top) % sy) * sx + (x * dx - left) % sx
        order = np.lexsort((kpos, o, phase, i))
        row[first:last] = (o << 8 | kpos)[order]
        position[first:last] = np.arange(first, last)[order]
        forward_pointers += list(first + np.searchsorted(o, np.arange(out + 1)))
        group = (i * sy * sx + phase)[order]
        transpose_pointers += list(first + np.searchsorted(group, np.arange(inn * sy * sx + 1)))
    lists = np.concatenate([column, row, position, forward_pointers, transpose_pointers])
    assert len(lists) == length
    return lists.astype(np.int32)


def positions_of(a: Attributes, lists: Array) -> tuple[slice, tuple[Array, ...]]:
    """(range of the layer in the κ arrays, index into its kernel [O, I / groups, kh, kw]), from the forward
    lists."""
    pointers = lists[a["forward_pointer"] : a["forward_pointer"] + a["out_channels"] + 1]
    part = slice(pointers[0], pointers[-1])
    out = np.repeat(np.arange(a["out_channels"]), np.diff(pointers))
    column = lists[part]
    kpos = column & 255
    in_group = (column >> 8) - out // (a["out_channels"] // a["groups"]) * (a["in_channels"] // a["groups"])
    return part, (out, in_group, kpos // a["kernel"][1], kpos % a["kernel"][1])


# Half-size storage


def narrow(x):
    """bfloat16 of numbers, as u16: of two neighbours the nearer, of two equally near the even one; but not
    zero of what is not zero.
    """
    result = torch.tensor(x, dtype=torch.float32).to(torch.bfloat16)
    result = torch.where((result == 0) & torch.tensor(x != 0), torch.tensor(np.sign(x) * 2.0**-133), result)
    return result.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def widen(x):
    return torch.tensor(x.view(np.int16)).view(torch.bfloat16).double().numpy()
