"""Steps of the rewiring on inputs that are fixed to the bit, and digests of the state after each.

Numpy's own side of tests/native/rewire_steps.cpp; also the inputs for ONNX Runtime on a board (tests/arm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_bcs.core import random
from edge_bcs.method.rewiring import rewire_step

Array = np.ndarray[Any, Any]
State = tuple[Array, Array, Array]
Step = Callable[[State, Array, int], State]
"""(value, index, momentum), gradient, number of the step -> the state after it."""

PURPOSE = 200  # no operator draws for it
HYPER: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 1e-3, "momentum_factor": 0.9, "noise": 0.25}


def uniform(count: int, seed: int, step: int) -> Array:
    """f32[count] in [-1, 1), every number exact."""
    words = random.words(count, seed=seed, step=step, purpose=PURPOSE)
    return (words >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)


def digest(state: State) -> str:
    """The 64-bit FNV-1a hash of the state's bytes."""
    total = 0xCBF29CE484222325
    for array in state:
        for byte in array.tobytes():
            total = (total ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{total:016x}"


def reference(size: int, seed: int) -> Step:
    """The numpy reference's step for a network of ``size`` weights."""

    def step(state: State, gradient: Array, number: int) -> State:
        return rewire_step(*state, gradient, size=size, seed=seed, step=number, **HYPER)

    return step


def digests(connections: int, positions: int, steps: int, seed: int, step: Step) -> list[str]:
    """The digests after steps 1, 2, …, ``steps``."""
    value = uniform(connections, seed, 0)
    value[value == 0] = 0.5
    index = (np.arange(connections, dtype=np.int64) * positions // connections).astype(np.int32)
    state = value, index, np.zeros(connections, np.float32)
    found = []
    for number in range(1, steps + 1):
        state = step(state, uniform(connections, seed, number), number)
        found.append(digest(state))
    return found
