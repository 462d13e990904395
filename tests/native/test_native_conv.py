"""The convolution operators of every instruction set against torch in float64, over random layers."""

# mypy: disable-error-code="dict-item"

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import programs
from helpers.convolutions import Case, expected, outcome
from helpers.operators import budget_library, pack_bits

# Emulated, the scalar kernels are only what check_kernels compares the others with.
VARIANTS = ("neon",) if programs.EMULATOR else ("scalar", "avx2", "avx512", "neon")
RANDOM_CASES = 60
TOLERANCE = 1e-5  # of the largest magnitude


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
    if programs.instruction_set(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=choose_variant, initargs=(request.param,)) as pool:
        assert pool.submit(chosen_variant).result() == request.param
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
    general, others = CASES[RANDOM_CASES : 2 * RANDOM_CASES], CASES[2 * RANDOM_CASES :]
    cases = [CASES[0], CASES[1], *general[::6], *others[::2]]
    one = variant.map(outcome, cases)
    two = variant.map(outcome, [replace(case, threads=2) for case in cases])
    for case, first, second in zip(cases, one, two, strict=True):
        for name, value in first.items():
            assert np.array_equal(value, second[name]), f"{name} of {case}"
