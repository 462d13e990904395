"""Operators that move numbers and compute nothing: reshapes, permutations, slices, shuffles, concatenation.

They run on the numbers 0, 1, … of two images, so that it does not matter how a network writes such a thing
(view, transpose, view for a channel shuffle; chunk; x[:, ::2]): where the result is again an image's
channels, in whatever order, or a part of its map, it becomes a layer. What is nothing yet, such as a map with
the channels last, is a `Shaped` that goes on until it is.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from edge_bcs.core.errors import EdgeBcsError

from ..layers import AveragePool, Channels, Concat, Flatten, Layer, Pad, Shape
from .call import Call
from .found import BATCH, Shaped, batched, said_by

_IMAGES = 2
"""Enough to see that no image has numbers of another."""


def moved(call: Call, argument: str) -> Any:
    """What the call makes of one tensor by moving its numbers: a layer, a `Shaped`, or a list of them."""
    outlines, given = call.result(), call.shaped(argument)
    arguments = {name: _two_images(value) for name, value in call.arguments.items()}
    try:
        found = call.computed({**arguments, argument: numbers_of(given).contiguous()})
    except (RuntimeError, IndexError) as error:
        raise EdgeBcsError(
            f"{call.module} treats a batch of two images otherwise ({said_by(error)})"
        ) from error
    if isinstance(found, Tensor):
        return settled(call, given, found, outlines.shape)
    if len(found) != len(outlines):
        raise EdgeBcsError(f"{call.module} takes a batch apart, which is not supported")
    return [settled(call, given, part, outline.shape) for part, outline in zip(found, outlines, strict=True)]


def joined(call: Call, argument: str) -> Layer | Shaped:
    """What the call makes of a list of tensors by laying them one behind the other, or in turn."""
    outline, parts = call.result(), call.all_shaped(argument)
    behind = {layer_of(part).name: layer_of(part) for part in parts}
    if len({layer.shape[1:] for layer in behind.values()}) > 1:
        raise EdgeBcsError(refusal(call, outline.shape))
    # The layers one behind the other, each once, and of their numbers those that are asked for.
    total, first, offsets = sum(prod(layer.shape) for layer in behind.values()), 0, {}
    for name, layer in behind.items():
        offsets[name] = first
        first += prod(layer.shape)
    numbers = []
    for part in parts:
        found, count = numbers_of(part), prod(layer_of(part).shape)
        numbers.append(found // count * total + offsets[layer_of(part).name] + found % count)
    together = call.computed({**call.arguments, argument: numbers})
    whole = next(iter(behind.values()))
    if len(behind) > 1:
        shape = (sum(layer.shape[0] for layer in behind.values()), *whole.shape[1:])
        name = call.name if _is_whole(together, shape) else f"{call.name}_parts"
        whole = call.add(Concat(name, tuple(behind), shape))
    return settled(call, whole, together, outline.shape)


def layer_of(found: Layer | Shaped) -> Layer:
    """The layer that holds the numbers."""
    return found.layer if isinstance(found, Shaped) else found


def numbers_of(found: Layer | Shaped) -> Tensor:
    """Which numbers of its layer a tensor holds, for two images, laid out as the network may view them."""
    if isinstance(found, Shaped):
        return found.numbers.contiguous()
    return torch.arange(_IMAGES * prod(found.shape)).reshape(_IMAGES, *found.shape)


def channels_last(found: Layer | Shaped) -> bool:
    """Whether the last axis is the channels and those before it are the pixels, in order."""
    shape = layer_of(found).shape
    numbers, pixels = numbers_of(found), prod(shape[1:])
    if numbers.dim() < 2 or numbers.shape[-1] != shape[0] or len(numbers) != _IMAGES:
        return False
    wanted = numbers_of(layer_of(found)).reshape(_IMAGES, shape[0], pixels).transpose(1, 2)
    return torch.equal(numbers.reshape(_IMAGES, -1, shape[0]), wanted)


def with_last(call: Call, found: Shaped, layer: Layer) -> Shaped:
    """``layer``, of as many pixels as that of ``found``, with the channels last as there."""
    numbers = numbers_of(layer).flatten(2).transpose(1, 2).reshape(*found.numbers.shape[:-1], layer.shape[0])
    shape = torch.Size((*found.shape[:-1], layer.shape[0]))
    return Shaped(layer, numbers, shape, refusal(call, shape))


def each_channel(found: Layer | Shaped, shape: Shape) -> Layer | None:
    """The layer whose numbers, one a channel, are repeated over the pixels of a map of that shape."""
    layer, numbers = layer_of(found), numbers_of(found)
    if (
        len(shape) != 3
        or prod(layer.shape) != shape[0]
        or tuple(numbers.shape[1:]) not in (shape, (shape[0], 1, 1))
    ):
        return None
    wanted = torch.arange(_IMAGES * shape[0]).reshape(_IMAGES, shape[0], 1, 1)
    return layer if torch.equal(numbers, wanted.expand_as(numbers)) else None


def refusal(call: Call, shape: torch.Size) -> str:
    """The sentence for what nothing comes of."""
    return (
        f"the {call.operator} '{call.name}' gives {batched(shape)}, and nothing that follows makes a map or "
        "a vector of it; keep the batch dimension, and flatten as torch.flatten(x, 1) does"
    )


def settled(call: Call, given: Layer | Shaped, numbers: Tensor, shape: torch.Size) -> Layer | Shaped:
    """The layer that holds these numbers of that of ``given``, added if need be, or a `Shaped`."""
    layer = layer_of(given)
    found = _settled(call, layer, numbers) if shape[0] == BATCH else None
    if found is not None:
        return found
    # Of several that lead astray the first is named.
    said = given.refusal if isinstance(given, Shaped) else refusal(call, shape)
    return Shaped(layer, numbers, shape, said)


def _two_images(value: Any) -> Any:
    """An argument with that many images instead of the outline's."""
    if isinstance(value, list | tuple):
        return type(value)(map(_two_images, value))
    whole = isinstance(value, int) and not isinstance(value, bool) and value % BATCH == 0
    return value // BATCH * _IMAGES if whole else value


def _is_whole(numbers: Tensor, shape: Shape) -> bool:
    images = (_IMAGES, *shape)
    return tuple(numbers.shape) == images and torch.equal(numbers.flatten(), torch.arange(prod(images)))


def _settled(call: Call, layer: Layer, numbers: Tensor) -> Layer | None:
    count = prod(layer.shape)
    if len(numbers) != _IMAGES or not numbers.numel() or not torch.equal(numbers[1], numbers[0] + count):
        return None
    if _is_whole(numbers, layer.shape):
        return layer
    one = numbers[0]
    if len(layer.shape) == 3 and one.dim() == 1:
        shape: Shape = (count,)
    elif len(layer.shape) == 1 and one.dim() == 3:
        shape = (count, 1, 1)
    else:
        return _selected(call, layer, one) if one.dim() == len(layer.shape) else None
    return call.add(Flatten(call.name, (layer.name,), shape)) if _is_whole(numbers, shape) else None


def _selected(call: Call, layer: Layer, one: Tensor) -> Layer | None:
    """Channels of a map, or numbers of a vector, and a part of its height and width."""
    height, width = layer.shape[1:] or (1, 1)
    one = one.reshape(len(one), *(one.shape[1:] or (1, 1)))
    channels, rows, columns = (
        axis.tolist()
        for axis in (
            one[:, 0, 0] // (height * width),
            one[0, :, 0] % (height * width) // width,
            one[0, 0] % width,
        )
    )
    axes = [torch.tensor(axis) for axis in (channels, rows, columns)]
    grid = (axes[0][:, None, None] * height + axes[1][:, None]) * width + axes[2]
    if not torch.equal(grid, one):
        return None
    down, across = _steps(rows), _steps(columns)
    if not down or not across:
        return None
    part = (len(rows), len(columns)) != (height, width)
    if channels != [*range(layer.shape[0])]:
        shape = (len(channels), *layer.shape[1:])
        name = f"{call.name}_channels" if part else call.name
        layer = call.add(Channels(name, (layer.name,), shape, tuple(channels)))
    if (down, across) != (1, 1):
        # From the first row and column that count; windows of one pixel pick every so many of them.
        layer = _cropped(call, f"{call.name}_part", layer, rows[0], columns[0], height, width)
        shape, source = (layer.shape[0], len(rows), len(columns)), (layer.shape[1], layer.shape[2])
        return call.add(AveragePool(call.name, (layer.name,), shape, (1, 1), (down, across), source))
    return _cropped(call, call.name, layer, rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def _steps(places: list[int]) -> int:
    """The distance from each place to the next, 0 if they differ or go backwards."""
    steps = {after - before for before, after in pairwise(places)} or {1}
    return max(0, steps.pop()) if len(steps) == 1 else 0


def _cropped(call: Call, name: str, layer: Layer, top: int, left: int, bottom: int, right: int) -> Layer:
    height, width = layer.shape[1:] or (1, 1)
    pads = (-top, -left, bottom - height, right - width)
    if pads == (0, 0, 0, 0):
        return layer
    return call.add(Pad(name, (layer.name,), (layer.shape[0], bottom - top, right - left), pads))
