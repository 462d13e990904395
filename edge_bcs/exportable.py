"""Whether `export` would take a network, told before it is trained and not after."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.method.sparse_model import SparseModel

if TYPE_CHECKING:
    from edge_bcs.exporters.layers import LayerGraph


def refusal_of_export(sparse: SparseModel, input_shape: Sequence[int] | None = None) -> str | None:
    """Return the sentence with which `export` would refuse a network in evaluation mode, if it would.

    The network is neither changed nor run on numbers. Without (C, H, W) of its images, which networks of
    `edge_bcs.models` know themselves, usual sizes are tried, and only what none of them explains is told.
    """
    try:
        _looked_at(sparse, input_shape)
    except EdgeBcsError as error:
        return str(error)
    return None


def look_at(sparse: SparseModel) -> None:
    """Let `sparse` know what its network does to the logits in the end, if it can be captured."""
    with contextlib.suppress(EdgeBcsError):
        _looked_at(sparse, None)


def _looked_at(sparse: SparseModel, input_shape: Sequence[int] | None) -> LayerGraph | None:
    from edge_bcs.exporters.frontends.torch import capture, captured_somehow

    shape = input_shape or sparse.input_shape
    graph = captured_somehow(sparse.network) if shape is None else capture(sparse.network, tuple(shape))
    if graph is not None:
        _ = graph.epsilon
        sparse.ending = graph.ending
    return graph


def warn_if_not_exportable(
    sparse: SparseModel, input_shape: Sequence[int] | None = None, *, depth: int = 3
) -> None:
    """Warn, once for a network and its copies, if `export` would refuse it, or leaves something of it out.

    Args:
        sparse: the network. input_shape: (C, H, W) of its images. depth: calls up to the user.
    """
    network = sparse.network
    if getattr(network, "warned_of_export", False):
        return
    told = ""
    try:
        graph = _looked_at(sparse, input_shape)
        if graph is not None and graph.left_out:
            told = f"of this network a part is not used: {'; '.join(graph.left_out)}"
    except EdgeBcsError as error:
        told = f"this network can be trained, but not exported: {error}"
    if told:
        network.warned_of_export = True  # type: ignore[assignment]
        warnings.warn(told, EdgeBcsWarning, depth)
