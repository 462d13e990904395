"""The numpy rewiring step by hand, and the operator RewireStep against it, to the bit."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers.operators import node, run, session
from scipy import stats

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.rewiring import rewire_step

F = np.float32


def hand_example(**changes: Any) -> dict[str, Any]:
    """Four of twelve weights; the second would change sign, the fourth becomes exactly zero."""
    example: dict[str, Any] = {
        "value": np.array([1.0, -0.25, 0.5, 0.125], F),
        "index": np.array([1, 4, 6, 9], np.int32),
        "momentum": np.array([0.5, 0.0, 0.0, 0.0], F),
        "gradient": np.array([0.25, -1.0, 0.0, 0.25], F),
        "size": 12,
        "seed": 1,
        "step": 0,
        "learning_rate": 0.5,
        "weight_decay": 0.0,
        "momentum_factor": 0.5,
        "noise": 0.0,
    }
    return example | changes


def test_hand_example() -> None:
    value, index, momentum = rewire_step(**hand_example())
    survivors = {1: (0.75, 0.5), 6: (0.5, 0.0)}  # v = 0.5·0.5 + 0.25; w = 1 − 0.5·v
    stream = random.IntegerStream(12, seed=1, step=0, purpose=random.BIRTH)
    born: list[int] = []
    while len(born) < 2:
        candidate = int(stream.take(1)[0])
        if candidate not in {1, 6, *born}:
            born.append(candidate)
    assert index.tolist() == sorted([1, 6, *born])
    for w, position, v in zip(value, index.tolist(), momentum, strict=True):
        if position in survivors:
            assert (w, v) == survivors[position]
        else:
            assert w == random.signs(position, seed=1)[0] * F(1e-12) and v == 0


def test_weight_decay_is_not_scaled_by_the_learning_rate() -> None:
    value, _, _ = rewire_step(
        **hand_example(gradient=np.zeros(4, F), momentum=np.zeros(4, F), weight_decay=0.25)
    )
    assert value.tolist() == [0.75, -0.1875, 0.375, 0.09375]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([1, 4, 4, 9], np.int32)}, "ascending"),
        ({"index": np.array([1, 4, 6, 12], np.int32)}, "ascending"),
        ({"index": np.array([-1, 4, 6, 9], np.int32)}, "ascending"),
        ({"value": np.array([1, 0, 1, 1], F)}, "has the weight 0"),
        ({"value": np.array([1, np.nan, 1, 1], F)}, "value has an element that is not finite"),
        ({"momentum": np.array([1, np.inf, 1, 1], F)}, "momentum has"),
        ({"gradient": np.array([1, -np.inf, 1, 1], F)}, "gradient has"),
        ({"gradient": np.zeros(3, F)}, "one length"),
        ({"size": 3}, "4 connections for 3 positions"),
        ({"noise": -1.0}, "noise"),
        ({"learning_rate": float("nan")}, "learning rate"),
        (
            {"gradient": np.array([3e38, 0, 0, 0], F), "learning_rate": 10.0},
            "not finite; nothing was changed",
        ),
    ],
)
def test_reference_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        rewire_step(**hand_example(**changes))


class Native:
    """The operator over bound buffers, as the runtime uses it."""

    def __init__(
        self,
        value: np.ndarray,
        index: np.ndarray,
        momentum: np.ndarray,
        size: int,
        threads: int = 2,
        **spans: Any,
    ) -> None:
        names = ["value", "index", "momentum", "gradient"]
        dtypes = dict(zip(names, (F, np.int32, F, F), strict=True))
        outputs = [name + ".out" for name in names]
        step = node("RewireStep", [*names, "hyper", "counter"], outputs, size=size, **spans)
        self.session = session(
            [step],
            dtypes | {"hyper": F, "counter": np.int64},
            {name + ".out": dtypes[name] for name in names[:3]},
            threads=threads,
        )

        def make(array: np.ndarray) -> onnxruntime.OrtValue:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())  # it would share the memory

        arrays = (value, index, momentum, np.zeros(len(momentum), F))
        self.buffers = {name: make(array) for name, array in zip(names, arrays, strict=True)}
        self.binding = self.session.io_binding()
        for name, buffer in self.buffers.items():
            self.binding.bind_ortvalue_input(name, buffer)
        for name in names[:3]:
            self.binding.bind_ortvalue_output(name + ".out", self.buffers[name])

    def step(self, gradient: np.ndarray, hyper: tuple[float, ...], seed: int, step: int) -> None:
        self.buffers["gradient"].update_inplace(gradient)
        self.binding.bind_cpu_input("hyper", np.array(hyper, F))
        self.binding.bind_cpu_input("counter", np.array([seed, step], np.int64))
        self.session.run_with_iobinding(self.binding)

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        value, index, momentum = (self.buffers[name].numpy() for name in ("value", "index", "momentum"))
        return value, index, momentum


def start(kappa: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    index = np.sort(generator.choice(size, kappa, replace=False)).astype(np.int32)
    value = generator.normal(0, 0.05, kappa).astype(F)
    value[value == 0] = F(1e-3)
    return value, index, np.zeros(kappa, F)


@pytest.mark.parametrize(
    ("kappa", "size", "hyper", "gradient_scale"),
    [
        (1000, 30_000, (0.1, 5e-4, 0.9, 1e-6), 0.02),  # as in the paper
        (5001, 30_000, (0.1, 5e-4, 0.9, 0.5), 0.1),  # noise that matters
        (777, 800, (0.1, 0.0, 0.9, 0.1), 1.0),  # nearly dense: most candidates are taken
        (400, 400, (0.1, 0.1, 0.5, 0.0), 1.0),  # dense: the dead are born again
        (9000, 100_000, (1.0, 0.9, 0.0, 0.0), 10.0),  # half of all connections die in every step
        (1, 5, (0.5, 0.0, 0.0, 1.0), 1.0),
        (4096, 1 << 30, (0.1, 5e-4, 0.9, 1e-3), 0.1),
    ],
)
def test_operator_equals_the_reference_to_the_bit(
    kappa: int, size: int, hyper: tuple[float, ...], gradient_scale: float
) -> None:
    seed = 0x1234_5678_9ABC
    reference = start(kappa, size, seed=0)
    native = Native(*reference, size=size)
    generator = np.random.default_rng(1)
    deaths = 0
    for step in range(25):
        gradient = generator.normal(0, gradient_scale, kappa).astype(F)
        before = reference[1]
        reference = rewire_step(
            *reference,
            gradient,
            size=size,
            seed=seed,
            step=step,
            **dict(zip(("learning_rate", "weight_decay", "momentum_factor", "noise"), hyper, strict=True)),
        )
        native.step(gradient, hyper, seed, step)
        deaths += int((before != reference[1]).any())
        for ours, expected in zip(native.state(), reference, strict=True):
            assert ours.tobytes() == expected.tobytes()
    assert deaths or kappa in (1, 400)


def skips(index: np.ndarray, spans: list[tuple[int, int]]) -> list[int]:
    """The attribute of the operator: each span with the connections before it that lie in none."""
    outside = np.ones(len(index), bool)
    for begin, end in spans:
        outside &= (index < begin) | (index >= end)
    return [n for begin, end in spans for n in (begin, end, int(outside[index < begin].sum()))]


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 30_000)],
        [(12_000, 30_000)],
        [(0, 9000)],
        [(100, 101), (2000, 9000), (9001, 9400), (29_000, 30_000)],
        [(10, 20), (20, 30)],  # nearly nothing in them
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_moves_within_its_spans_to_the_bit(spans: list[tuple[int, int]], threads: int) -> None:
    value, index, _ = start(9000, 30_000, seed=0)
    inside = np.zeros(9000, bool)
    for begin, end in spans:
        inside |= (index >= begin) & (index < end)
    trained = int(inside.sum())
    native = Native(
        value, index, np.zeros(trained, F), size=30_000, threads=threads, spans=skips(index, spans)
    )
    reference = value, index, np.zeros(trained, F)
    still = value[~inside], index[~inside]
    hyper = {"learning_rate": 0.1, "weight_decay": 5e-4, "momentum_factor": 0.9, "noise": 0.3}
    generator, died = np.random.default_rng(1), 0
    for step in range(12):
        gradient = generator.normal(0, 0.2, trained).astype(F)
        before = reference[1]
        reference = rewire_step(*reference, gradient, size=30_000, seed=9, step=step, spans=spans, **hyper)
        native.step(gradient, tuple(hyper.values()), 9, step)
        died += int((before != reference[1]).any())
        for ours, expected in zip(native.state(), reference, strict=True):
            assert ours.tobytes() == expected.tobytes()
    value, index, _ = native.state()
    inside = np.zeros(9000, bool)
    for begin, end in spans:
        inside |= (index >= begin) & (index < end)
    assert inside.sum() == trained and len(np.unique(index)) == 9000 and died
    assert value[~inside].tobytes() == still[0].tobytes() and index[~inside].tobytes() == still[1].tobytes()


def test_everything_as_one_span_is_everything() -> None:
    initial = start(5000, 40_000, seed=2)
    both = [Native(*initial, size=40_000), Native(*initial, size=40_000, spans=[0, 40_000, 0])]
    gradient = np.random.default_rng(4).normal(0, 0.2, 5000).astype(F)
    for native in both:
        native.step(gradient, (0.1, 5e-4, 0.9, 0.1), 7, 3)
    first, second = (b"".join(array.tobytes() for array in native.state()) for native in both)
    assert first == second


@pytest.mark.parametrize(
    ("spans", "trained", "message"),
    [
        ([0, 6], 2, "the attribute spans has 2 numbers, not three for each span"),
        ([6, 6, 2], 2, "the spans do not ascend within the 12 positions"),
        ([6, 13, 2], 2, "the spans do not ascend"),
        ([6, 9, 2, 8, 12, 2], 2, "the spans do not ascend"),
        ([6, 9, 2, 9, 12, 1], 2, "the spans do not ascend"),
        ([6, 12, 1], 2, "before position 6 lie 2 connections that are not trained, not 1"),
        ([6, 12, 2], 3, "there are 2 connections that are trained, and momentum for 3"),
    ],
)
def test_spans_that_cannot_be_right_are_refused(spans: list[int], trained: int, message: str) -> None:
    example = hand_example()
    arrays = {name: example[name] for name in ("value", "index")}
    arrays |= {"momentum": np.zeros(trained, F), "gradient": np.full(trained, 9, F)}
    arrays |= {"hyper": np.array([1, 0, 0.5, 0], F), "counter": np.array([1, 0], np.int64)}
    before = {name: array.copy() for name, array in arrays.items()}
    outputs = {"value": F, "index": np.int32, "momentum": F, "gradient": F}
    with pytest.raises(Exception, match=message):
        run("RewireStep", arrays, outputs, size=12, spans=spans)
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    initial = start(20_000, 200_000, seed=3)
    gradient = np.random.default_rng(4).normal(0, 0.1, 20_000).astype(F)
    states = []
    for threads in (1, 2, 3):
        native = Native(*initial, size=200_000, threads=threads)
        for step in range(3):
            native.step(gradient, (0.1, 5e-4, 0.9, 0.1), 7, step)
        states.append(b"".join(array.tobytes() for array in native.state()))
    assert states[0] == states[1] == states[2]


def test_buffers_stay_valid_for_a_thousand_steps() -> None:
    kappa, size = 200, 3000
    native = Native(*start(kappa, size, seed=5), size=size)
    generator = np.random.default_rng(6)
    for step in range(1000):
        native.step(generator.normal(0, 0.2, kappa).astype(F), (0.1, 5e-4, 0.9, 1e-6), 1, step)
        value, index, momentum = native.state()
        assert len(index) == kappa and index[0] >= 0 and index[-1] < size and (np.diff(index) > 0).all()
        assert (value != 0).all() and np.isfinite(value).all() and np.isfinite(momentum).all()


def test_births_are_uniform_over_the_dormant_positions() -> None:
    kappa, size = 40, 100
    index = np.arange(0, 80, 2, dtype=np.int32)
    value = np.ones(kappa, F)
    gradient = np.where(np.arange(kappa) < 20, 2.0, 0.0).astype(F)  # positions 0 … 38 die
    survivors = set(range(40, 80, 2))
    counts = np.zeros(size, np.int64)
    native = Native(value, index, np.zeros(kappa, F), size=size)
    for step in range(3000):
        for name, array in (("value", value), ("index", index), ("momentum", np.zeros(kappa, F))):
            native.buffers[name].update_inplace(array)
        native.step(gradient, (1.0, 0.0, 0.0, 0.0), 99, step)
        counts[native.state()[1]] += 1
    dormant = [position for position in range(size) if position not in survivors]
    assert all(counts[position] == 3000 for position in survivors)
    # 20 of 80 without replacement: the counts vary less than multinomial ones by the factor 1 − 19/79.
    statistic = ((counts[dormant] - 750.0) ** 2).sum() / 750.0 / (1 - 20 / 80)
    assert 1e-4 < stats.chi2(len(dormant) - 1).sf(statistic) < 1 - 1e-4


BAD = [
    ({"index": np.array([1, 4, 4, 9], np.int32)}, "index is not strictly ascending in \\[0, 12\\)"),
    ({"index": np.array([9, 6, 4, 1], np.int32)}, "index is not strictly ascending"),
    ({"index": np.array([1, 4, 6, 12], np.int32)}, "index is not strictly ascending"),
    ({"index": np.array([-1, 4, 6, 9], np.int32)}, "index is not strictly ascending"),
    ({"value": np.array([1, 0, 1, 1], F)}, "value has a 0"),
    ({"value": np.array([1, np.nan, 1, 1], F)}, "value has an element that is not finite"),
    ({"momentum": np.array([1, np.inf, 1, 1], F)}, "momentum has an element that is not finite"),
    ({"gradient": np.array([1, -np.inf, 1, 1], F)}, "gradient has an element that is not finite"),
    ({"gradient": np.array([3e38, 0, 0, 0], F)}, "not finite; nothing was changed"),
    ({"gradient": np.zeros(3, F)}, "not vectors of one length"),
    ({"value": np.ones((4, 1), F)}, "not vectors of one length"),
    ({"hyper": np.zeros(3, F)}, "hyper is \\[3\\]"),
    ({"hyper": np.array([0.1, 0, -0.5, 0], F)}, "hyper .* has -0.5"),
    ({"hyper": np.array([np.nan, 0, 0, 0], F)}, "hyper .* has nan"),
    ({"counter": np.array([1], np.int64)}, "counter is \\[1\\]"),
    ({"counter": np.array([1, -1], np.int64)}, "the step -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_operator_refuses_and_changes_nothing(changes: dict[str, np.ndarray], message: str) -> None:
    example = hand_example()
    arrays = {name: example[name] for name in ("value", "index", "momentum", "gradient")}
    arrays |= {"hyper": np.array([10, 0, 0.5, 0], F), "counter": np.array([1, 0], np.int64)}
    arrays |= changes
    before = {name: array.copy() for name, array in arrays.items()}
    outputs = {"value": F, "index": np.int32, "momentum": F, "gradient": F}
    with pytest.raises(Exception, match="RewireStep: .*" + message):
        run("RewireStep", arrays, outputs, size=12)
    for name, array in arrays.items():
        assert array.tobytes() == before[name].tobytes()


def test_a_failed_step_leaves_the_bound_buffers_alone() -> None:
    initial = start(10_000, 50_000, seed=8)
    native = Native(*initial, size=50_000)
    gradient = np.ones(10_000, F)
    gradient[9_999] = np.nan
    with pytest.raises(Exception, match="gradient has an element that is not finite"):
        native.step(gradient, (0.1, 5e-4, 0.9, 1.0), 7, 0)
    for ours, expected in zip(native.state(), initial, strict=True):
        assert ours.tobytes() == expected.tobytes()


def test_size_must_be_positive() -> None:
    with pytest.raises(Exception, match="attribute size is 0"):
        Native(*start(3, 5, seed=0), size=0)
