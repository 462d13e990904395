"""Capture: an ``nn.Module`` becomes the layer graph, through the ATen operators that it calls.

`trace` runs the module on an outline, `aten` says what each operator becomes.
"""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.wrappers import logits_among, unwrapped

from ..layers import Input, Layer, LayerGraph, Shape
from . import aten, pooling  # noqa: F401 (their rows)
from .found import Ending, Refused, Shaped, said_by
from .rows import ROWS, SUPPORTED
from .trace import Trace

_SIZES = (32, 224, 28, 64, 16, 8, 96, 128, 160, 48, 256, 299, 192, 12, 13, 10, 20, 24, 14, 6, 40, 56, 112, 4)
"""Heights and widths that a network is tried with, if nobody says for which it was made."""
_ENOUGH = 3
"""Sizes that are refused with one and the same sentence, which then does not come from the size."""


def capture(module: nn.Module, input_shape: Shape) -> LayerGraph:
    """Run ``module`` on the outline of one image of ``input_shape`` = (C, H, W) and return its layer graph.

    It is captured as it evaluates, whatever mode it is in: dropout and stochastic depth are the identity. No
    number is computed but from its parameters alone, and the module is left as it was. Of several outputs the
    first (or what is called logits or out) counts, and a final softmax is left out; the graph's ``left_out``
    says so.

    Raises:
        EdgeBcsError: the network cannot be traced or contains something unsupported; the message names it.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise EdgeBcsError(f"the input shape must be (channels, height, width), not {tuple(input_shape)}")
    module = unwrapped(module)
    trace = Trace(module, ROWS, SUPPORTED)
    image = Input(trace.new_name(_first_argument(module)), (), tuple(input_shape))
    try:
        result = trace.outputs(image)
    except EdgeBcsError:
        raise
    except Exception as error:
        raise EdgeBcsError(
            f"the network cannot be traced on an image of {'×'.join(map(str, input_shape))}: "
            f"{said_by(error)}{_where(error)}"
        ) from error
    return _finished(trace, result)


def captured_somehow(module: nn.Module) -> LayerGraph | None:
    """Return the layer graph of a network with unknown images; None if no usual size of them fits.

    Raises:
        EdgeBcsError: the network is refused for images of whatever size.
    """
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    said: list[str] = []
    for channels in (3, 1) if first is None else (first.in_channels,):
        for size in _SIZES:
            try:
                return capture(module, (channels, size, size))
            except EdgeBcsError as error:
                said.append(str(error))
            if said[-_ENOUGH:] == [said[-1]] * _ENOUGH:
                raise EdgeBcsError(said[-1])
    return None


def _first_argument(module: nn.Module) -> str:
    """The name of what the module calls its image; EdgeBcsError if it asks for more than one."""
    try:
        given = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return "x"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = [
        p.name for p in given if p.default is p.empty and p.kind in (*kinds, inspect.Parameter.KEYWORD_ONLY)
    ]
    if len(asked) > 1:
        raise EdgeBcsError(f"the network takes a second input '{asked[1]}'; only one image is supported")
    return given[0].name if given else "x"


def _where(error: BaseException) -> str:
    """The last line of the user's own that an exception passed through."""
    torchs, ours = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((torchs, ours, "<")):
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def _finished(trace: Trace, result: Any) -> LayerGraph:
    graph = trace.graph
    logits, said = logits_among(result)
    graph.left_out += [said] if said else []
    found = trace.found(logits) if isinstance(logits, Tensor) else None
    if isinstance(found, Refused):
        raise EdgeBcsError(found.sentence)
    if isinstance(found, Shaped):
        raise EdgeBcsError(found.refusal)
    if isinstance(found, Ending):
        graph.ending = found.operator
        graph.left_out.append(
            f"the {found.operator} at its end is left out, and losses and attacks take the logits"
        )
        found = found.layer
    if not isinstance(found, Layer) or len(found.shape) != 1:
        raise EdgeBcsError("the network must return one tensor of logits with shape (batch, classes)")
    idle = [name for name in trace.trained if name not in trace.taken]
    if idle:
        graph.left_out.append(
            f"{len(idle)} of its parameters, {idle[0]!r} the first, do not reach the logits"
        )
    graph.output = found.name
    needed = {found.name}
    for candidate in reversed(graph.layers):
        if candidate.name in needed:
            needed.update(candidate.inputs)
    # What does not reach the logits is not computed; the image stays, whatever the network does with it.
    graph.layers = [kept for kept in graph.layers if kept.name in needed or isinstance(kept, Input)]
    return graph
