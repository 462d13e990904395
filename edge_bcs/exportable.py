"""Whether `export` would take a network, told before it is trained and not after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.method.sparse_model import SparseModel


def refusal_of_export(sparse: SparseModel, input_shape: Sequence[int] | None = None) -> str | None:
    """Return the sentence with which `export` would refuse a network in evaluation mode, if it would.

    The network is neither changed nor run on numbers. Without (C, H, W) of its images, which networks of
    `edge_bcs.models` know themselves, usual sizes are tried, and only what none of them explains is told.
    """
    from edge_bcs.exporters.frontends.torch import capture, captured_somehow

    shape = input_shape or sparse.input_shape
    try:
        if shape is not None:
            _ = capture(sparse.network, tuple(shape)).epsilon
        elif (graph := captured_somehow(sparse.network)) is not None:
            _ = graph.epsilon
    except EdgeBcsError as error:
        return str(error)
    return None


def warn_if_not_exportable(
    sparse: SparseModel, input_shape: Sequence[int] | None = None, *, depth: int = 3
) -> None:
    """Warn, once for a network and its copies, if `export` would refuse it; `depth` calls up is the user."""
    network = sparse.network
    if getattr(network, "warned_of_export", False):
        return
    refusal = refusal_of_export(sparse, input_shape)
    if refusal is not None:
        network.warned_of_export = True  # type: ignore[assignment]
        warnings.warn(f"this network can be trained, but not exported: {refusal}", EdgeBcsWarning, depth)
