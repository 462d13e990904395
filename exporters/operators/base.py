"""What an operator is: its ports, and the answers to what the passes of the compiler ask of it.

Every operator of the domain ``edge_bcs`` is one class in this package, and everything that is true of it
stands there: the passes ask the class and keep no lists of names. The files say what belongs together;
`OPERATORS` in the package's root holds all of them. A struct of the same name and the same ports in
``runtime/native`` computes it.

A stack is an activation f32 [NB, P, B] of NB blocks of B images; P = h·R + h + C·S pixels with row stride R =
W + h and plane stride S = (H + h)·R for a halo of h zero pixels shared between neighbouring rows and planes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edge_bcs.core.errors import EdgeBcsError

from ..activations import FUNCTIONS, of_activation, unactivated
from ..nodes import Graph, HaloOf, Node, TensorType
from ..plain import Plain

if TYPE_CHECKING:
    from edge_bcs.targets.cost_model import Walk

    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer
    from ..layers import Layer

Types = dict[str, TensorType]
Attributes = Mapping[str, Any]
Connections = Callable[[Node], int]
"""Number of active connections of the layer that a convolution-like node belongs to."""
Dims = Callable[[Node, Types], tuple[int, ...]]

ACTIVATIONS = "activations in passing"
KEPT = "activations kept for backward"
GRADIENTS_IN_FLIGHT = "gradients in flight"
SCALE_AND_SHIFT = "scale and shift"
LISTS = "lists"
WORKSPACE = "workspace"
"""Categories of a memory report; what the backward pass reads of ``ACTIVATIONS`` becomes ``KEPT``."""

Repetition = Literal["never", "elements", "pass", "product"]


@dataclass(frozen=True)
class Port:
    """An input or output of an operator, as ``runtime/native`` declares it.

    Attributes:
        name: of the port; the tensor behind it has a name of its own.
        dtype: element type, "any" where the operator takes several.
        optional: whether it may be absent. variadic: whether it is any number of inputs; the last port alone.
        dims: of an output, its dimensions.
        shares: of an output, the input whose memory it continues; its type is then that input's.
        for_backward: of an output, whether it is there only where a gradient operator reads it.
    """

    name: str
    dtype: str = "f32"
    optional: bool = False
    variadic: bool = False
    dims: Dims | None = None
    shares: str = ""
    for_backward: bool = False


# Dimensions


MOST_IN_A_BLOCK = 2**30 - 1
"""Numbers of a batch block, within which the kernels' distances are 32 bits."""


def stack_type(blocks: int, channels: int, height: int, width: int, halo: int, lanes: int) -> TensorType:
    """Type of the stack of a (channels, height, width) map with ``halo`` zero pixels.

    Raises:
        EdgeBcsError: a block of it is too large.
    """
    row = width + halo
    pixels = halo * row + halo + channels * (height + halo) * row
    if pixels * lanes > MOST_IN_A_BLOCK:
        fewer = MOST_IN_A_BLOCK // pixels
        raise EdgeBcsError(
            f"a map of {channels}×{height}×{width} for {lanes} images side by side has {pixels * lanes} "
            f"numbers, more than the {MOST_IN_A_BLOCK} that the kernels reach; "
            + (f"take a micro-batch of at most {fewer}" if fewer else "take smaller images")
        )
    return TensorType("f32", (blocks, pixels, lanes))


def bits_type(blocks: int, channels: int, height: int, width: int, lanes: int) -> TensorType:
    """Type of the bits of an activation of a map: one an element, rows padded to bytes."""
    return TensorType("u8", (blocks, channels * height, (width * lanes + 7) // 8))


def blocks_of(node: Node, types: Types) -> int:
    """NB of the stack, or of the images, that the node reads first."""
    return types[node.inputs[0]].dims[0]


def map_of(attributes: Attributes, side: str = "") -> tuple[int, int, int]:
    """(channels, height, width) of a node's attributes, with the prefix ``side`` where there is one."""
    channels = attributes[f"{side}channels"] if f"{side}channels" in attributes else attributes["channels"]
    return channels, attributes[f"{side}height"], attributes[f"{side}width"]


def stack(side: str, halo: str) -> Dims:
    """A stack of the map ``side`` with the halo that the attribute ``halo`` names, 0 if it is not there."""

    def dims(node: Node, types: Types) -> tuple[int, ...]:
        a = node.attributes
        return stack_type(blocks_of(node, types), *map_of(a, side), a.get(halo, 0), a["lanes"]).dims

    return dims


def bits(side: str) -> Dims:
    """The bits of an activation of the map ``side``."""

    def dims(node: Node, types: Types) -> tuple[int, ...]:
        a = node.attributes
        return bits_type(blocks_of(node, types), *map_of(a, side), a["lanes"]).dims

    return dims


def same_as_input(position: int) -> Dims:
    """The dimensions of an input."""
    return lambda node, types: types[node.inputs[position]].dims


def fixed(*extents: int) -> Dims:
    """Dimensions that depend on nothing."""
    return lambda node, types: extents


# Other runtimes


@dataclass(frozen=True)
class Parameter:
    """A parameter of the network, by its qualified name, in the shape in which a node takes it."""

    name: str
    shape: tuple[int, ...]


def along_both_axes(down: Any, across: Any) -> list[Plain]:
    """Nodes that multiply the columns of each channel with a matrix [H', H] and its rows with one [W', W]."""
    turned = Plain("Transpose", attributes={"perm": [0, 1, 3, 2]})
    return [
        Plain("MatMul", {"across": across.T}), turned, Plain("MatMul", {"down": down.T}), turned,
    ]  # fmt: skip


@dataclass(frozen=True)
class OrtNode:
    """A node of a gradient as ONNX Runtime's gradient builder takes it.

    GO(i) is the gradient of output i, I(i) input i, O(i) output i, GI(i) the gradient of input i; a leading
    "onnx:" marks an operator of ONNX itself. The builder keeps the output at position j only if input j
    needs a gradient, whatever the output's name is: so a definition has no intermediate tensors
    (`Operator.complete` adds them), and an accumulator's place is held by the tensor of its shape.
    """

    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    axes: Sequence[int] = ()


@dataclass(frozen=True)
class Completion:
    """What a gradient node of ONNX Runtime's builder lacks, because a definition knows no node.

    Attributes:
        attributes: of the node.
        masking: attributes of the MaskedAdd that its first input goes through, or None.
        inputs: how many of its inputs remain, or None for all.
        spare: whether its first output must be there even if nobody reads it.
    """

    attributes: dict[str, Any]
    masking: dict[str, Any] | None = None
    inputs: int | None = None
    spare: bool = False


@dataclass(frozen=True)
class Learned:
    """What of a pass of the network is trained, as its nodes know it.

    Attributes:
        slots: first channels of the slots of scale and shift in which a parameter is. scales: of those whose
            scale is.
        kernels: first numbers of the kernels among the connections. dense: of the parameters in
            ``dense.value``.
    """

    slots: frozenset[int]
    scales: frozenset[int]
    kernels: frozenset[int]
    dense: frozenset[int]


# The operator


class Operator:
    """Base of all operators; a subclass declares its ports and overrides what it has.

    Attributes:
        inputs, outputs: its ports, in the order of the file.
        category: what its outputs are in a memory report.
        backward: whether it belongs to the backward pass; what it reads of the forward pass is kept for it.
        early: whether it reads parameters alone, and so may run long before its place in the file.
        parameters: whether it has parameters that learn. keeps: the input that their gradient reads.
        repetition: whether a forward operator may run a second time instead of its output being kept, and
            what that costs: a look at each element, a pass over windows or for statistics, or a product.
        takes: what fusion may put into it: "norm", "addition", "activation"; "clipping" is an activation that
            clips.
        any_halo: whether it can write any halo, and read the gradient of its output with any.
        commutative: whether its two inputs may change places.
        half: whether it can compute with stacks in half precision.
        ort_gradient: its gradient for ONNX Runtime's own builder.
    """

    inputs: ClassVar[tuple[Port, ...]] = ()
    outputs: ClassVar[tuple[Port, ...]] = ()
    category: ClassVar[str] = ACTIVATIONS
    backward: ClassVar[bool] = False
    early: ClassVar[bool] = False
    parameters: ClassVar[bool] = False
    keeps: ClassVar[str] = ""
    repetition: ClassVar[Repetition] = "never"
    takes: ClassVar[frozenset[str]] = frozenset()
    any_halo: ClassVar[bool] = False
    commutative: ClassVar[bool] = False
    half: ClassVar[bool] = False
    ort_gradient: ClassVar[tuple[OrtNode, ...]] = ()

    # Ports

    @classmethod
    def input(cls, name: str) -> int:
        """Position of the input port ``name``."""
        return [port.name for port in cls.inputs].index(name)

    @classmethod
    def output(cls, name: str) -> int:
        """Position of the output port ``name``."""
        return [port.name for port in cls.outputs].index(name)

    @classmethod
    def has_input(cls, name: str) -> bool:
        """Whether there is an input port ``name``."""
        return any(port.name == name for port in cls.inputs)

    @classmethod
    def has_output(cls, name: str) -> bool:
        """Whether there is an output port ``name``."""
        return any(port.name == name for port in cls.outputs)

    @classmethod
    def read(cls, node: Node, name: str) -> str:
        """The tensor at the input port ``name`` of a node, '' if it is absent."""
        position = cls.input(name)
        return node.inputs[position] if position < len(node.inputs) else ""

    @property
    def aliases(self) -> dict[int, int]:
        """Output position → input position whose memory it shares."""
        return {i: self.input(port.shares) for i, port in enumerate(self.outputs) if port.shares}

    @classmethod
    def emit(
        cls,
        graph: Graph,
        inputs: Mapping[str, str | list[str]],
        outputs: Mapping[str, str],
        attributes: Attributes | None = None,
    ) -> Node:
        """Append a node to ``graph``: port → tensor of what is there, of a variadic one all of its tensors.

        An attribute that is an empty list is left out: ONNX knows no type of its elements.

        Raises:
            AssertionError: a tensor for a port that does not exist, or none for one that must be there.
        """
        tensors: list[list[str]] = []
        for ports, given in ((cls.inputs, inputs), (cls.outputs, outputs)):
            found = [given.get(port.name, "") for port in ports]
            tensors.append(
                [name for names in found for name in ([names] if isinstance(names, str) else names)]
            )
            unknown = set(given) - {port.name for port in ports}
            missing = {port.name for port in ports if not (port.optional or given.get(port.name))}
            assert not unknown and not missing, f"{cls.__name__}: unknown {unknown}, missing {missing}"
        present = {name: value for name, value in (attributes or {}).items() if value != []}
        return graph.emit(cls.__name__, *tensors, **present)

    # Shapes and costs

    def output_types(self, node: Node, types: Types) -> list[TensorType]:
        """Types of all outputs, the absent optional ones included."""
        found = []
        for port in self.outputs:
            if port.shares:
                source = self.read(node, port.shares)
                found.append(types[source] if source else TensorType(port.dtype, (0,)))
            else:
                assert port.dims is not None
                found.append(TensorType(port.dtype, port.dims(node, types)))
        return found

    def work_bytes(self, node: Node, types: Types) -> int:
        """Bytes that the kernel takes from the allocator while it runs."""
        return 0

    def without_work(self, node: Node) -> Node | None:
        """A node that computes the same to rounding without work memory, or None."""
        return None

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        """Floating-point operations (a multiplication and an addition count as two)."""
        ports = zip(self.outputs, self.output_types(node, types), strict=True)
        # What an activation is applied to is made anyway.
        numbers = sum(t.bytes // 4 for port, t in ports if t.dtype == "f32" and port.name != "pre")
        return numbers + self.function_flops(node, types)

    def function_flops(self, node: Node, types: Types) -> int:
        """Floating-point operations of the activation that the node applies, or whose derivative it takes."""
        a = node.attributes
        name = a.get("activation") or (a.get("mask_activation") if a.get("mask_kind") else None)
        return FUNCTIONS[name].flops * types[node.outputs[0]].bytes // 4 if name and node.outputs[0] else 0

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """Bytes read and written, each tensor once: the least traffic with memory."""
        return sum(types[name].bytes for names in (node.inputs, node.outputs) for name in {*names} - {""})

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        """The products of a layer's matrix with the micro-batch, on which the time depends."""
        return ()

    # The passes

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        """Emit the node that computes ``fused`` from the tensors ``sources`` into ``y``."""
        raise AssertionError(f"{type(self).__name__} computes no layer")

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        """Emit the nodes that carry ``dy``, the gradient of the first output, to the inputs."""
        raise AssertionError(f"{type(self).__name__} is not differentiable")

    def learns(self, node: Node, learned: Learned) -> bool:
        """Whether this node has parameters that learn."""
        return self.parameters

    def read_again(self, node: Node, learned: Learned) -> bool:
        """Whether the gradient of what learns reads the input ``keeps``."""
        return self.learns(node, learned)

    def repeated(
        self, node: Node, inputs: list[str], statistics: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """(inputs, attributes) of a second run of a forward node, which changes nothing but its output.

        Args:
            node: the node. inputs: what it reads then.
            statistics: the newest tensors of the running averages.
        """
        return inputs, dict(node.attributes)

    def makers(self, node: Node) -> dict[str, Node]:
        """Stack that the forward node makes → the node that can make it once more.

        Where what an activation is applied to is kept, the activation alone makes the output again.
        """
        y, a = node.outputs[0], node.attributes
        if self.repetition == "never":
            return {}
        pre = node.outputs[self.output("pre")] if self.has_output("pre") else ""
        if not pre:
            return {y: node}
        channels, height, width = map_of(a, "out_" if "out_channels" in a else "")
        alone = {"channels": channels, "height": height, "width": width, "lanes": a["lanes"]}
        alone |= {"in_halo": a["pre_halo"], "out_halo": a["out_halo"], **of_activation(a)}
        again = Node("Activate", [pre], [y, ""], alone, f"{node.name}.activation")
        outputs = [pre] + [""] * (len(node.outputs) - 1)
        before = replace(node, outputs=outputs, attributes={**unactivated(a), "out_halo": a["pre_halo"]})
        return {y: again, pre: before}

    def pre_halo(self, node: Node) -> int | HaloOf:
        """The halo of what the node's activation is applied to, where that is kept."""
        return 0

    def running_statistics(self, node: Node) -> list[str]:
        """The tensors of running averages that the node makes."""
        return []

    # Other runtimes

    def plain(self, layer: Layer) -> Plain | list[Plain]:
        """A layer that this operator computes, in ONNX's own operators: a node, or several that each take
        what the one before makes."""
        raise AssertionError(f"{type(self).__name__} has no form in ONNX's own operators")

    def complete(self, forward: Attributes, instance: str) -> Completion:
        """What a node of this type lacks in a gradient of ONNX Runtime's builder.

        Args:
            forward: attributes of the forward node. instance: name of the gradient node.
        """
        return Completion(dict(forward))


class Gradient(Operator):
    """Base of the operators of the backward pass."""

    category = GRADIENTS_IN_FLIGHT
    backward = True


SUM_AND_MASK = (Port("addend", optional=True), Port("mask", "any", optional=True))
"""Ports of a gradient operator that adds what others contributed and applies the mask of the activation
before it: the ``inputs`` of an `autodiff.Contribution`."""


class Resizing(Operator):
    """Base of the operators whose output has the channels of their input in another height and width.

    Attributes:
        gradient: the operator that carries the gradient back.
    """

    inputs = (Port("x"),)
    outputs: ClassVar[tuple[Port, ...]] = (Port("y", dims=stack("out_", "out_halo")),)
    any_halo = True
    gradient: ClassVar[type[Operator]]

    def own(self, layer: Layer) -> dict[str, Any]:
        """The attributes beside sizes, halos and activation."""
        raise NotImplementedError

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        """See `Operator`."""
        branch.as_vector(fused, y)
        channels, in_height, in_width = fused.source_geometry
        _, out_height, out_width = fused.geometry
        attributes = {
            "channels": channels,
            "in_height": in_height,
            "in_width": in_width,
            "out_height": out_height,
            "out_width": out_width,
            "lanes": branch.lanes,
            **self.own(fused.layer),
            **fused.activation,
            **named_halos(in_halo=sources[0], out_halo=y),
        }
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        """See `Operator`."""
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.absorb(x)
            halos = named_halos(in_halo=dx.tensor, out_halo=dy)
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            self.gradient.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)


class ResizingGrad(Gradient):
    """Base of their gradients."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        """The forward node's attributes, and no mask."""
        return Completion({**forward, "mask_kind": 0, "mask_halo": 0})


def named_halos(**tensors: str) -> dict[str, Any]:
    """Attributes that stand for the halos of tensors: ``in_halo="x"`` is the halo of x, '' is no halo."""
    return {name: HaloOf(tensor) if tensor else 0 for name, tensor in tensors.items()}
