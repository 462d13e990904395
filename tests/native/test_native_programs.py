"""The programs of tests/native: kernels against the scalar ones, the rewiring against numpy.

`make test-native-arm` runs this file, and those of the operators, for 64-bit ARM.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import programs, rewire_digest

F = np.float32


@pytest.mark.parametrize("variant", ["avx512", "avx2", "neon"])
def test_every_kernel_equals_the_scalar_one(variant: str) -> None:
    if programs.instruction_set(variant) != variant:
        pytest.skip(f"this machine has no {variant}")
    result = programs.run("check_kernels", 300, EDGE_BCS_ISA=variant)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{variant} {kernel}"
        for kernel in (
            "sparse", "dense", "gradient", "dense_gradient", "depthwise", "depthwise_products",
            "combine", "sums", "max_pool", "max_pool_gradient", "normals", "lane_sums", "norm gradient",
        )
    ]  # fmt: skip
    assert all(line.endswith(" 0 wrong") for line in lines)


@pytest.mark.parametrize(
    ("connections", "positions", "steps", "seed"),
    [(1000, 20_000, 60, 7), (777, 800, 40, 2**40 + 1), (9001, 1 << 30, 10, 0), (1, 3, 40, 5)],
)
def test_rewiring_gives_the_bits_of_the_reference(
    connections: int, positions: int, steps: int, seed: int
) -> None:
    result = programs.run("rewire_steps", connections, positions, steps, seed)
    assert result.returncode == 0, result.stderr
    step = rewire_digest.reference(positions, seed)
    assert result.stdout.split() == rewire_digest.digests(connections, positions, steps, seed, step)


@pytest.mark.parametrize("seed", range(3))
def test_the_arena_keeps_blocks_apart_and_grows_at_its_end(seed: int) -> None:
    result = programs.run("check_arena", seed)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_part_of_a_job_is_done_once(threads: int) -> None:
    result = programs.run("check_pool", threads)
    assert result.returncode == 0, result.stderr


def test_an_operator_runs_without_onnx_runtime() -> None:
    inputs = {"value": np.ones(3, F), "momentum": np.ones(3, F), "gradient": np.array([1, 2, 3], F)}
    hyper = np.array([0.5, 0, 1, 0], F)
    made = programs.run_operator("DenseStep", inputs | {"hyper": hyper}, {"value": F, "momentum": F})
    assert made["momentum"].tolist() == [2, 3, 4]
    assert made["value"].tolist() == [0, -0.5, -1]
    assert inputs["value"].tolist() == [0, -0.5, -1]  # in place
    hyper[0] = np.nan
    with pytest.raises(RuntimeError, match=r"DenseStep: hyper .* has nan"):
        programs.run_operator("DenseStep", inputs | {"hyper": hyper}, {"value": F, "momentum": F})
