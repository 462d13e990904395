"""Reverse mode over the closed operator set.

The tape walks the forward nodes backwards. Where a tensor was read by several operators its gradient is a
sum; the operator that contributes last takes the sum of the others as ``addend`` and applies the ReLU mask of
the tensor's producer, so that a join costs neither a pass nor a tensor. Where the last contributor can do
neither (a residual branch, a max pooling), a MaskedAdd does. No gradient tensor is ever overwritten: one
tensor may be the gradient of both branches of an addition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .nodes import Graph, HaloOf, Node
from .operators import OPERATORS
from .operators.base import named_halos
from .operators.elementwise import MaskedAdd


@dataclass(frozen=True)
class Mask:
    """A ReLU mask as a gradient operator takes it: the tensor ('' for none) and its attributes."""

    tensor: str
    attributes: dict[str, Any] = field(default_factory=dict)


NO_MASK = Mask("", {"mask_kind": 0, "mask_halo": 0})


@dataclass
class Chains:
    """Current tensors of the alias chains that accumulate parameter gradients in place; shared by all
    branches.
    """

    coo_grad: str
    affine_grad: str


class Tape:
    """Gradients of one branch.

    Args:
        graph: the graph that receives the backward nodes.
        forward: the forward nodes of the branch in order; optional outputs (bits, choices) are added on
            demand.
        geometry: stack tensor → (channels, height, width) as its producer wrote it.
        learned_slots: affine offsets that have parameters (a plain rectification has none).
        image: whether the gradient of the image is wanted (attack).
        chains: where parameter gradients go, or None if they are not wanted (attack).
    """

    no_mask = NO_MASK

    def __init__(
        self,
        graph: Graph,
        forward: list[Node],
        geometry: dict[str, tuple[int, int, int]],
        learned_slots: frozenset[int],
        image: bool,
        chains: Chains | None,
    ) -> None:
        self.graph = graph
        self.forward = forward
        self.geometry = geometry
        self.learned_slots = learned_slots
        self.chains = chains
        self.parameters = chains is not None
        self.image_gradient = ""
        self._producer: dict[str, Node] = {}
        self._needed: set[str] = set()
        self._kept: set[str] = set()
        self._remaining: dict[str, int] = {}
        self._pending: dict[str, list[str]] = {}
        self._final: dict[str, str] = {}
        for node in forward:
            self._trace(node, image)

    def _trace(self, node: Node, image: bool) -> None:
        """Note which tensors need a gradient, how many readers each has, and which are kept for weights."""
        output = node.outputs[0]
        self._producer[output] = node
        sources = [name for name in node.inputs if name in self.geometry]
        has_parameters = self.parameters and self.learns(node)
        is_image = image and not sources
        if is_image or has_parameters or any(name in self._needed for name in sources):
            self._needed.add(output)
        if has_parameters:
            rule = OPERATORS[node.operator]
            self._kept.add(rule.read(node, rule.keeps))
        for name in sources:
            self._remaining[name] = self._remaining.get(name, 0) + 1

    def learns(self, node: Node) -> bool:
        """Whether a forward node has parameters that learn."""
        return OPERATORS[node.operator].learns(node, self.learned_slots)

    def needs(self, tensor: str) -> bool:
        """Whether the gradient of ``tensor`` leads to anything that is wanted."""
        return tensor in self._needed

    def run(self, logits: str, seed: str) -> None:
        """Emit the backward nodes of the branch, given the gradient ``seed`` of ``logits``."""
        self._pending[logits] = [seed]
        self._remaining.setdefault(logits, 0)
        for node in reversed(self.forward):
            dy = self._take(node.outputs[0])
            if dy:
                OPERATORS[node.operator].differentiate(node, dy, self)

    # What gradient rules call

    def absorb(self, tensor: str) -> tuple[str, Mask, str]:
        """Announce a contribution to ``tensor`` by an operator that can add and mask.

        Returns:
            (addend or '', mask, name of the contribution). If others are still to come, neither addend nor
            mask.
        """
        name = self._announce(tensor)
        if self._remaining[tensor]:
            self._pending.setdefault(tensor, []).append(name)
            return "", NO_MASK, name
        addend = self._sum(tensor)
        if addend:
            self.graph.halos.equal(addend, name)
        self._final[tensor] = name
        return addend, self._mask(tensor), name

    def contribute(self, tensor: str) -> str:
        """Announce a contribution by an operator that can neither add nor mask; returns its name."""
        name = self._announce(tensor)
        self._pending.setdefault(tensor, []).append(name)
        return name

    def pass_on(self, tensor: str, gradient: str) -> None:
        """The existing tensor ``gradient`` is itself a contribution to ``tensor``."""
        if self.needs(tensor):
            self._remaining[tensor] -= 1
            self._pending.setdefault(tensor, []).append(gradient)

    def step_coo_grad(self) -> tuple[str, str]:
        """(current, next) tensor of the chain that accumulates the gradient of the connections."""
        assert self.chains is not None
        current = self.chains.coo_grad
        self.chains.coo_grad = self.graph.unique("coo.value_grad.accumulated")
        return current, self.chains.coo_grad

    def step_affine_grad(self) -> tuple[str, str]:
        """(current, next) tensor of the chain that accumulates the gradient of scales and shifts."""
        assert self.chains is not None
        current = self.chains.affine_grad
        self.chains.affine_grad = self.graph.unique("affine_grad.accumulated")
        return current, self.chains.affine_grad

    # Joins

    def _announce(self, tensor: str) -> str:
        self._remaining[tensor] -= 1
        name = self.graph.unique(f"d.{tensor}")
        if self.graph.halos.is_zero(tensor):
            self.graph.halos.zero(name)
        return name

    def _take(self, tensor: str) -> str:
        """The complete, masked gradient of ``tensor``, or '' if there is none."""
        if tensor in self._final:
            return self._final[tensor]
        if tensor not in self._pending or not self.needs(tensor):
            return ""
        assert self._remaining[tensor] == 0, f"gradient of {tensor} is taken before all readers contributed"
        pending = self._pending[tensor]
        mask = self._mask(tensor)
        if len(pending) == 1 and not mask.tensor:
            return pending[0]
        last = pending.pop()
        return self._join(tensor, self._sum(tensor) or last, last if pending else "", mask)

    def _sum(self, tensor: str) -> str:
        """One tensor for all contributions so far, or ''."""
        pending = self._pending.get(tensor, [])
        while len(pending) > 1:
            first, second = pending.pop(0), pending.pop(0)
            pending.insert(0, self._join(tensor, first, second, NO_MASK))
        return pending[0] if pending else ""

    def _join(self, tensor: str, first: str, second: str, mask: Mask) -> str:
        channels, height, width = self.geometry[tensor]
        name = self.graph.unique(f"d.{tensor}")
        if self.graph.halos.is_zero(tensor):
            self.graph.halos.zero(name)
        attributes = {
            "channels": channels,
            "height": height,
            "width": width,
            "lanes": self._producer[tensor].attributes["lanes"],
            **named_halos(a_halo=first, b_halo=second, out_halo=name),
            **mask.attributes,
        }
        MaskedAdd.emit(self.graph, {"a": first, "b": second, "mask": mask.tensor}, {"y": name}, attributes)
        return name

    def _mask(self, tensor: str) -> Mask:
        """The mask of the rectification that produced ``tensor``: the tensor itself if it is kept anyway."""
        producer = self._producer[tensor]
        rule = OPERATORS[producer.operator]
        if not (rule.has_output("bits") and producer.attributes["relu"]):
            return NO_MASK
        if tensor in self._kept:
            return Mask(tensor, {"mask_kind": 1, "mask_halo": HaloOf(tensor)})
        position = rule.output("bits")
        if not producer.outputs[position]:
            producer.outputs[position] = self.graph.unique(f"{tensor}.bits")
        return Mask(producer.outputs[position], {"mask_kind": 2, "mask_halo": 0})
