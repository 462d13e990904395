"""What the compiler sees in a network, for those who do not export it: whether it would take it, which
layer is the last, and which are trained."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.method import heads
from edge_bcs.method.sparse_model import SparseModel

if TYPE_CHECKING:
    from edge_bcs.core.part import Part, Trained
    from edge_bcs.exporters.layers import LayerGraph


def look_at(sparse: SparseModel) -> None:
    """Let `sparse` know what its network does to the logits in the end, if it can be captured."""
    with contextlib.suppress(EdgeBcsError):
        _looked_at(sparse, None)


def _looked_at(sparse: SparseModel, input_shape: Sequence[int] | None) -> LayerGraph | None:
    """The layers of a network in evaluation mode, which is neither changed nor run on numbers.

    Without (C, H, W) of its images, which networks of `edge_bcs.models` know themselves, usual sizes are
    tried, and only what none of them explains is refused with an EdgeBcsError.
    """
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


def trained_part(sparse: SparseModel, part: Part, input_shape: Sequence[int]) -> Trained | None:
    """Return what of a network `part` names, as `export` takes it; None if that is all of it.

    Args:
        sparse: the network. part: as the user names it. input_shape: (C, H, W) of its images.

    Raises:
        EdgeBcsError: the network cannot be captured, so that nobody can tell, or has no such part.
    """
    if part.everything:
        return None
    from edge_bcs.exporters.trained import trained_of

    try:
        graph = _looked_at(sparse, input_shape)
    except EdgeBcsError as error:
        raise EdgeBcsError(
            f"which layers --train {part.text} means cannot be told: {error}; --train all trains everything"
        ) from None
    assert graph is not None, "a network whose images are known is captured or refused"
    kernels = {layer.name: layer for layer in sparse.layers}
    dense = {parameter.name: parameter for parameter in sparse.dense}
    return trained_of(part, graph, kernels, dense, sparse.layer_counts())


def last_layer(network: nn.Module, input_shape: Sequence[int] | None = None) -> str:
    """Return the name of the layer whose outputs are the logits, one each.

    What may lie behind it are activations and pooling. Without (C, H, W) of the images usual sizes are tried.

    Raises:
        EdgeBcsError: the network cannot be captured, or its logits do not come from one layer.
    """
    from edge_bcs.exporters.frontends.torch import capture, captured_somehow
    from edge_bcs.exporters.layers import Activation, Convolution, Flatten, Pool, Rescale

    what = f"the last layer of {type(network).__name__} cannot be told"
    remedy = "make the network with the number of classes that you want"
    shape = input_shape or getattr(network, "edge_bcs_input_shape", None)
    try:
        graph = captured_somehow(network) if shape is None else capture(network, tuple(shape))
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{what}: {error}; {remedy}") from None
    if graph is None:
        raise EdgeBcsError(f"{what} without the size of its images (--input-size); or {remedy}")
    layer = graph[graph.output]
    while isinstance(layer, Activation | Flatten | Pool | Rescale):
        source = graph[layer.inputs[0]]
        if layer.geometry[0] != source.geometry[0]:
            break  # pixels have become classes
        layer = source
    if not isinstance(layer, Convolution) or layer.groups > 1 or layer.geometry[0] != graph.num_classes:
        raise EdgeBcsError(f"{what}: its logits do not come from one convolution or linear layer; {remedy}")
    return layer.module


def with_outputs(
    network: nn.Module, classes: int, *, input_shape: Sequence[int] | None = None, seed: int = 0
) -> heads.NewHead | None:
    """Give `network` so many outputs: where it has another number, its last layer is made anew, in place.

    Args:
        network: the network. classes: at least 2. input_shape: (C, H, W) of its images, if that is known.
        seed: of the new weights (see `edge_bcs.method.heads`).

    Returns:
        what is new; None if it has so many outputs already.

    Raises:
        EdgeBcsError: its last layer cannot be told (see `last_layer`), or what follows needs as many outputs
            as there were. The network is then as it was.
    """
    layer = last_layer(network, input_shape)
    if heads.outputs(network, layer) == classes:
        heads.remember(network, layer)
        return None
    trial = copy.deepcopy(network)
    before = heads.reshape(trial, layer, classes)
    try:
        last_layer(trial, input_shape)
    except EdgeBcsError:
        raise EdgeBcsError(
            f"{type(network).__name__} cannot have {classes} outputs: something behind its last layer, "
            f"{layer}, needs the {before} that it has; make the network with the number of classes that you "
            "want"
        ) from None
    return heads.renew(network, layer, classes, seed)
