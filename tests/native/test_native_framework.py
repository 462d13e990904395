"""The framework itself: in-place chains, optional inputs, error messages, and the byte budget."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from helpers.operators import budget_library, node, run, session

CHAIN = [
    node("ResetGradient", ["g", "reset"], ["g1"]),
    node("After", ["g1", "x"], ["g2"]),
    node("After", ["g2", "x"], ["g3"]),
    node("GradientReady", ["g3"], ["ready"]),
]


def bound(
    chain_end: str | None,
) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding, onnxruntime.OrtValue]:
    """A session of the chain over one bound buffer; `chain_end` is also a graph output if it is named."""
    outputs = {"ready": np.bool_} | ({chain_end: np.float32} if chain_end else {})
    opened = session(CHAIN, {"g": np.float32, "x": np.float32, "reset": np.bool_}, outputs)
    binding = opened.io_binding()
    buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(1, 6, dtype=np.float32))
    binding.bind_ortvalue_input("g", buffer)
    binding.bind_cpu_input("x", np.ones(2, np.float32))
    binding.bind_output("ready")
    if chain_end:
        binding.bind_ortvalue_output(chain_end, buffer)
    return opened, binding, buffer


@pytest.mark.parametrize("chain_end", [None, "g3"])
def test_a_chain_changes_the_bound_buffer_itself(chain_end: str | None) -> None:
    opened, binding, buffer = bound(chain_end)
    binding.bind_cpu_input("reset", np.array([False]))
    opened.run_with_iobinding(binding)
    assert buffer.numpy().tolist() == [1, 2, 3, 4, 5]
    binding.bind_cpu_input("reset", np.array([True]))
    opened.run_with_iobinding(binding)
    # Nothing but the chain has the buffer, so zeros here mean that the operators worked on its very memory.
    assert buffer.numpy().tolist() == [0, 0, 0, 0, 0]
    assert binding.copy_outputs_to_cpu()[0].tolist() == [True]


def test_a_chain_allocates_nothing() -> None:
    budget = budget_library()
    opened = session(
        CHAIN,
        {"g": np.float32, "x": np.float32, "reset": np.bool_},
        {"ready": np.bool_},
        environment_allocator=True,
    )
    if not budget.edge_bcs_budget_exact():
        pytest.skip("this ONNX Runtime does not take the library's allocator")
    binding = opened.io_binding()
    big = np.ones(1 << 20, np.float32)
    binding.bind_cpu_input("g", big)
    binding.bind_cpu_input("x", np.ones(2, np.float32))
    binding.bind_cpu_input("reset", np.array([True]))
    ready = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([False]))
    binding.bind_ortvalue_output("ready", ready)
    assert budget.edge_bcs_budget_begin(-1) == 0
    try:
        before = budget.edge_bcs_budget_current()
        opened.run_with_iobinding(binding)
        assert budget.edge_bcs_budget_peak() - before == 0
    finally:
        budget.edge_bcs_budget_end()
    assert not big.any()


def test_a_distinct_output_gets_a_copy_and_the_input_stays() -> None:
    given = np.arange(4, dtype=np.float32)
    result = run("After", {"x": given, "token": np.zeros(1, np.float32)}, {"x": np.float32})
    assert result["x"].tolist() == [0, 1, 2, 3]
    assert given.tolist() == [0, 1, 2, 3]


def test_wrong_input_becomes_one_sentence() -> None:
    with pytest.raises(Exception, match="ResetGradient: lazy_reset_grad has 2 elements, not 1"):
        run(
            "ResetGradient",
            {"buffer": np.ones(3, np.float32), "lazy_reset_grad": np.array([True, False])},
            {"buffer": np.float32},
        )


class TestBudget:
    """Three live tensors of known size: x -> a -> b -> c with a needed at the end."""

    N = 1 << 18  # floats; 1 MiB

    def opened(self) -> onnxruntime.InferenceSession:
        from onnx import helper

        nodes = [
            helper.make_node("Sin", ["x"], ["a"]),
            helper.make_node("Cos", ["a"], ["b"]),
            helper.make_node("Pow", ["a", "b"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["y"], keepdims=0),
        ]
        return session(nodes, {"x": np.float32}, {"y": np.float32}, environment_allocator=True)

    def test_count_is_exact(self) -> None:
        opened = self.opened()
        budget = budget_library()
        if not budget.edge_bcs_budget_exact():
            pytest.skip("this ONNX Runtime does not take the library's allocator")
        x = np.ones(self.N, np.float32)
        opened.run(None, {"x": x})
        assert budget.edge_bcs_budget_begin(-1) == 0
        try:
            before = budget.edge_bcs_budget_current()
            opened.run(None, {"x": x})
            # a and b live while c is made (Pow may reuse one of them: then two tensors are live, else three).
            extra = budget.edge_bcs_budget_peak() - before
            assert extra in {2 * 4 * self.N, 3 * 4 * self.N, 2 * 4 * self.N + 4, 3 * 4 * self.N + 4}
            # `current` may exceed `before` only by the tensors that Python still holds.
            assert budget.edge_bcs_budget_current() - before <= 4
        finally:
            budget.edge_bcs_budget_end()

    def test_placed_is_counted_with_headers_and_holes(self) -> None:
        opened = self.opened()
        budget = budget_library()
        if not budget.edge_bcs_budget_exact():
            pytest.skip("this ONNX Runtime does not take the library's allocator")
        x = np.ones(self.N, np.float32)
        assert budget.edge_bcs_budget_begin(-1) == 0
        try:
            before, current = budget.edge_bcs_budget_placed(), budget.edge_bcs_budget_current()
            assert before >= current
            assert budget.edge_bcs_budget_reserve(1000) == 0
            assert budget.edge_bcs_budget_placed() == before + 1000
            opened.run(None, {"x": x})
            counted = budget.edge_bcs_budget_peak() - current
            extra = budget.edge_bcs_budget_placed_peak() - before - counted
            # A header of 64 bytes a tensor, and less than a page at the end.
            assert 2 * 64 <= extra < 4 * 64 + resource.getpagesize()
            # What is free now is kept for the next run, and counts on.
            assert budget.edge_bcs_budget_placed() > budget.edge_bcs_budget_current() + 4 * self.N
            budget.edge_bcs_budget_reset_peak()
            assert budget.edge_bcs_budget_placed_peak() == budget.edge_bcs_budget_placed()
        finally:
            budget.edge_bcs_budget_end()
        assert budget.edge_bcs_budget_placed() <= before  # and goes back with the budget

    def test_over_the_cap_fails_cleanly_and_the_session_goes_on(self) -> None:
        opened = self.opened()
        budget = budget_library()
        if not budget.edge_bcs_budget_exact():
            pytest.skip("this ONNX Runtime does not take the library's allocator")
        x = np.linspace(0, 1, self.N, dtype=np.float32)
        expected = opened.run(None, {"x": x})[0]
        base = budget.edge_bcs_budget_current()
        assert budget.edge_bcs_budget_begin(base + 4 * self.N + 100) == 0
        try:
            asked = 4 * self.N
            message = (
                f"edge-bcs: memory budget exceeded: asked for {asked} bytes with {base + asked} of "
                f"{base + asked + 100} bytes in use"
            )
            with pytest.raises(Exception, match=message):
                opened.run(None, {"x": x})
            numbers = [ctypes.c_int64() for _ in range(3)]
            budget.edge_bcs_last_refusal(*(ctypes.byref(number) for number in numbers))
            assert [number.value for number in numbers] == [asked, base + asked, base + asked + 100]
            assert budget.edge_bcs_budget_current() == base
        finally:
            budget.edge_bcs_budget_end()
        assert opened.run(None, {"x": x})[0] == expected

    def test_the_peak_itself_is_enough_and_one_byte_less_is_not(self) -> None:
        opened = self.opened()
        budget = budget_library()
        if not budget.edge_bcs_budget_exact():
            pytest.skip("this ONNX Runtime does not take the library's allocator")
        x = np.ones(self.N, np.float32)
        assert budget.edge_bcs_budget_begin(-1) == 0
        opened.run(None, {"x": x})
        peak = budget.edge_bcs_budget_peak()
        budget.edge_bcs_budget_end()
        for cap, fits in ((peak, True), (peak - 1, False)):
            assert budget.edge_bcs_budget_begin(cap) == 0
            try:
                if fits:
                    opened.run(None, {"x": x})
                else:
                    with pytest.raises(Exception, match="memory budget exceeded"):
                        opened.run(None, {"x": x})
            finally:
                budget.edge_bcs_budget_end()

    def test_reserve_release_and_a_second_owner(self) -> None:
        budget = budget_library()
        base = budget.edge_bcs_budget_current()
        assert budget.edge_bcs_budget_begin(base + 1000) == 0
        try:
            assert budget.edge_bcs_budget_begin(-1) == -1
            assert budget.edge_bcs_budget_reserve(600) == 0
            assert budget.edge_bcs_budget_current() == base + 600
            assert budget.edge_bcs_budget_reserve(401) == -1
            assert budget.edge_bcs_budget_reserve(400) == 0
            assert budget.edge_bcs_budget_peak() == base + 1000
            budget.edge_bcs_budget_release(700)
            assert budget.edge_bcs_budget_current() == base + 300
            budget.edge_bcs_budget_reset_peak()
            assert budget.edge_bcs_budget_peak() == base + 300
        finally:
            budget.edge_bcs_budget_end()
        assert budget.edge_bcs_budget_current() == base


def test_the_instruction_set_has_a_name() -> None:
    assert budget_library().edge_bcs_isa() in {b"scalar", b"avx2", b"avx512", b"neon"}


def test_the_library_stays_when_its_last_session_goes() -> None:
    """ONNX Runtime closes the library with the last options that used it, but keeps its allocator: two rounds
    in a process that holds the library in no other way."""
    code = (
        "import gc, onnxruntime\n"
        "from edge_bcs.runtime.library import library_path\n"
        "for _ in range(2):\n"
        "    options = onnxruntime.SessionOptions()\n"
        "    options.register_custom_ops_library(str(library_path()))\n"
        "    del options\n"
        "    gc.collect()\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert library_path().name in maps, 'unloaded'\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    subprocess.run([sys.executable, "-c", code], check=True)
