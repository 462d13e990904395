"""Reverse mode over the closed operator set.

The tape walks the forward nodes backwards. Where a tensor was read by several operators its gradient is a
sum; the operator that contributes last takes the sum of the others as ``addend`` and applies the mask of
the tensor's producer, so that a join costs neither a pass nor a tensor. Where the last contributor can do
neither (a residual branch, a max pooling), a MaskedAdd does. No gradient tensor is ever overwritten: one
tensor may be the gradient of both branches of an addition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .activations import applied, masked, told_by_output
from .forward import Branch, Lowering
from .nodes import HaloOf, Node
from .operators import OPERATORS
from .operators.base import named_halos
from .operators.elementwise import MaskedAdd, ShiftGrad
from .operators.folding import FoldAffineGrad, ZeroAffine
from .operators.order import GradientReady, ResetGradient


@dataclass(frozen=True)
class Mask:
    """What an activation's derivative is made from, as a gradient operator takes it: the tensor ('' for none)
    and its attributes."""

    tensor: str
    attributes: dict[str, Any] = field(default_factory=dict)


NO_MASK = Mask("", {"mask_kind": 0, "mask_halo": 0})


@dataclass(frozen=True)
class Contribution:
    """What a gradient operator makes for a tensor that its forward operator read.

    Attributes:
        tensor: its name, '' if it is not wanted.
        addend, mask: the sum that it adds and the mask that it applies, at the ports of these names.
    """

    tensor: str
    addend: str = ""
    mask: Mask = NO_MASK

    @property
    def inputs(self) -> dict[str, str]:
        """Tensors of the ports "addend" and "mask"."""
        return {"addend": self.addend, "mask": self.mask.tensor}


class Gradients:
    """The gradients of all parameters, which the branches of a graph accumulate in place, one after the
    other."""

    def __init__(self, lowering: Lowering) -> None:
        """Emit the operators that begin the accumulation."""
        self.lowering, self.graph = lowering, lowering.graph
        self.moving = lowering.network.moving
        self.coo, self.dense = (
            self._started(f"{name}_grad") if name in self.moving else ""
            for name in ("coo.value", "dense.value")
        )
        self.affine = ""

    def _started(self, name: str) -> str:
        inputs = {"buffer": f"{name}.accumulation.buffer", "lazy_reset_grad": "lazy_reset_grad"}
        ResetGradient.emit(self.graph, inputs, {"buffer_out": f"{name}.start"})
        return f"{name}.start"

    def add(self, branch: Branch, seed: str) -> None:
        """Emit the backward nodes of a branch, given the gradient ``seed`` of its logits."""
        passed, everything = self.lowering.passed, self.lowering.network.part.everything
        if self.lowering.affine and not self.affine and (everything or passed.learned.slots):
            self.affine = "affine_grad"
            ZeroAffine.emit(self.graph, {"affine": self.lowering.affine}, {"affine_grad": self.affine})
        Tape(branch, seed, self)

    def step_coo(self) -> tuple[str, str]:
        """(current, next) tensor of the chain that accumulates the gradient of the connections."""
        current, self.coo = self.coo, self.graph.unique("coo.value_grad.accumulated")
        return current, self.coo

    def step_dense(self) -> tuple[str, str]:
        """(current, next) tensor of the chain that accumulates the gradient of the dense parameters."""
        current, self.dense = self.dense, self.graph.unique("dense.value_grad.accumulated")
        return current, self.dense

    def step_affine(self) -> tuple[str, str]:
        """(current, next) tensor of the chain that accumulates the gradient of scales and shifts."""
        current, self.affine = self.affine, self.graph.unique("affine_grad.accumulated")
        return current, self.affine

    @property
    def latest(self) -> str:
        """A tensor that is there when all backward nodes so far have run."""
        return self.coo or next(name for name in self.graph.nodes[-1].outputs if name)

    def place_among_connections(self, offset: int) -> dict[str, int]:
        """Attributes that say where the gradient of the kernel at ``offset`` lies, if not all is trained."""
        network = self.lowering.network
        if network.part.everything:
            return {}
        return {"skip": next(network.skips[k.name] for k in network.trained.kernels if k.offset == offset)}

    def place_among_dense(self, offset: int) -> dict[str, int]:
        """The same for the parameter at ``offset`` in ``dense.value``."""
        network = self.lowering.network
        if network.part.everything:
            return {}
        trained = network.trained
        return {"weight_gradient": next(trained.places[p.name] for p in trained.dense if p.offset == offset)}

    def finish(self) -> None:
        """Emit the chain rule from scales and shifts to the dense parameters, and say that all is there."""
        if self.affine:
            mean, variance = self.lowering.statistics
            dense, out = self.step_dense()
            inputs = {"affine_grad": self.affine, "dense": "dense.value", "dense_grad": dense}
            inputs |= {"mean": mean, "variance": variance}
            attributes = {**self.lowering.fold, "gradients": self.lowering.passed.gradients}
            FoldAffineGrad.emit(self.graph, inputs, {"dense_grad_out": out}, attributes)
        for name, gradient in (("coo.value", self.coo), ("dense.value", self.dense)):
            if name in self.moving:
                GradientReady.emit(
                    self.graph, {"buffer": gradient}, {"ready": f"{name}_grad.accumulation.out"}
                )


class Tape:
    """The backward nodes of one branch.

    Attributes:
        branch: the branch; optional outputs of its nodes (bits, choices) are added on demand.
        graph: it receives the nodes.
        gradients: where parameter gradients go, or None if that of the image is wanted instead (attack).
        image_gradient: the latter.
    """

    no_contribution = Contribution("")

    def __init__(self, branch: Branch, seed: str, gradients: Gradients | None = None) -> None:
        """Emit the nodes, given the gradient ``seed`` of the logits."""
        self.branch, self.graph, self.gradients = branch, branch.graph, gradients
        self.image_gradient = ""
        self._producer: dict[str, Node] = {}
        self._needed: set[str] = set()
        self._kept: set[str] = set()
        self._remaining: dict[str, int] = {}
        self._pending: dict[str, list[str]] = {branch.logits: [seed]}
        self._final: dict[str, str] = {}
        self.graph.halos.zero(seed)
        for node in branch.nodes:
            self._trace(node)
        self._remaining.setdefault(branch.logits, 0)
        for node in reversed(branch.nodes):
            dy = self._take(node.outputs[0])
            if dy:
                OPERATORS[node.operator].differentiate(node, dy, self)

    def _trace(self, node: Node) -> None:
        """Note which tensors need a gradient, how many readers each has, and which are kept for weights."""
        output = node.outputs[0]
        self._producer[output] = node
        sources = [name for name in node.inputs if name in self.branch.geometry]
        learns = self.learns(node)
        is_image = self.gradients is None and not sources
        if is_image or learns or any(name in self._needed for name in sources):
            self._needed.add(output)
        if learns and self.reads_again(node):
            rule = OPERATORS[node.operator]
            self._kept.add(rule.read(node, rule.keeps))
        for name in sources:
            self._remaining[name] = self._remaining.get(name, 0) + 1

    # What gradient rules call

    def learns(self, node: Node) -> bool:
        """Whether gradients of the parameters of a forward node are wanted."""
        learned = self.branch.lowering.passed.learned
        return self.gradients is not None and OPERATORS[node.operator].learns(node, learned)

    def reads_again(self, node: Node) -> bool:
        """Whether these gradients need the input of a forward node."""
        learned = self.branch.lowering.passed.learned
        return self.gradients is not None and OPERATORS[node.operator].read_again(node, learned)

    def slot_learns(self, slot: int) -> bool:
        """Whether a scale or a shift of the slot at channel ``slot`` is trained."""
        lowering = self.branch.lowering
        return lowering.network.part.everything or slot in lowering.passed.learned.slots

    def add_shift(self, node: Node, dy: str) -> None:
        """Emit what adds the gradient of a forward node's shifts, given that of its output."""
        assert self.gradients is not None
        affine_grad, out = self.gradients.step_affine()
        channels, height, width = self.branch.geometry[node.outputs[0]]
        attributes = {"channels": channels, "height": height, "width": width, "lanes": self.branch.lanes}
        attributes |= {"affine": node.attributes["affine"], **named_halos(dy_halo=dy)}
        inputs = {"dy": dy, "affine_grad": affine_grad}
        ShiftGrad.emit(self.graph, inputs, {"affine_grad_out": out}, attributes)

    def needs(self, tensor: str) -> bool:
        """Whether the gradient of ``tensor`` leads to anything that is wanted."""
        return tensor in self._needed

    def saved(self, node: Node) -> dict[str, str]:
        """Port → tensor of what a forward node writes for its gradient alone; it is written from now on."""
        rule = OPERATORS[node.operator]
        return {port.name: self._demanded(node, port.name) for port in rule.outputs if port.for_backward}

    def absorb(self, tensor: str) -> Contribution:
        """Announce a contribution to ``tensor`` by an operator that can add and mask: it adds what is there
        already and, as the last one, masks."""
        name = self._announce(tensor)
        addend = self._sum(tensor)
        if addend:
            self.graph.halos.equal(addend, name)
        if self._remaining[tensor]:
            self._pending[tensor] = [name]
            return Contribution(name, addend)
        self._final[tensor] = name
        return Contribution(name, addend, self._mask(tensor))

    def unread(self, tensor: str) -> Contribution:
        """What an operator must write for ``tensor`` although nobody needs it."""
        return Contribution(self.graph.unique(f"d.{tensor}"))

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

    # Joins

    def _announce(self, tensor: str) -> str:
        self._remaining[tensor] -= 1
        return self._named(tensor)

    def _named(self, tensor: str) -> str:
        """A new name for a gradient of ``tensor``."""
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
        channels, height, width = self.branch.geometry[tensor]
        name = self._named(tensor)
        attributes = {
            "channels": channels,
            "height": height,
            "width": width,
            "lanes": self.branch.lanes,
            **named_halos(a_halo=first, b_halo=second, out_halo=name),
            **mask.attributes,
        }
        MaskedAdd.emit(self.graph, {"a": first, "b": second, "mask": mask.tensor}, {"y": name}, attributes)
        return name

    def _mask(self, tensor: str) -> Mask:
        """The mask of the activation that made ``tensor``: what it was applied to, where only that tells the
        derivative; the tensor itself, if it is kept anyway or nothing less tells it; or bits."""
        producer = self._producer[tensor]
        rule, function = OPERATORS[producer.operator], applied(producer.attributes)
        if function is None or not rule.has_output("bits"):
            return NO_MASK
        attributes = masked(producer.attributes)
        if function.kept == "pre":
            pre = self._pre(producer)
            return Mask(pre, {"mask_kind": 1, **named_halos(mask_halo=pre), **attributes})
        if function.kept == "output" or (tensor in self._kept and told_by_output(producer.attributes)):
            return Mask(tensor, {"mask_kind": 1, "mask_halo": HaloOf(tensor), **attributes})
        bits = self._demanded(producer, "bits")
        return Mask(bits, {"mask_kind": 2, "mask_halo": 0, **attributes})

    def _pre(self, node: Node) -> str:
        """What the activation of a forward node is applied to."""
        rule = OPERATORS[node.operator]
        if not rule.has_output("pre"):
            return node.inputs[0]
        pre = self._demanded(node, "pre")
        halo = rule.pre_halo(node)
        node.attributes["pre_halo"] = HaloOf(pre)
        if isinstance(halo, HaloOf):
            self.graph.halos.equal(pre, halo.tensor)
        return pre

    def _demanded(self, node: Node, port: str) -> str:
        """The tensor at an optional output of a forward node, which is written from now on."""
        position = OPERATORS[node.operator].output(port)
        if not node.outputs[position]:
            node.outputs[position] = self.graph.unique(f"{node.outputs[0]}.{port}")
        return node.outputs[position]
