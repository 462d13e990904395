# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""The closed set of operators of the domain ``edge_bcs``: for each, in one place, the shapes of its outputs,
the outputs that share an input's memory, its work memory, its arithmetic, and its gradient rule.

A stack is an activation f32 [NB, P, B] of NB blocks of B images; P = h·R + h + C·S pixels with row stride R =
W + h and plane stride S = (H + h)·R for a halo of h zero pixels shared between neighbouring rows and planes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .cost_model import WINOGRAD, Walk
from .nodes import HaloOf, Node, TensorType

if TYPE_CHECKING:
    from .autodiff import Tape

Types = dict[str, TensorType]
Connections = Callable[[Node], int]
"""Number of active connections of the layer that a convolution-like node belongs to."""


def stack_type(blocks: int, channels: int, height: int, width: int, halo: int, lanes: int) -> TensorType:
    """Type of the stack of a (channels, height, width) map with ``halo`` zero pixels."""
    row = width + halo
    pixels = halo * row + halo + channels * (height + halo) * row
    return TensorType("f32", (blocks, pixels, lanes))


def bits_type(blocks: int, channels: int, height: int, width: int, lanes: int) -> TensorType:
    """Type of the packed ReLU mask of a (channels, height, width) map: one bit an element, rows padded to
    bytes.
    """
    return TensorType("u8", (blocks, channels * height, (width * lanes + 7) // 8))


def gradient_halo(attributes: dict[str, Any]) -> int:
    """Halo that the transposed convolution needs of the output's gradient, the largest over both axes and
    sides.
    """
    stride, padding = attributes["stride"], attributes["padding"]
    halo = 0
    for kernel, size, extent in zip(
        attributes["kernel"],
        (attributes["in_height"], attributes["in_width"]),
        (attributes["out_height"], attributes["out_width"]),
        strict=True,
    ):
        low = -((padding + 1 - kernel) // stride)  # ceil((kernel - 1 - padding) / stride)
        high = (size - 1 + padding) // stride - (extent - 1)
        halo = max(halo, low, high)
    return halo


class Operator:
    """Base of all operators; subclasses override what they have.

    Attributes:
        aliases: output position → input position whose memory it shares.
    """

    aliases: dict[int, int] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        """Operator type in the graph."""
        return type(self).__name__

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        """Types of all outputs, the absent optional ones included."""
        raise NotImplementedError

    def work_bytes(self, node: Node, types: Types) -> int:
        """Bytes that the kernel takes from the allocator while it runs."""
        return 0

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        """Floating-point operations (a multiplication and an addition count as two)."""
        return sum(t.bytes // 4 for t in self.outputs(node, types) if t.dtype == "f32")

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """Bytes read and written, each tensor once: the least traffic with memory."""
        return sum(types[name].bytes for names in (node.inputs, node.outputs) for name in {*names} - {""})

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        """The products of a layer's matrix with the micro-batch, on which the time depends."""
        return ()

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        """Emit the nodes that carry ``dy``, the gradient of the first output, to the inputs."""
        raise AssertionError(f"{self.name} is not differentiable")


def _blocks(node: Node, types: Types, position: int = 0) -> int:
    return types[node.inputs[position]].dims[0]


def _stack(node: Node, types: Types, side: str, halo: str, position: int = 0) -> TensorType:
    """Stack with the attributes ``{side}_channels|height|width`` (or without prefix) and a halo attribute."""
    a = node.attributes
    prefix = f"{side}_" if side else ""
    channels: int = a[f"{prefix}channels"] if f"{prefix}channels" in a else a["channels"]
    height, width = a[f"{prefix}height"], a[f"{prefix}width"]
    return stack_type(_blocks(node, types, position), channels, height, width, a[halo], a["lanes"])


# Input, output, scale and shift


class PackInput(Operator):
    """Images f32 [n, C, H, W] → stack."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        n, channels, height, width = types[node.inputs[0]].dims
        lanes = node.attributes["lanes"]
        return [stack_type(n // lanes, channels, height, width, node.attributes["halo"], lanes)]

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        """The image's gradient stays a stack, which PgdStep reads."""
        tape.image_gradient = dy


class UnpackOutput(Operator):
    """Logits stack [NB, K, B] → f32 [n, K]."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        blocks, classes, lanes = types[node.inputs[0]].dims
        return [TensorType("f32", (blocks * lanes, classes))]


class FoldAffine(Operator):
    """Dense parameters and statistics → scale and shift of every slot."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [TensorType("f32", (2 * sum(node.attributes["entries"][1::6]),))]


class FoldAffineGrad(Operator):
    """Gradient of scale and shift → gradient of the dense parameters, accumulated."""

    aliases = {0: 4}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[4]]]


class ZeroAffine(Operator):
    """Zeros of the shape of its input: where the scale and shift gradient is accumulated."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[0]]]


# Convolution


def may_use_winograd(attributes: Mapping[str, Any]) -> bool:
    """Whether a dense layer's kernel lets it use Winograd's products, if its images do."""
    return bool(attributes["kernel"][1] == 3 and attributes["stride"] == 1)


def walk_kernel(attributes: Mapping[str, Any], suffix: str) -> str:
    """The kernel of one of a layer's walks, of `cost_model.KERNELS` or `cost_model.WINOGRAD`."""
    a, kernel = attributes, f"{attributes['algorithm']}{suffix}"
    enough = a["out_width"] % 4 == 0 and a["out_width"] >= 8 and min(a["in_channels"], a["out_channels"]) >= 8
    return WINOGRAD if kernel == "dense" and enough and may_use_winograd(a) else kernel


class _Convolutional(Operator):
    products = 1  # sparse-dense products of the layer's size that the operator performs

    def work_bytes(self, node: Node, types: Types) -> int:
        """Packed weights; four numbers for three, where the kernels may take Winograd's form."""
        a = node.attributes
        if a["algorithm"] != "dense":
            return 0
        winograd = may_use_winograd(a) and a["lanes"] % 16 == 0
        return 4 * (self.weights(node) // 3 * 4 if winograd else self.weights(node))

    @staticmethod
    def weights(node: Node) -> int:
        """Positions of the layer, active or dormant."""
        a = node.attributes
        return int(a["out_channels"] * a["in_channels"] * a["kernel"][0] * a["kernel"][1])

    def kernels(self, node: Node) -> tuple[str, ...]:
        """Suffixes of the kernels that run: "" forwards or to the input, "_gradient" to the values."""
        return ("",)

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        """A gradient with respect to the input is a walk for each phase of the stride; each entry is in one
        of them, and all together they cover as many pixels as the output has."""
        a = node.attributes
        entries = self.weights(node) if a["algorithm"] == "dense" else connections(node)
        floats = a["out_width"] * a["lanes"]
        run = floats if a["stride"] == 1 else a["lanes"]
        rows = _blocks(node, types) * a["out_height"]
        return tuple(
            Walk(walk_kernel(a, suffix), entries, rows, floats, run, a["lanes"])
            for suffix in self.kernels(node)
        )

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        walks = self.walks(node, types, connections)
        return sum(2 * walk.entries * walk.rows * walk.floats for walk in walks)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """Stacks and masks whole, but of the buffers of all layers only this layer's part: for each product a
        value and its place in the lists, a gradient's sum read and written, unpacked weights likewise."""
        stacks = {name for name in (*node.inputs, *node.outputs) if name and len(types[name].dims) > 1}
        entries = 8 * connections(node) * (2 * self.products - 1)
        return sum(types[name].bytes for name in stacks) + entries + 2 * self.work_bytes(node, types)


class Conv(_Convolutional):
    """act(scale·conv(x) + shift + residual); inputs x, value, affine?, residual?, lists; outputs y, bits?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        a = node.attributes
        bits = bits_type(_blocks(node, types), a["out_channels"], a["out_height"], a["out_width"], a["lanes"])
        return [_stack(node, types, "out", "out_halo"), bits]

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, value, affine, residual, lists = node.inputs
        if residual:
            tape.pass_on(residual, dy)
        attributes = {**node.attributes, "relu": 0, "dy_halo": HaloOf(dy)}
        to_input = tape.needs(x)
        if to_input:
            tape.graph.halos.at_least(dy, gradient_halo(attributes))
            addend, mask, dx = tape.absorb(x)
            attributes |= {"dx_halo": HaloOf(dx), **mask.attributes}
        else:
            addend, mask, dx = "", tape.no_mask, ""
            attributes |= {"dx_halo": 0, **mask.attributes}
        if tape.parameters:
            affine_grad, affine_out = tape.step_affine_grad() if affine else ("", "")
            coo_grad, coo_out = tape.step_coo_grad()
            inputs = [dy, x, value, affine, addend, mask.tensor, coo_grad, affine_grad, lists]
            tape.graph.emit("ConvGrad", inputs, [dx, coo_out, affine_out], **attributes)
        elif to_input:
            inputs = [dy, value, affine, addend, mask.tensor, lists]
            tape.graph.emit("ConvInputGrad", inputs, [dx], **attributes)


class ConvInputGrad(_Convolutional):
    """mask∘(convᵀ(scale·dy) + addend); inputs dy, value, affine?, addend?, mask?, lists."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "in", "dx_halo")]


class ConvGrad(_Convolutional):
    """ConvInputGrad, and the gradients of values, scale and shift, accumulated in place."""

    aliases = {1: 6, 2: 7}  # noqa: RUF012
    products = 2

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        affine = node.inputs[7]
        absent = TensorType("f32", (0,))
        return [
            _stack(node, types, "in", "dx_halo"),
            types[node.inputs[6]],
            types[affine] if affine else absent,
        ]

    def kernels(self, node: Node) -> tuple[str, ...]:
        return ("", "_gradient") if node.outputs[0] else ("_gradient",)


# Pooling


def _pool_gradient_attributes(node: Node, dy: str, dx: str) -> dict[str, Any]:
    return {**node.attributes, "in_halo": HaloOf(dx), "out_halo": HaloOf(dy)}


class MaxPool(Operator):
    """x → y, choice?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        a = node.attributes
        choice = TensorType(
            "u8", (_blocks(node, types), a["channels"] * a["out_height"] * a["out_width"], a["lanes"])
        )
        return [_stack(node, types, "out", "out_halo"), choice]

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return super().flops(node, types, connections) * int(node.attributes["kernel"]) ** 2

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = node.inputs[0]
        if not tape.needs(x):
            return
        if not node.outputs[1]:
            node.outputs[1] = tape.graph.unique(f"{node.outputs[0]}.choice")
        dx = tape.contribute(x)
        tape.graph.emit("MaxPoolGrad", [dy, node.outputs[1]], [dx], **_pool_gradient_attributes(node, dy, dx))


class MaxPoolGrad(Operator):
    """dy, choice → dx."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "in", "in_halo")]


class AveragePool(Operator):
    """x → y."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "out", "out_halo")]

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return super().flops(node, types, connections) * int(node.attributes["kernel"]) ** 2

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = node.inputs[0]
        if not tape.needs(x):
            return
        addend, mask, dx = tape.absorb(x)
        attributes = _pool_gradient_attributes(node, dy, dx) | mask.attributes
        tape.graph.emit("AveragePoolGrad", [dy, addend, mask.tensor], [dx], **attributes)


class AveragePoolGrad(Operator):
    """dy, addend?, mask? → dx."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "in", "in_halo")]


# Element by element


def _element_bits(node: Node, types: Types) -> TensorType:
    a = node.attributes
    return bits_type(_blocks(node, types), a["channels"], a["height"], a["width"], a["lanes"])


class Affine(Operator):
    """act(scale·x + shift); inputs x, affine; outputs y, bits?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "out_halo"), _element_bits(node, types)]

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, affine = node.inputs
        learned = tape.parameters and tape.is_learned(node)
        to_input = tape.needs(x)
        if not (learned or to_input):
            return
        # A scale directly on the image still needs a tensor for the gradient that nobody reads.
        addend, mask, dx = tape.absorb(x) if to_input else ("", tape.no_mask, tape.graph.unique(f"d.{x}"))
        attributes = {**node.attributes, "relu": 0, "out_halo": HaloOf(dy)}
        attributes |= {"dy_halo": HaloOf(dy), "dx_halo": HaloOf(dx), **mask.attributes}
        if learned:
            grad, out = tape.step_affine_grad()
            tape.graph.emit("AffineGrad", [dy, x, affine, addend, mask.tensor, grad], [dx, out], **attributes)
        else:
            tape.graph.emit("AffineInputGrad", [dy, affine, addend, mask.tensor], [dx], **attributes)


class AffineInputGrad(Operator):
    """mask∘(scale·dy + addend); inputs dy, affine, addend?, mask?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "dx_halo")]


class AffineGrad(Operator):
    """AffineInputGrad, and the gradients of scale and shift; inputs dy, x, affine, addend?, mask?,
    affine_grad.
    """

    aliases = {1: 5}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "dx_halo"), types[node.inputs[5]]]


class Add(Operator):
    """act(a + b); outputs y, bits?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "out_halo"), _element_bits(node, types)]

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        for tensor in node.inputs:
            if tape.needs(tensor):
                tape.pass_on(tensor, dy)


class MaskedAdd(Operator):
    """mask∘(a + b); inputs a, b?, mask?."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "out_halo")]


# Batch statistics


class BatchNorm(Operator):
    """Normalisation by the statistics of the micro-batch; inputs z, affine, sample_weight, mean, variance,
    residual?; outputs y, saved? [2C] (mean, inverse deviation), mean, variance, bits?."""

    aliases = {2: 3, 3: 4}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        saved = TensorType("f32", (2 * node.attributes["channels"],))
        mean, variance = types[node.inputs[3]], types[node.inputs[4]]
        return [_stack(node, types, "", "out_halo"), saved, mean, variance, _element_bits(node, types)]

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """The input is read three times: for the mean, for the variance, and to be normalised."""
        return super().bytes_moved(node, types, connections) + 2 * types[node.inputs[0]].bytes

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        z, affine, sample_weight, _, _, residual = node.inputs
        if not node.outputs[1]:
            node.outputs[1] = f"{node.outputs[0]}.saved"
        if residual:
            tape.pass_on(residual, dy)
        # The scale's gradient is needed even where nobody reads the input's.
        addend, mask, dz = (
            tape.absorb(z) if tape.needs(z) else ("", tape.no_mask, tape.graph.unique(f"d.{z}"))
        )
        attributes = {**node.attributes, "relu": 0}
        attributes |= {"dy_halo": HaloOf(dy), "dx_halo": HaloOf(dz), **mask.attributes}
        grad, out = tape.step_affine_grad()
        inputs = [dy, z, affine, node.outputs[1], sample_weight, addend, mask.tensor, grad]
        tape.graph.emit("BatchNormGrad", inputs, [dz, out], **attributes)


class BatchNormGrad(Operator):
    """Inputs dy, z, affine, saved, sample_weight, addend?, mask?, affine_grad; outputs dz, affine_grad."""

    aliases = {1: 7}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [_stack(node, types, "", "dx_halo"), types[node.inputs[7]]]

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """dy and z are read twice: for the sums, and for the gradient."""
        again = types[node.inputs[0]].bytes + types[node.inputs[1]].bytes
        return super().bytes_moved(node, types, connections) + again


# Losses and the attack


class CrossEntropy(Operator):
    """logits, labels, sample_weight → loss, dlogits, correct [1]."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [TensorType("f32", ()), types[node.inputs[0]], TensorType("f32", (1,))]


class _TwoBranchLoss(Operator):
    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        clean, adversarial = types[node.inputs[0]], types[node.inputs[1]]
        return [TensorType("f32", ()), clean, adversarial, TensorType("f32", (2,))]


class Trades(_TwoBranchLoss):
    """clean, adversarial, labels, sample_weight → loss, dclean, dadversarial, correct [2]."""


class Mart(_TwoBranchLoss):
    """clean, adversarial, labels, sample_weight → loss, dclean, dadversarial, correct [2]."""


class SoftmaxDifference(Operator):
    """logits, target [n, K] → dlogits."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[0]]]


class PgdStep(Operator):
    """x_adv, x, dx, step_size, epsilon → x_adv."""

    aliases = {0: 0}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[0]]]


# Order and state


class _InPlace(Operator):
    aliases = {0: 0}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[0]]]

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 0

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return 0


class ResetGradient(_InPlace):
    """buffer, lazy_reset_grad → buffer."""

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes


class After(_InPlace):
    """x, token → x."""


class Narrow(Operator):
    """x f32 → bfloat16, as u16: rounded to nearest, ties to even, but nothing that is not zero to zero."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [TensorType("u16", types[node.inputs[0]].dims)]

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.outputs[0]].bytes // 2


class Widen(Operator):
    """x u16, token? → f32; the token, any tensor, only orders execution."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [TensorType("f32", types[node.inputs[0]].dims)]

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes + types[node.outputs[0]].bytes


class GradientReady(Operator):
    """buffer → bool [1]."""

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [TensorType("bool", (1,))]

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return 1


class BuildLists(Operator):
    """index, lists → lists."""

    aliases = {0: 1}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[node.inputs[1]]]

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("lists", types[node.inputs[0]].dims[0]),)


class RewireStep(Operator):
    """value, index, momentum, gradient, hyper, counter → the first four."""

    aliases = {0: 0, 1: 1, 2: 2, 3: 3}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[name] for name in node.inputs[:4]]

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("rewire", types[node.inputs[0]].dims[0]),)

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 8 * types[node.inputs[0]].dims[0]


class DenseStep(Operator):
    """value, momentum, gradient, hyper → value, momentum."""

    aliases = {0: 0, 1: 1}  # noqa: RUF012

    def outputs(self, node: Node, types: Types) -> list[TensorType]:
        return [types[name] for name in node.inputs[:2]]

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 5 * types[node.inputs[0]].dims[0]


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        PackInput(), UnpackOutput(), FoldAffine(), FoldAffineGrad(), ZeroAffine(), Conv(), ConvInputGrad(),
        ConvGrad(), MaxPool(), MaxPoolGrad(), AveragePool(), AveragePoolGrad(), Affine(), AffineInputGrad(),
        AffineGrad(), Add(), MaskedAdd(), BatchNorm(), BatchNormGrad(), CrossEntropy(), Trades(), Mart(),
        SoftmaxDifference(), PgdStep(), ResetGradient(), After(), GradientReady(), BuildLists(), RewireStep(),
        DenseStep(), Narrow(), Widen(),
    )
}  # fmt: skip
"""Operator type → its rules."""

GRADIENTS = frozenset(
    {
        "ConvGrad", "ConvInputGrad", "MaxPoolGrad", "AveragePoolGrad", "AffineGrad", "AffineInputGrad",
        "BatchNormGrad", "MaskedAdd",
    }
)  # fmt: skip
"""Operators of the backward pass; what they read of the forward pass is kept for them."""
