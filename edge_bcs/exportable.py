"""Whether `export` would take a network, told before it is trained and not after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.sparse_model import SparseModel


def refusal_of_export(sparse: SparseModel, input_shape: Sequence[int] | None = None) -> str | None:
    """Return the sentence with which `export` would refuse a network in evaluation mode, if it would.

    The network is traced, and neither run nor changed. Without (C, H, W) of its images, which networks of
    `edge_bcs.models` know themselves, what depends on their size is left out.
    """
    from edge_bcs.exporters.frontends.torch import capture
    from edge_bcs.exporters.layers import UNKNOWN

    shape = input_shape or sparse.input_shape
    try:
        with evaluation_mode(sparse):
            _ = capture(sparse.network, UNKNOWN if shape is None else tuple(shape)).epsilon
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
