"""Fusion: the layer graph becomes the list of operators that are executed forward.

convolution → [batch norm or bias] → [residual addition] → [activation] is one operator. A ReLU or ReLU6
before a max pooling moves into the pooling (the maximum of clipped values is the clipped maximum, and where
it is clipped no pixel has a gradient), so that only the pooled tensor is kept. Channels that are only put in
another order again, such as the shuffle of a concatenation, are picked at once. A batch norm that follows no
convolution of its own (pre-activation networks) becomes a scale and shift with an activation. With batch
statistics the normalisation is an operator of its own, which takes the addition and the activation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import layers
from .activations import FUNCTIONS, activation
from .layers import LayerGraph
from .operators import OPERATORS

Geometry = tuple[int, int, int]


@dataclass(frozen=True)
class Slot:
    """A range of the folded scale and shift: of a bias, of a batch norm with frozen statistics, of a norm by
    other statistics, or of a scale behind a bias (kinds 0 to 3 of FoldAffine). ``bias`` and ``norm`` are
    names of modules, ``scale`` is that of a parameter, or None."""

    kind: int
    channels: int
    bias: str | None
    norm: str | None
    scale: str | None = None


@dataclass
class FusedLayer:
    """One forward operator.

    Attributes:
        operator: which one, of `operators.OPERATORS`.
        name: name of the layer whose output this operator computes.
        inputs: the fused layers it reads (without the residual).
        layer: the layer that began it (holds kernel, stride, …).
        source_geometry, geometry: (C, H, W) of the first input and of the output.
        slot: its scale and shift, or None. affine: first channel of the slot among all of the pass, or −1.
        residual: name of the fused layer that is added, or None.
        activation: attributes of the function that is applied to the result, none if there is none.
    """

    operator: str
    name: str
    inputs: list[str]
    layer: layers.Layer
    source_geometry: Geometry
    geometry: Geometry
    slot: Slot | None = None
    residual: str | None = None
    activation: Mapping[str, Any] = field(default_factory=dict)
    affine: int = -1


def fuse(graph: LayerGraph, batch: Collection[str] = (), apart: Collection[str] = ()) -> list[FusedLayer]:
    """Fuse ``graph``; the result is in order of execution and its last operator need not be the logits'.

    Args:
        graph: the captured network.
        batch: modules of the batch norms that use the statistics of the micro-batch; others have the running
            ones.
        apart: modules of those that are no part of a convolution.
    """
    return _Fusion(graph, batch, apart).result()


class _Fusion:
    def __init__(self, graph: LayerGraph, batch: Collection[str], apart: Collection[str]) -> None:
        self.graph = graph
        self.batch, self.apart = batch, apart
        self.readers = graph.consumers()
        self.readers[graph.output].append(graph[graph.output])  # the caller reads the logits
        self.geometry = {layer.name: layer.geometry for layer in graph.layers}
        self.owner: dict[str, FusedLayer] = {}  # name of a layer → the operator that computes its output
        self.deferred: dict[str, layers.Activation] = {}  # left to the max pooling that follows
        self.order: list[FusedLayer] = []

    def result(self) -> list[FusedLayer]:
        for layer in self.graph.layers:
            self._visit(layer)
        position = {layer.name: index for index, layer in enumerate(self.graph.layers)}
        # An operator runs where its last fused layer stood: by then all its operands are there.
        self.order.sort(key=lambda fused: position[fused.name])
        channels = 0
        for fused in self.order:
            fused.inputs = [self.owner[name].name for name in fused.inputs]
            fused.residual = self.owner[fused.residual].name if fused.residual else None
            if fused.slot is not None:
                fused.affine = channels
                channels += fused.slot.channels
        return self.order

    def _start(
        self,
        operator: str,
        layer: layers.Layer,
        slot: Slot | None = None,
        applied: layers.Activation | None = None,
    ) -> None:
        source = self.geometry[layer.inputs[0]] if layer.inputs else layer.geometry
        fused = FusedLayer(operator, layer.name, list(layer.inputs), layer, source, layer.geometry, slot)
        if applied is not None:
            fused.activation = activation(applied.kind, applied.attributes)
        self.order.append(fused)
        self.owner[layer.name] = fused

    def _extend(self, fused: FusedLayer, layer: layers.Layer) -> None:
        """``layer`` becomes the last layer of ``fused``; names of inner layers keep pointing to it."""
        fused.name = layer.name
        self.owner[layer.name] = fused

    def _open(self, name: str, part: str) -> FusedLayer | None:
        """The operator that computes ``name``, if nothing else reads it and it can take ``part``."""
        fused = self.owner[name]
        single = len(self.readers[name]) == 1 and fused.name == name
        takes = part in OPERATORS[fused.operator].takes
        return fused if single and takes and not fused.activation else None

    def _visit(self, layer: layers.Layer) -> None:
        match layer:
            case layers.Convolution():
                slot = Slot(0, layer.shape[0], layer.module, None) if layer.bias else None
                self._start(layer.operator, layer, slot)
            case layers.BatchNorm():
                self._batch_norm(layer)
            case layers.GroupNorm():
                self._start(layer.operator, layer, Slot(2, layer.shape[0], None, layer.module or None))
            case layers.Scale():
                self._affine(layer, Slot(3, layer.shape[0], None, None, layer.parameter))
            case layers.Add():
                self._add(layer)
            case layers.Activation():
                self._activation(layer)
            case layers.Flatten():
                self._flatten(layer)
            case layers.Channels():
                self._channels(layer)
            case _:
                applied = self.deferred.get(layer.inputs[0]) if layer.inputs else None
                self._start(layer.operator, layer, applied=applied)

    def _batch_norm(self, layer: layers.BatchNorm) -> None:
        if layer.module in self.batch:
            self._start(layer.operator, layer, Slot(2, layer.shape[0], None, layer.module))
        elif layer.module in self.apart:
            self._start("Affine", layer, Slot(1, layer.shape[0], None, layer.module))
        else:
            self._affine(layer, Slot(1, layer.shape[0], None, layer.module))

    def _affine(self, layer: layers.BatchNorm | layers.Scale, slot: Slot) -> None:
        """A scale and shift: ``slot``, behind the bias of the operator before it where there is one."""
        fused = self._open(layer.inputs[0], "norm")
        if fused is None or fused.residual or (fused.slot is not None and fused.slot.kind):
            self._start("Affine", layer, slot)
        else:
            fused.slot = replace(slot, bias=fused.slot.bias if fused.slot else None)
            self._extend(fused, layer)

    def _add(self, layer: layers.Add) -> None:
        position = [other.name for other in self.graph.layers].index
        # Of two branches that could take the addition, the one computed last does: the other is there by
        # then.
        for name in sorted(layer.inputs, key=position, reverse=True):
            fused = self._open(name, "addition")
            if fused is not None and fused.residual is None:
                fused.residual = layer.inputs[1] if name == layer.inputs[0] else layer.inputs[0]
                self._extend(fused, layer)
                return
        self._start(layer.operator, layer)

    def _activation(self, layer: layers.Activation) -> None:
        name, clips = layer.inputs[0], FUNCTIONS[layer.kind].clips
        following = self.readers[layer.name]
        fused = self._open(name, "activation")
        if fused is None and clips:
            fused = self._open(name, "clipping")
        if fused is None:
            self._start(layer.operator, layer, applied=layer)
            return
        pooled = len(following) == 1 and isinstance(following[0], layers.MaxPool)
        if clips and pooled and not isinstance(fused.layer, layers.MaxPool):
            self.deferred[layer.name] = layer
        else:
            fused.activation = activation(layer.kind, layer.attributes)
        self._extend(fused, layer)

    def _channels(self, layer: layers.Channels) -> None:
        """Channels of channels that nothing else reads are picked at once."""
        fused = self.owner[layer.inputs[0]]
        before = fused.layer
        alone = len(self.readers[fused.name]) == 1 and fused.name == layer.inputs[0]
        if not alone or len(layer.inputs) > 1 or not isinstance(before, layers.Concat | layers.Channels):
            self._start(layer.operator, layer)
            return
        source = layer.source
        if isinstance(before, layers.Channels):
            source = tuple(before.source[i] if i >= 0 else -1 for i in source)
        fused.layer = layers.Channels(layer.name, before.inputs, layer.shape, source)
        fused.geometry = layer.geometry
        self._extend(fused, layer)

    def _flatten(self, layer: layers.Flatten) -> None:
        # A tensor without halo is its own flattened form. Poolings can write (and, backward, read) any halo;
        # for other producers a copy decouples the halo that the vector forbids from the one that convolutions
        # need.
        name = layer.inputs[0]
        fused = self.owner[name]
        single = len(self.readers[name]) == 1
        if self.geometry[name] == layer.geometry and not single and layer.name != self.graph.output:
            self.owner[layer.name] = fused  # of one pixel: map and vector are alike
        elif not single or not (self.geometry[name] == layer.geometry or OPERATORS[fused.operator].any_halo):
            channels, height, width = self.geometry[name]
            copy = layers.AveragePool(
                f"{layer.name}.copy", (name,), (channels, height, width), (1, 1), (1, 1), (height, width)
            )
            source = self.geometry[name]
            fused = FusedLayer(copy.operator, layer.name, [name], copy, source, source)
            self.order.append(fused)
            self.owner[layer.name] = fused
        else:
            self._extend(fused, layer)
