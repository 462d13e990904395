"""Plain float64 definitions of the operators of the domain ``edge_bcs``, and an interpreter for graphs of
them.

Written from the meaning of the operators alone: activations are unpacked to [n, C, H, W], computed with
torch's float64 operators (whose gradients come from torch's autograd) and packed again. Packing and unpacking
check that every pixel outside the image is zero, and every operator checks that the halos it is given
suffice.
"""

# mypy: disable-error-code="arg-type, assignment, call-arg, no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper

from helpers.reference_ends import (
    cross_entropy,
    fold_affine,
    fold_affine_grad,
    mart_loss,
    pack_input,
    pgd_step,
    softmax_difference,
    trades_loss,
    two_branches,
    unpack_output,
    zero_affine,
)
from helpers.reference_layouts import (
    Array,
    Attributes,
    build_lists,
    narrow,
    pack,
    pack_bits,
    positions_of,
    unpack,
    unpack_bits,
    widen,
)

# Geometry


def _in(a: Attributes, stack: Array, halo: int) -> Array:
    return unpack(stack, a.get("in_channels", a.get("channels")), a["in_height"], a["in_width"], halo)


def _out(a: Attributes, stack: Array, halo: int) -> Array:
    return unpack(stack, a.get("out_channels", a.get("channels")), a["out_height"], a["out_width"], halo)


def _same(a: Attributes, stack: Array, halo: int) -> Array:
    return unpack(stack, a["channels"], a["height"], a["width"], halo)


def _masked(a: Attributes, dx: Array, addend: Array | None, mask: Array | None, halo: int) -> Array:
    """mask∘(dx + addend) for dx [n, C, H, W]; the addend is a stack with ``halo``."""
    shape = dx.shape[1:]
    if addend is not None:
        dx = dx + unpack(addend, *shape, halo)
    if a["mask_kind"] == 0:
        assert mask is None
        return dx
    assert mask is not None
    if a["mask_kind"] == 1:
        return dx * _derivative(a, unpack(mask, *shape, a["mask_halo"]))
    open_, closed = {b"hardsigmoid": (1 / 6, 0), b"leaky_relu": (1, a.get("mask_slope", 0))}.get(
        a.get("mask_activation", b"relu"), (1, 0)
    )
    return dx * np.where(unpack_bits(mask, *shape, a["lanes"]), open_, closed)


FUNCTIONS = {
    b"relu": F.relu,
    b"relu6": F.relu6,
    b"hardsigmoid": F.hardsigmoid,
    b"hardswish": F.hardswish,
    b"sigmoid": torch.sigmoid,
    b"tanh": torch.tanh,
    b"silu": F.silu,
    b"gelu": F.gelu,
    b"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
OPEN = {b"relu6": (0, 6), b"hardsigmoid": (-3, 3)}
"""Where bits are set; of the other functions where a number is positive."""


def _activated(a: Attributes, y: Array) -> Array:
    name = a.get("activation", b"relu" if a.get("relu") else None)
    if name is None:
        return y
    if name == b"leaky_relu":
        return np.where(y > 0, y, a["slope"] * y)
    return FUNCTIONS[name](torch.tensor(y)).numpy()


def _derivative(a: Attributes, kept: Array) -> Array:
    """Of the activation that a gradient goes through, from its output or what it was applied to."""
    name = a.get("mask_activation", b"relu")
    match name:
        case b"leaky_relu":
            return np.where(kept > 0, 1, a["mask_slope"])
        case b"hardsigmoid":
            return ((kept > 0) & (kept < 1)) / 6
        case b"sigmoid":
            return kept * (1 - kept)
        case b"tanh":
            return 1 - kept**2
    x = torch.tensor(kept, requires_grad=True)
    FUNCTIONS[name](x).sum().backward()
    assert x.grad is not None
    return x.grad.numpy()


def _channels(values: Array) -> Array:
    return values[None, :, None, None]


def _slot(a: Attributes, affine: Array | None, channels: int) -> tuple[Array, Array]:
    if affine is None:
        assert a["affine"] < 0
        return np.ones(channels), np.zeros(channels)
    part = slice(a["affine"], a["affine"] + channels)
    return affine[part], affine[len(affine) // 2 :][part]


def _add_to_slot(a: Attributes, grad: Array, channels: int, dscale: Array, dshift: Array) -> Array:
    grad = grad.copy()
    grad[a["affine"] : a["affine"] + channels] += dscale
    half = len(grad) // 2
    grad[half + a["affine"] : half + a["affine"] + channels] += dshift
    return grad


def _result(a: Attributes, y: Array, node_outputs: int) -> list[Array]:
    """[stack of act(y), bits and y itself if wanted]."""
    low, high = OPEN.get(a.get("activation"), (0, np.inf))
    bits = pack_bits(((y > low) & (y < high)).astype(float), a["lanes"])
    pre = pack(y, a["lanes"], a.get("pre_halo", 0))
    return [pack(_activated(a, y), a["lanes"], a["out_halo"]), bits, pre][:node_outputs]


# Convolution


def _kernel(a, value, lists):
    """(weights [O, I / groups, kh, kw], their part of ``value``, which of them it has); without lists all are
    there."""
    shape = (a["out_channels"], a["in_channels"] // a["groups"], *a["kernel"])
    if lists is None:
        part = slice(a["weight"], a["weight"] + int(np.prod(shape)))
        return value[part].reshape(shape), part, (slice(None),) * 4
    part, where = positions_of(a, lists)
    kernel = np.zeros(shape)
    kernel[where] = value[part]
    return kernel, part, where


def _convolved(a, x, kernel):
    top, left, bottom, right = a["pads"]
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, kernel, None, a["strides"], 0, a["dilations"], a["groups"])


def _axes(a):
    """(positions of a window from the pixel that its number says, stride, size, windows) of each axis."""
    for axis, side in enumerate(("height", "width")):
        positions = range(
            -a["pads"][axis], a["kernel"][axis] * a["dilations"][axis] - a["pads"][axis], a["dilations"][axis]
        )
        yield list(positions), a["strides"][axis], a[f"in_{side}"], a[f"out_{side}"]


def _x_halo_needed(a):
    return max(
        max(-positions[0], (windows - 1) * stride + positions[-1] - (size - 1))
        for positions, stride, size, windows in _axes(a)
    )


def _dy_halo_needed(a):
    need = 0
    for positions, stride, size, windows in _axes(a):
        for pixel in range(size):
            reached = [(pixel - p) // stride for p in positions if (pixel - p) % stride == 0]
            need = max([need] + [-r for r in reached] + [r - (windows - 1) for r in reached])
    return need


def conv(a, x, value, affine, residual, lists, outputs):
    assert a["in_halo"] >= _x_halo_needed(a)
    kernel, _, _ = _kernel(a, value, lists)
    z = _convolved(a, torch.tensor(_in(a, x, a["in_halo"])), torch.tensor(kernel)).numpy()
    scale, shift = _slot(a, affine, a["out_channels"])
    y = _channels(scale) * z + _channels(shift)
    if residual is not None:
        y = y + _out(a, residual, a["out_halo"])
    return _result(a, y, outputs)


def _convolution_gradient(a, dy, x, value, affine, lists):
    """(dx before addend and mask, gradient of the kernel, dscale, dshift) by autograd."""
    kernel, part, where = _kernel(a, value, lists)
    scale, _ = _slot(a, affine, a["out_channels"])
    n = dy.shape[0]
    images = np.zeros((n, a["in_channels"], a["in_height"], a["in_width"])) if x is None else x
    tx, tk, ts = (torch.tensor(v, requires_grad=True) for v in (images, kernel, scale))
    y = _convolved(a, tx, tk) * ts[None, :, None, None]
    y.backward(torch.tensor(dy))
    return tx.grad.numpy(), tk.grad.numpy()[where].ravel(), part, ts.grad.numpy(), dy.sum((0, 2, 3))


def conv_input_grad(a, dy, value, affine, addend, mask, lists):
    assert a["dy_halo"] >= _dy_halo_needed(a)
    dx, *_ = _convolution_gradient(a, _out(a, dy, a["dy_halo"]), None, value, affine, lists)
    return [pack(_masked(a, dx, addend, mask, a["dx_halo"]), a["lanes"], a["dx_halo"])]


def conv_grad(a, dy, x, value, affine, addend, mask, value_grad, affine_grad, lists, has_dx):
    assert a["in_halo"] >= _x_halo_needed(a) and (not has_dx or a["dy_halo"] >= _dy_halo_needed(a))
    x = _in(a, x, a["in_halo"])
    dx, dk, part, dscale, dshift = _convolution_gradient(
        a, _out(a, dy, a["dy_halo"]), x, value, affine, lists
    )
    value_grad = value_grad.copy()
    value_grad[part] += dk
    if affine is not None:
        affine_grad = _add_to_slot(a, affine_grad, a["out_channels"], dscale, dshift)
    dx_stack = pack(_masked(a, dx, addend, mask, a["dx_halo"]), a["lanes"], a["dx_halo"]) if has_dx else None
    return [dx_stack, value_grad, affine_grad]


# Pooling


def max_pool(a, x):
    images = torch.tensor(_in(a, x, a["in_halo"]))
    y, flat = F.max_pool2d(images, a["kernel"], a["strides"], a["pads"][:2], return_indices=True)
    # torch gives the place in the image; the choice is the place in the window.
    iy, ix = flat.numpy() // a["in_width"], flat.numpy() % a["in_width"]
    oy = np.arange(a["out_height"])[:, None] * a["strides"][0] - a["pads"][0]
    ox = np.arange(a["out_width"])[None, :] * a["strides"][1] - a["pads"][1]
    choice = (iy - oy) * a["kernel"][1] + (ix - ox)
    y = y.numpy()
    clipped = _activated(a, y)
    if "activation" in a:
        choice = np.where(clipped == y, choice, 255)
    choice, y = np.where(clipped == 0, 255, choice) if "activation" in a else choice, clipped
    n = y.shape[0]
    lanes = a["lanes"]
    packed = choice.reshape(n // lanes, lanes, -1).transpose(0, 2, 1).astype(np.uint8)
    return [pack(y, lanes, a["out_halo"]), packed]


def max_pool_grad(a, dy, choice):
    dy = _out(a, dy, a["out_halo"])
    n, channels = dy.shape[:2]
    chosen = choice.transpose(0, 2, 1).reshape(dy.shape).astype(int)
    dx = np.zeros((n, channels, a["in_height"], a["in_width"]))
    i, c, oy, ox = np.nonzero(chosen != 255)
    place = chosen[i, c, oy, ox]
    y = oy * a["strides"][0] - a["pads"][0] + place // a["kernel"][1]
    x = ox * a["strides"][1] - a["pads"][1] + place % a["kernel"][1]
    np.add.at(dx, (i, c, y, x), dy[i, c, oy, ox])
    return [pack(dx, a["lanes"], a["in_halo"])]


def average_pool(a, x):
    y = F.avg_pool2d(torch.tensor(_in(a, x, a["in_halo"])), a["kernel"], a["strides"]).numpy()
    return [pack(y, a["lanes"], a["out_halo"])]


def average_pool_grad(a, dy, addend, mask):
    dy = _out(a, dy, a["out_halo"])
    x = torch.zeros((*dy.shape[:2], a["in_height"], a["in_width"]), dtype=torch.float64, requires_grad=True)
    F.avg_pool2d(x, a["kernel"], a["strides"]).backward(torch.tensor(dy))
    assert x.grad is not None
    return [pack(_masked(a, x.grad.numpy(), addend, mask, a["in_halo"]), a["lanes"], a["in_halo"])]


# Element by element


def affine_(a, x, affine, outputs):
    scale, shift = _slot(a, affine, a["channels"])
    return _result(a, _channels(scale) * _same(a, x, a["in_halo"]) + _channels(shift), outputs)


def affine_input_grad(a, dy, affine, addend, mask):
    scale, _ = _slot(a, affine, a["channels"])
    dx = _channels(scale) * _same(a, dy, a["dy_halo"])
    return [pack(_masked(a, dx, addend, mask, a["dx_halo"]), a["lanes"], a["dx_halo"])]


def affine_grad_(a, dy, x, affine, addend, mask, affine_grad):
    images, gradient = _same(a, x, a["in_halo"]), _same(a, dy, a["dy_halo"])
    dscale, dshift = (gradient * images).sum((0, 2, 3)), gradient.sum((0, 2, 3))
    affine_grad = _add_to_slot(a, affine_grad, a["channels"], dscale, dshift)
    return [*affine_input_grad(a, dy, affine, addend, mask), affine_grad]


def add(a, first, second, outputs):
    return _result(a, _same(a, first, a["a_halo"]) + _same(a, second, a["b_halo"]), outputs)


def masked_add(a, first, second, mask):
    total = _same(a, first, a["a_halo"])
    if second is not None:
        total = total + _same(a, second, a["b_halo"])
    return [pack(_masked(a, total, None, mask, 0), a["lanes"], a["out_halo"])]


# Batch statistics


def _normalise(a, z, weight, scale, shift):
    """Torch: scale·(z − mean)·inv_std + shift with the statistics of the samples of weight > 0."""
    counted = z[torch.tensor(weight > 0)]
    mean = counted.mean((0, 2, 3))
    variance = ((counted - mean[None, :, None, None]) ** 2).mean((0, 2, 3))
    inverse = 1 / torch.sqrt(variance + a["epsilon"])
    y = scale[None, :, None, None] * (z - mean[None, :, None, None]) * inverse[None, :, None, None]
    return y + shift[None, :, None, None], mean, variance, inverse


def batch_norm(a, z, affine, weight, mean, variance, residual, outputs):
    scale, shift = (torch.tensor(v) for v in _slot(a, affine, a["channels"]))
    y, m, v, inverse = _normalise(a, torch.tensor(_same(a, z, a["in_halo"])), weight, scale, shift)
    y = y.numpy()
    if residual is not None:
        y = y + _same(a, residual, a["residual_halo"])
    mean, variance = mean.copy(), variance.copy()
    if a["update"]:
        part = slice(a["statistics"], a["statistics"] + a["channels"])
        mean[part] = (1 - a["momentum"]) * mean[part] + a["momentum"] * m.numpy()
        variance[part] = (1 - a["momentum"]) * variance[part] + a["momentum"] * v.numpy()
    stack, *bits = _result(a, y, 3)
    return [stack, np.concatenate([m.numpy(), inverse.numpy()]), mean, variance, *bits][:outputs]


def batch_norm_grad(a, dy, z, affine, saved, weight, addend, mask, affine_grad):
    scale, shift = (torch.tensor(v, requires_grad=True) for v in _slot(a, affine, a["channels"]))
    images = torch.tensor(_same(a, z, a["in_halo"]), requires_grad=True)
    y, mean, _, inverse = _normalise(a, images, weight, scale, shift)
    assert np.allclose(saved, np.concatenate([mean.detach().numpy(), inverse.detach().numpy()]))
    # Samples of weight 0 have no part in the statistics and get no gradient.
    gradient = _same(a, dy, a["dy_halo"]) * (weight > 0)[:, None, None, None]
    y.backward(torch.tensor(gradient))
    affine_grad = _add_to_slot(a, affine_grad, a["channels"], scale.grad.numpy(), shift.grad.numpy())
    dz = _masked(a, images.grad.numpy(), addend, mask, a["dx_halo"])
    return [pack(dz, a["lanes"], a["dx_halo"]), affine_grad]


# The interpreter


def _run(node: onnx.NodeProto, a: Attributes, inputs: list[Any]) -> list[Any]:
    outputs = len(node.output)
    wanted = [bool(name) for name in node.output]

    def padded(count: int) -> list[Any]:
        return inputs + [None] * (count - len(inputs))

    match node.op_type:
        case "PackInput":
            return pack_input(a, *inputs)
        case "UnpackOutput":
            return unpack_output(a, *inputs)
        case "FoldAffine":
            return fold_affine(a, *inputs)
        case "FoldAffineGrad":
            return fold_affine_grad(a, *inputs)
        case "ZeroAffine":
            return zero_affine(a, *inputs)
        case "Conv":
            return conv(a, *padded(5), outputs)
        case "ConvInputGrad":
            return conv_input_grad(a, *padded(6))
        case "ConvGrad":
            return conv_grad(a, *padded(9), wanted[0])
        case "DenseConv":
            return conv(a, *padded(5), outputs)
        case "DenseConvInputGrad":
            return conv_input_grad(a, *padded(6))
        case "DenseConvGrad":
            return conv_grad(a, *padded(9), wanted[0])
        case "MaxPool":
            return max_pool(a, *inputs)[:outputs]
        case "MaxPoolGrad":
            return max_pool_grad(a, *inputs)
        case "AveragePool":
            return average_pool(a, *inputs)
        case "AveragePoolGrad":
            return average_pool_grad(a, *padded(3))
        case "Affine":
            return affine_(a, *inputs, outputs)
        case "AffineInputGrad":
            return affine_input_grad(a, *padded(4))
        case "AffineGrad":
            return affine_grad_(a, *padded(6))
        case "Activate":
            return _result(a, _same(a, inputs[0], a["in_halo"]), outputs)
        case "Add":
            return add(a, *inputs, outputs)
        case "MaskedAdd":
            return masked_add(a, *padded(3))
        case "BatchNorm":
            return batch_norm(a, *padded(6), outputs)
        case "BatchNormGrad":
            return batch_norm_grad(a, *padded(8))
        case "CrossEntropy":
            return cross_entropy(a, *inputs)
        case "Trades":
            return two_branches(a, *inputs, trades_loss)
        case "Mart":
            return two_branches(a, *inputs, mart_loss)
        case "SoftmaxDifference":
            return softmax_difference(a, *inputs)
        case "PgdStep":
            return pgd_step(a, *inputs)
        case "ResetGradient":
            return [np.zeros_like(inputs[0]) if inputs[1][0] else inputs[0]]
        case "After":
            return [inputs[0]]
        case "Narrow":
            return [narrow(inputs[0])]
        case "Widen":
            return [widen(inputs[0])]
        case "GradientReady":
            return [np.array([True])]
        case "BuildLists":
            return [build_lists(inputs[0], a["layers"], len(inputs[1]))]
    raise NotImplementedError(node.op_type)


def run_graph(
    model: onnx.ModelProto, feeds: dict[str, Array], tensors: dict[str, Any] | None = None
) -> dict[str, Array]:
    """Execute the nodes in file order in float64; returns the graph's outputs.

    A node that reads a tensor which is not yet written fails. ``tensors``, if given, receives every tensor.
    """
    declared = {value.name: value for value in model.graph.input}
    assert set(feeds) == set(declared), set(feeds) ^ set(declared)
    values: dict[str, Any] = {} if tensors is None else tensors
    for name, array in feeds.items():
        shape = tuple(extent.dim_value for extent in declared[name].type.tensor_type.shape.dim)
        assert tuple(array.shape) == shape, (name, array.shape, shape)
        values[name] = array.astype(np.float64) if array.dtype == np.float32 else array
    for node in model.graph.node:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        attributes = {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in attributes.items()}
        results = _run(node, attributes, [values[name] if name else None for name in node.input])
        for name, result in zip(node.output, results, strict=False):
            if name:
                assert result is not None, (node.name, name)
                values[name] = result
    return {value.name: values[value.name] for value in model.graph.output}
