"""The convolution operators of every instruction set against torch in float64, over random layers."""

# mypy: disable-error-code="dict-item"

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import programs
from helpers.operators import budget_library, build_lists, pack, pack_bits, run, unpack

# Emulated, the scalar kernels are only what check_kernels compares the others with.
VARIANTS = ("neon",) if programs.EMULATOR else ("scalar", "avx2", "avx512", "neon")
RANDOM_CASES = 60
TOLERANCE = 1e-5  # of the largest magnitude


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
                "x": pack(self.x, case.lanes, attributes["in_halo"]),
                "value": self.value,
                "affine": self.affine if case.affine else None,
                "residual": pack(self.residual, case.lanes, case.extra_halo) if case.addend else None,
                **self.where,
            },
            {"y": np.float32, "bits": np.uint8 if case.bits else None},
            threads=case.threads,
            **attributes,
        )
        results["y"] = unpack(results["y"], case.out_channels, *case.out_size, case.extra_halo)
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
        masks = {1: pack(self.mask, case.lanes, mask_halo), 2: pack_bits(self.mask, case.lanes)}
        inputs = {"dy": pack(self.dy, case.lanes, dy_halo)}
        if weights:
            inputs["x"] = pack(self.x, case.lanes, attributes["in_halo"])
        inputs |= {
            "value": self.value,
            "affine": self.affine if case.affine else None,
            "addend": pack(self.addend, case.lanes, dx_halo) if case.addend else None,
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
        results = run(operator, inputs, outputs, threads=case.threads, **attributes)
        if with_dx:
            results["dx"] = unpack(results["dx"], case.in_channels, case.height, case.width, dx_halo)
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


def general_case(seed: int) -> Case:
    """Any strides, pads, dilations and groups; half of them with all weights there."""
    random = np.random.default_rng(3000 + seed)

    def one(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    kernel = one((1, 7), (7, 1), (3, 3), (3, 2), (2, 2), (5, 3), (1, 1))
    dilations = one((1, 1), (2, 1), (1, 3), (2, 2))
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    groups = one(1, 1, 2, 4)
    dense = one(False, True, True)
    depthwise = dense and seed % 2 == 0
    if depthwise:
        groups = int(random.integers(2, 7))
        kernel = one((3, 3), (5, 5), (7, 7), (3, 1), (3, 5), (2, 2), kernel)
        dilations = one((1, 1), dilations)
        span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    top, left, bottom, right = (int(random.integers(0, span[i % 2] // 2 + 2)) for i in range(4))
    pads = top, left, bottom, right
    return Case(
        in_channels=groups if depthwise else groups * int(random.integers(1, 7)),
        out_channels=groups * int(random.integers(1, 7)),
        height=int(random.integers(max(1, span[0] - pads[0] - pads[2]), 16)),
        width=int(random.integers(max(1, span[1] - pads[1] - pads[3]), 16)),
        kernel=kernel,
        stride=one((1, 1), (2, 1), (1, 2), (2, 2), (3, 2)),
        padding=pads,
        dilations=dilations,
        groups=groups,
        dense=dense,
        lanes=one(1, 2, 3, 4, 8, 16),
        blocks=one(1, 2, 3),
        density=one(0.05, 0.3, 1.0),
        algorithm="depthwise"
        if depthwise
        else one("dense", "winograd")
        if dense
        else one("sparse", "dense")
        if groups == 1
        else "sparse",
        affine=one(True, True, False),
        addend=one(True, False),
        relu=one(True, False),
        mask_kind=one(0, 1, 2),
        extra_halo=one(0, 0, 1),
        seed=2 * seed,
    )


def random_case(seed: int) -> Case:
    random = np.random.default_rng(1000 + seed)

    def one(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    kernel = one((1, 1), (3, 3), (5, 5), (3, 1), (2, 3))
    padding = int(random.integers(0, max(kernel) // 2 + 2))
    height, width = (int(max(k, random.integers(1, 11))) for k in kernel)
    return Case(
        in_channels=int(random.integers(1, 20)),
        out_channels=int(random.integers(1, 20)),
        height=height,
        width=width,
        kernel=kernel,
        stride=one(1, 1, 2, 2, 3),
        padding=padding,
        lanes=one(1, 2, 3, 4, 8, 16),
        blocks=one(1, 2, 3),
        density=one(0.0, 0.05, 0.3, 1.0),
        algorithm=one("sparse", "dense"),
        affine=one(True, True, False),
        addend=one(True, False),
        relu=one(True, False),
        bits=one(True, False),
        mask_kind=one(0, 1, 2),
        extra_halo=one(0, 0, 1, 2),
        seed=seed,
    )


BIG = [
    # Long rows, walked in chunks of channels.
    Case(60, 20, 8, 8, lanes=16, density=0.5, addend=True, mask_kind=2),
    Case(96, 12, 12, 12, kernel=(3, 3), lanes=8, density=0.4, mask_kind=1),
    # More entries than one group takes, and rows longer than one.
    Case(40, 40, 5, 5, kernel=(5, 5), padding=2, lanes=16, blocks=2, density=0.9, mask_kind=2),
    Case(400, 3, 4, 4, kernel=(5, 5), padding=2, lanes=4, density=1.0, addend=True, mask_kind=1),
    # More rows than one group takes; a linear layer; a strided shortcut.
    Case(16, 300, 2, 2, kernel=(1, 1), padding=0, lanes=16, blocks=3, density=0.1),
    Case(300, 70, 1, 1, kernel=(1, 1), padding=0, lanes=16, blocks=8, density=0.1),
    Case(
        64, 40, 16, 16, kernel=(1, 1), stride=2, padding=0, lanes=16, density=0.3, mask_kind=2, extra_halo=1
    ),
    Case(32, 32, 32, 32, lanes=16, density=0.3, addend=True, mask_kind=2, extra_halo=1),
    Case(32, 32, 16, 16, stride=2, lanes=16, density=0.3, addend=True, mask_kind=2, extra_halo=1),
]
# Winograd's products: in chunks of channels, for bands and groups of planes, without padding or with more of
# it, in rows of four pixels and between few planes.
WINOGRAD = [
    BIG[0],
    Case(20, 40, 12, 16, lanes=16, blocks=2, addend=True, mask_kind=2, extra_halo=1),
    Case(19, 17, 9, 16, kernel=(5, 3), padding=2, lanes=32, blocks=2, mask_kind=1, extra_halo=1),
    Case(8, 9, 6, 10, padding=0, lanes=16, density=1.0, mask_kind=2),
    Case(9, 8, 6, 12, padding=0, lanes=48, affine=False),
    Case(2, 4, 1, 4, kernel=(1, 3), padding=1, lanes=16, blocks=3, addend=True),
]
WINOGRAD = [replace(case, algorithm="winograd") for case in WINOGRAD]
# Every weight there, over groups, in bands and groups of planes, with Winograd's products.
DENSE = [
    Case(40, 20, 12, 16, lanes=16, groups=2, algorithm="winograd", addend=True, mask_kind=2, extra_halo=1),
    Case(64, 64, 16, 16, lanes=16, groups=16, stride=2, algorithm="dense", mask_kind=2),
    Case(3, 32, 32, 32, lanes=16, stride=2, padding=(0, 0, 1, 1), algorithm="dense"),
    Case(70, 10, 1, 1, kernel=(1, 1), padding=0, lanes=8, blocks=2, algorithm="dense", relu=False),
]
# Plane by plane: at steps of one and two pixels, with vectors that span pixels and vectors that do not, in
# long rows, and several planes of the result to one of the image.
DEPTHWISE = [
    Case(12, 12, 20, 16, lanes=16, groups=12, blocks=2, addend=True, mask_kind=2, extra_halo=1),
    Case(6, 12, 17, 23, kernel=(5, 5), padding=2, stride=2, lanes=8, groups=6, mask_kind=1),
    Case(5, 5, 9, 300, kernel=(7, 7), padding=3, lanes=16, groups=5, relu=False),
    Case(
        5, 10, 14, 14, stride=2, padding=(0, 0, 1, 1), lanes=3, groups=5, blocks=3, mask_kind=2, addend=True
    ),
    Case(8, 8, 9, 8, dilations=(2, 2), padding=2, lanes=16, groups=8, mask_kind=2),
]
DENSE = [
    replace(case, dense=True, algorithm="depthwise" if case.groups == case.in_channels else case.algorithm)
    for case in (*DENSE, *DEPTHWISE)
]
# Stacks beyond the caches, which the sparse kernels ask for ahead.
FAR = Case(64, 64, 32, 32, lanes=16, blocks=2, density=0.03, addend=True, mask_kind=2)
CASES = [random_case(seed) for seed in range(RANDOM_CASES)] + [
    *(general_case(seed) for seed in range(RANDOM_CASES)),
    *DENSE,
    *(replace(case, algorithm=algorithm) for case in BIG for algorithm in ("sparse", "dense")),
    *WINOGRAD,
    FAR,
]


def choose_variant(isa: str) -> None:
    os.environ["EDGE_BCS_ISA"] = isa


def chosen_variant() -> str:
    if programs.EMULATOR:
        return programs.instruction_set(os.environ["EDGE_BCS_ISA"])
    return budget_library().edge_bcs_isa().decode()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    """A process for each instruction set, because the choice is made once, when the library is loaded."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=choose_variant, initargs=(request.param,)) as pool:
        if pool.submit(chosen_variant).result() != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield pool


def assert_close(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray], case: Case) -> None:
    assert actual.keys() == wanted.keys()
    for name, reference in wanted.items():
        if name == "bits":
            continue
        error = np.abs(actual[name] - reference).max(initial=0)
        magnitude = max(1.0, np.abs(reference).max(initial=0))
        assert error <= TOLERANCE * magnitude, f"{name} of {case}: error {error / magnitude:.2e}"
    if "bits" in wanted:
        # A bit must be that of the y given beside it; y itself was compared above.
        assert np.array_equal(actual["bits"], pack_bits(actual["y"], case.lanes)), f"bits of {case}"


def test_random_layers(variant: ProcessPoolExecutor) -> None:
    for case, actual in zip(CASES, variant.map(outcome, CASES), strict=True):
        assert_close(actual, expected(case), case)


def test_winograds_products_are_used_where_there_are_registers_for_them(
    variant: ProcessPoolExecutor,
) -> None:
    """They round otherwise. Half of the variants run the plain dense kernel instead."""
    cases = [WINOGRAD[0], replace(WINOGRAD[0], algorithm="dense")]
    winograd, dense = variant.map(outcome, cases)
    mixed = variant.submit(chosen_variant).result() in ("avx512", "neon")
    for name in ("y", "dx", "input only: dx"):
        assert np.array_equal(winograd[name], dense[name]) != mixed, name
    assert np.array_equal(winograd["coo_grad"], dense["coo_grad"])


def test_the_number_of_threads_changes_no_bit(variant: ProcessPoolExecutor) -> None:
    cases = [CASES[0], CASES[1], *CASES[RANDOM_CASES:]]
    one = variant.map(outcome, cases)
    two = variant.map(outcome, [replace(case, threads=2) for case in cases])
    for case, first, second in zip(cases, one, two, strict=True):
        for name, value in first.items():
            assert np.array_equal(value, second[name]), f"{name} of {case}"
