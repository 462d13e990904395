"""A convolution of any kind with everything around it, run by the library and by torch in float64."""

# mypy: disable-error-code="dict-item"

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from helpers.half import pack_half, unpack_half
from helpers.operators import build_lists, pack, pack_bits, run, unpack


@dataclass(frozen=True)
class Case:
    """One convolution with everything around it, and how to run it."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int, int, int] = 1  # or top, left, bottom, right
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    dense: bool = False  # all weights are there, in dense.value
    lanes: int = 4
    blocks: int = 1
    density: float = 0.3
    algorithm: str = "sparse"
    affine: bool = True
    addend: bool = False
    relu: bool = True
    bits: bool = True
    mask_kind: int = 0
    extra_halo: int = 0
    seed: int = 0
    threads: int = 1
    half: bool = False  # stacks in half precision

    @property
    def strides(self) -> tuple[int, int]:
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    @property
    def pads(self) -> tuple[int, int, int, int]:
        return (self.padding,) * 4 if isinstance(self.padding, int) else self.padding

    @property
    def positions(self) -> tuple[list[int], list[int]]:
        """Of window 0, the pixels that it meets: rows and columns."""
        rows, columns = (
            [t * self.dilations[axis] - self.pads[axis] for t in range(self.kernel[axis])] for axis in (0, 1)
        )
        return rows, columns

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = (
            (size + self.pads[axis + 2] - 1 - self.positions[axis][-1]) // self.strides[axis] + 1
            for axis, size in enumerate((self.height, self.width))
        )
        return height, width

    @property
    def geometry(self) -> dict[str, Any]:
        """As attributes; where artifacts of 0.1 could say it, in their words for every other case."""
        plain = isinstance(self.stride, int) and isinstance(self.padding, int)
        if self.seed % 2 and plain and self.dilations == (1, 1) and self.groups == 1:
            return {"kernel": list(self.kernel), "stride": self.stride, "padding": self.padding}
        return {
            "kernel": list(self.kernel),
            "strides": list(self.strides),
            "pads": list(self.pads),
            "dilations": list(self.dilations),
            "groups": self.groups,
        }

    def algorithm_for(self, width: int) -> str:
        """The algorithm of a walk whose result has rows of so many pixels: what Winograd's products cannot
        make is made without them."""
        steps = {*self.strides, *self.dilations}
        can = (self.kernel[1], steps, width % 4, self.lanes % 16) == (3, {1}, 0, 0)
        return "dense" if self.algorithm == "winograd" and not can else self.algorithm

    @property
    def needed_halos(self) -> tuple[int, int]:
        """Halo of x and of dy, from the rule in the contract: what the accesses reach beyond the image."""
        forward = transposed = 0
        sizes = (self.height, self.width)
        for size, out, stride, positions in zip(
            sizes, self.out_size, self.strides, self.positions, strict=True
        ):
            reach = [y * stride + t for y in (0, out - 1) for t in positions]
            forward = max(forward, -min(reach), max(reach) - (size - 1))
            # All dy pixels that a pixel of x takes part in, were the image of dy without end.
            uses = [
                (y - t) // stride
                for y, t in itertools.product(range(size), positions)
                if (y - t) % stride == 0
            ]
            transposed = max([transposed, -min(uses, default=0), max(uses, default=0) - (out - 1)])
        return forward, transposed


@dataclass
class Problem:
    """The arrays of a case: dense weights in float32, and the COO form in which the operators get them."""

    case: Case
    weight: np.ndarray = field(init=False)
    x: np.ndarray = field(init=False)
    dy: np.ndarray = field(init=False)
    residual: np.ndarray = field(init=False)
    addend: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    affine: np.ndarray = field(init=False)
    value: np.ndarray = field(init=False)
    before: np.ndarray = field(init=False)
    lists: np.ndarray = field(init=False)
    own: slice = field(init=False)
    pointers: tuple[int, int] = field(init=False)
    slot: int = 3

    def __post_init__(self) -> None:
        case = self.case
        random = np.random.default_rng(case.seed)

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape).astype(np.float32)

        n = case.blocks * case.lanes
        self.x = normal(n, case.in_channels, case.height, case.width)
        self.dy = normal(n, case.out_channels, *case.out_size)
        self.residual = normal(*self.dy.shape)
        self.addend, self.mask = normal(*self.x.shape), normal(*self.x.shape)
        self.affine = normal(2 * (self.slot + case.out_channels + 2))
        shape = (case.out_channels, case.in_channels // case.groups, *case.kernel)
        active = random.random(shape) < (1 if case.dense else case.density)
        if case.out_channels > 2 and not case.dense:
            active[1] = False  # an empty row
            active[-1] = True  # and a full one
        self.weight = np.where(active, normal(*shape), 0).astype(np.float32)
        # Two layers share the arrays, so that nothing of ours starts at 0.
        other = {
            "offset": 0,
            "out_channels": 2,
            "in_channels": 3,
            "kernel": (1, 1),
            "strides": (1, 1),
            "pads": (0, 0, 0, 0),
            "dilations": (1, 1),
            "groups": 1,
        }
        mine = {
            "offset": 6,
            "out_channels": case.out_channels,
            "in_channels": case.in_channels,
            "kernel": case.kernel,
            "strides": case.strides,
            "pads": case.pads,
            "dilations": case.dilations,
            "groups": case.groups,
        }
        positions = np.flatnonzero(active)
        index = np.concatenate([[0, 2, 5], positions + 6]).astype(np.int32)
        self.own = slice(3, 3 + len(positions))
        self.value = np.concatenate([[9, 9, 9], self.weight.ravel()[positions]]).astype(np.float32)
        self.before = normal(len(self.value))
        self.lists, forward, transpose = build_lists(index, [other, mine])
        self.pointers = forward[1], transpose[1]

    def pack(self, images: np.ndarray, lanes: int, halo: int) -> np.ndarray:
        return (pack_half if self.case.half else pack)(images, lanes, halo)

    def unpack(self, stack: np.ndarray, *sizes: int) -> np.ndarray:
        return (unpack_half if self.case.half else unpack)(stack, *sizes)

    def attributes(self) -> dict[str, Any]:
        case = self.case
        out_height, out_width = case.out_size
        return {
            "layer_offset": 6,
            "in_channels": case.in_channels,
            "in_height": case.height,
            "in_width": case.width,
            "in_halo": case.needed_halos[0] + case.extra_halo,
            "out_channels": case.out_channels,
            "out_height": out_height,
            "out_width": out_width,
            "out_halo": case.extra_halo,
            **case.geometry,
            "lanes": case.lanes,
            "forward_pointer": self.pointers[0],
            "transpose_pointer": self.pointers[1],
            "affine": self.slot if case.affine else -1,
            "relu": int(case.relu),
            "algorithm": case.algorithm_for(out_width),
            "weight": self.own.start,
        }

    @property
    def operator(self) -> str:
        return "DenseConv" if self.case.dense else "Conv"

    @property
    def where(self) -> dict[str, np.ndarray]:
        """The input after all others that says where connections act."""
        return {} if self.case.dense else {"lists": self.lists}

    def forward(self) -> dict[str, np.ndarray]:
        case = self.case
        attributes = self.attributes()
        results = run(
            self.operator,
            {
                "x": self.pack(self.x, case.lanes, attributes["in_halo"]),
                "value": self.value,
                "affine": self.affine if case.affine else None,
                "residual": self.pack(self.residual, case.lanes, case.extra_halo) if case.addend else None,
                **self.where,
            },
            {"y": np.float32, "bits": np.uint8 if case.bits else None},
            threads=case.threads,
            half=case.half,
            **attributes,
        )
        results["y"] = self.unpack(results["y"], case.out_channels, *case.out_size, case.extra_halo)
        return results

    def backward(self, *, weights: bool, with_dx: bool = True) -> dict[str, np.ndarray]:
        case = self.case
        dy_halo = case.needed_halos[1] + case.extra_halo
        dx_halo, mask_halo = case.extra_halo, case.extra_halo + 1
        attributes = self.attributes() | {
            "dy_halo": dy_halo,
            "dx_halo": dx_halo,
            "mask_kind": case.mask_kind,
            "mask_halo": mask_halo,
            "algorithm": case.algorithm_for(case.width),
        }
        masks = {1: self.pack(self.mask, case.lanes, mask_halo), 2: pack_bits(self.mask, case.lanes)}
        inputs = {"dy": self.pack(self.dy, case.lanes, dy_halo)}
        if weights:
            inputs["x"] = self.pack(self.x, case.lanes, attributes["in_halo"])
        inputs |= {
            "value": self.value,
            "affine": self.affine if case.affine else None,
            "addend": self.pack(self.addend, case.lanes, dx_halo) if case.addend else None,
            "mask": masks.get(case.mask_kind),
        }
        outputs: dict[str, Any] = {"dx": np.float32 if with_dx else None}
        if weights:
            inputs |= {
                "coo_grad": self.before,
                "affine_grad": np.ones_like(self.affine) if case.affine else None,
            }
            outputs |= {"coo_grad": np.float32, "affine_grad": np.float32 if case.affine else None}
        inputs |= self.where
        operator = self.operator + ("Grad" if weights else "InputGrad")
        results = run(operator, inputs, outputs, threads=case.threads, half=case.half, **attributes)
        if with_dx:
            results["dx"] = self.unpack(results["dx"], case.in_channels, case.height, case.width, dx_halo)
        return results


def outcome(case: Case) -> dict[str, np.ndarray]:
    """All results of the three operators."""
    problem = Problem(case)
    results = problem.forward()
    results |= {"input only: " + name: value for name, value in problem.backward(weights=False).items()}
    results |= problem.backward(weights=True)
    without = problem.backward(weights=True, with_dx=False)
    results |= {"without dx: " + name: value for name, value in without.items()}
    return results


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """The same in float64 with torch's own convolution and autograd; the variants share it."""
    problem = Problem(case)
    x, weight, dy, residual, addend = (
        torch.tensor(array, dtype=torch.float64)
        for array in (problem.x, problem.weight, problem.dy, problem.residual, problem.addend)
    )
    x.requires_grad_()
    weight.requires_grad_()
    scale = torch.ones(case.out_channels, dtype=torch.float64)
    shift = torch.zeros(case.out_channels, dtype=torch.float64)
    if case.affine:
        slots = len(problem.affine) // 2
        affine = torch.tensor(problem.affine, dtype=torch.float64)
        scale = affine[problem.slot : problem.slot + case.out_channels].clone()
        shift = affine[slots + problem.slot : slots + problem.slot + case.out_channels].clone()
    scale.requires_grad_()
    shift.requires_grad_()
    top, left, bottom, right = case.pads
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    convolved = torch.nn.functional.conv2d(
        padded, weight, stride=case.strides, dilation=case.dilations, groups=case.groups
    )
    z = convolved * scale[:, None, None] + shift[:, None, None]
    y = z + residual if case.addend else z
    if case.relu:
        y = torch.relu(y)
    dx, dweight, dscale, dshift = torch.autograd.grad(z, (x, weight, scale, shift), dy)
    if case.addend:
        dx = dx + addend
    if case.mask_kind:
        dx = torch.where(torch.tensor(problem.mask) > 0, dx, 0)
    coo_grad = problem.before.astype(np.float64)
    active = np.flatnonzero(problem.weight)
    coo_grad[problem.own] += dweight.detach().numpy().ravel()[active]
    results = {
        "y": y.detach().numpy(),
        "input only: dx": dx.numpy(),
        "dx": dx.numpy(),
        "coo_grad": coo_grad,
        "without dx: coo_grad": coo_grad,
    }
    if case.bits:
        results["bits"] = pack_bits(y.detach().numpy(), case.lanes)
    if case.affine:
        affine_grad = np.ones(len(problem.affine))
        affine_grad[problem.slot : problem.slot + case.out_channels] += dscale.numpy()
        affine_grad[slots + problem.slot : slots + problem.slot + case.out_channels] += dshift.numpy()
        results["affine_grad"] = results["without dx: affine_grad"] = affine_grad
    return results
