"""What older opsets write out in several nodes: GELU, group norm and layer norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import nn

from .onnx_file import OnnxNode
from .onnx_module import Apply, Builder, RefusedError


def gelu(b: Builder, node: OnnxNode) -> None:
    """GELU as it is written before opset 20: x·½·(1 + Erf(x/√2)), the products in any order."""
    refusal = RefusedError("it is supported as a part of GELU alone")

    def other(product: OnnxNode | None, known: str) -> tuple[str, float | None]:
        """The factor beside ``known`` of a product, and its number if it is one."""
        if product is None or product.operator != "Mul" or known not in product.inputs:
            raise refusal
        name = product.inputs[1] if product.inputs[0] == known else product.inputs[0]
        found = b.constants.get(name)
        return name, float(found.ravel()[0]) if found is not None and found.size == 1 else None

    divided = b.producers.get(node.inputs[0])
    total = b.alone(node.outputs[0])
    if divided is None or divided.operator not in ("Div", "Mul") or total is None or total.operator != "Add":
        raise refusal
    source = divided.inputs[0]
    factor = b.constants.get(divided.inputs[1], np.zeros(0))
    one = [b.constants[name] for name in total.inputs if name in b.constants]
    root = 2.0 ** (0.5 if divided.operator == "Div" else -0.5)
    if (
        factor.size != 1
        or abs(float(factor.ravel()[0]) - root) > 1e-6
        or len(one) != 1
        or not (one[0] == 1).all()
    ):
        raise refusal
    last = b.alone(total.outputs[0])
    name, number = other(last, total.outputs[0])
    assert last is not None
    chain = [total, last]
    if number == 0.5 or name == source:
        following = b.alone(last.outputs[0])
        second, half = other(following, last.outputs[0])
        if not ((number == 0.5 and second == source) or (name == source and half == 0.5)):
            raise refusal
        assert following is not None
        chain.append(following)
    elif other(b.producers.get(name), source)[1] != 0.5:
        raise refusal
    b.skip(*chain)
    b.emit(chain[-1], Apply(F.gelu), source)


def group_norm(b: Builder, node: OnnxNode, source: str, wanted: Sequence[int]) -> bool:
    """[n, C, H, W] → [n, G, rest] → InstanceNormalization → [n, C, H, W] → · [C, 1, 1] → + [C, 1, 1]."""
    chain, current = [], node.outputs[0]
    for operator in ("InstanceNormalization", "Reshape", "Mul", "Add"):
        following = b.alone(current)
        if following is None or following.operator != operator:
            return False
        chain.append(following)
        current = following.outputs[0]
    norm, _, product, total = chain
    channels, groups = b.values[source].shape[1], wanted[1]
    arrays = []
    for part, before in ((product, chain[1]), (total, product)):
        (name,) = [name for name in part.inputs if name != before.outputs[0]] or [""]
        found = b.constants.get(name)
        if found is None or found.size not in (1, channels):
            return False
        arrays.append(np.broadcast_to(found.ravel(), (channels,)).astype(np.float32))
    if not ((b.weight(norm, 1, 1) == 1).all() and (b.weight(norm, 2, 1) == 0).all()):
        return False
    module = nn.GroupNorm(groups, channels, float(norm.attributes.get("epsilon", 1e-5)), device="meta")
    b.skip(*chain)
    name = next((name for name in product.inputs if name in b.constants), "")
    b.module(total, name, module, source, weight=arrays[0], bias=arrays[1])
    return True


def layer_norm(b: Builder, node: OnnxNode, source: str, axes: Sequence[int]) -> bool:
    """x − mean → squared → mean → + ε → √, and their quotient · scale + shift, over the last axis."""
    if list(axes) != [b.values[source].ndim - 1]:
        return False
    chain, current = [], node.outputs[0]
    for operators in (
        ("Sub",),
        ("Pow", "Mul"),
        ("ReduceMean",),
        ("Add",),
        ("Sqrt",),
        ("Div",),
        ("Mul",),
        ("Add",),
    ):
        found = [other for other in b.readers.get(current, []) if other.operator in operators]
        if not found:
            return False
        chain.append(found[0])
        current = found[0].outputs[0]
    difference, square, mean, variance, _, quotient, product, total = chain
    inside = quotient.inputs[0] == difference.outputs[0] and difference.inputs == (source, node.outputs[0])
    if square.operator == "Pow" and float(np.ravel(b.constant(square, 1))[0]) != 2:
        return False
    arrays = []
    for part, before in ((variance, mean), (product, quotient), (total, product)):
        (name,) = [name for name in part.inputs if name != before.outputs[0]] or [""]
        if name not in b.constants:
            return False
        arrays.append((name, b.constants[name]))
    (_, epsilon), (name, scale), (_, shift) = arrays
    extent = b.values[source].shape[-1]
    if not inside or scale.shape != (extent,) or shift.shape != (extent,) or epsilon.size != 1:
        return False
    module = nn.LayerNorm([extent], float(epsilon.ravel()[0]), device="meta")
    b.skip(*chain)
    b.module(total, name, module, source, weight=scale, bias=shift)
    return True
