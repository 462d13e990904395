"""Which parameters of a captured network are trained, and what of its passes that concerns.

"last:N" is counted in the order of computation: the last N convolutions and linear layers are trained, and
every norm, bias and scale from the first of them on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.part import Part, Trained
from edge_bcs.core.segments import Segment

from .layers import BatchNorm, Convolution, GroupNorm, Layer, LayerGraph, Scale


def trained_of(
    part: Part,
    graph: LayerGraph,
    kernels: Mapping[str, Segment],
    dense: Mapping[str, Segment],
    counts: Mapping[str, int],
) -> Trained:
    """What of a network is trained.

    Args:
        part: as the user names it. graph: the layers.
        kernels: module → weights among the connections, in the order in which they are numbered.
        dense: parameter → its place in ``dense.value``, in order.
        counts: module → connections.

    Raises:
        EdgeBcsError: the network has no such part.
    """
    if part.everything:
        return Trained(part, tuple(kernels.values()), tuple(dense.values()), sum(counts.values()))
    names = _chosen(part, graph)
    found = tuple(kernel for name, kernel in kernels.items() if _named(name, "weight") in names)
    chosen = tuple(parameter for name, parameter in dense.items() if name in names)
    if not found and not chosen:
        kinds = {
            "norm": "no norm that has a scale or a shift",
            "bias": "neither a bias nor a norm with a shift",
        }
        raise EdgeBcsError(
            f"the network has {kinds[part.text]}, so there is nothing to train: choose another --train"
        )
    return Trained(part, found, chosen, sum(counts[kernel.name] for kernel in found))


def _chosen(part: Part, graph: LayerGraph) -> Collection[str]:
    if part.layers:
        weighty = [place for place, layer in enumerate(graph.layers) if isinstance(layer, Convolution)]
        if part.layers > len(weighty):
            raise EdgeBcsError(
                f"{part.text} are more layers than the {len(weighty)} with weights that the network has; "
                "--train all trains everything"
            )
        return {name for layer in graph.layers[weighty[-part.layers] :] for name in parameters(layer)}
    shifts_alone = part.text == "bias"
    return {
        name
        for layer in graph.layers
        if shifts_alone or isinstance(layer, BatchNorm | GroupNorm)
        for name in parameters(layer)
        if not shifts_alone or (name.rpartition(".")[2] == "bias" and not isinstance(layer, Scale))
    }


def parameters(layer: Layer) -> Iterator[str]:
    """The names of a layer's parameters, if it has them."""
    match layer:
        case Convolution() | BatchNorm():
            yield from (_named(layer.module, "weight"), _named(layer.module, "bias"))
        case GroupNorm() if layer.module:
            yield from (_named(layer.module, "weight"), _named(layer.module, "bias"))
        case Scale():
            yield layer.parameter


def _named(module: str, parameter: str) -> str:
    return f"{module}.{parameter}".removeprefix(".")
