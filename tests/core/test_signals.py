"""Signals at any moment: they wait where they must, none is lost, handlers come back, and no step is torn."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.engine import GraphRun

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data import ArrayDataset, open_data

if sys.platform == "win32":
    pytest.skip("signals and timers here are POSIX", allow_module_level=True)

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]


class TickError(Exception):
    """What the handler of the timer raises, as that of Ctrl-C raises KeyboardInterrupt."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers of this test alone; the timer's raises."""
    numbers = (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}

    def tick(number: int, frame: object) -> None:
        raise TickError

    signal.signal(signal.SIGALRM, tick)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def set_off(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


# Holding signals


def test_a_signal_waits_and_then_comes() -> None:
    before, done = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), HeldSignals() as signals:
        signals.hold()
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is before


def test_before_they_are_held_signals_come_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), HeldSignals():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waited")


def test_no_signal_is_lost_and_their_order_is_kept() -> None:
    """Although the handlers of some raise; what they raise is told, the last first."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        assert frame is not None
        seen.append(number)
        if number == signal.SIGUSR2:
            raise TickError(len(seen))

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)
    sent = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2]
    with pytest.raises(TickError, match="5") as caught, HeldSignals() as signals:
        signals.hold()
        for number in sent:
            signal.raise_signal(number)
    assert seen == [number for number in sent if number != signal.SIGINT]
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert str(caught.value.__context__.__context__) == "2"
    assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGUSR2) is note


def test_what_fails_inside_is_told_too() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, HeldSignals() as signals:
        signals.hold()
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")
    assert str(caught.value.__context__) == "inside"
    with pytest.raises(ValueError, match="inside"), HeldSignals() as signals:
        signals.hold()
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_handlers_in_python_are_touched() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    library = ctypes.CDLL(None)
    library.signal.restype, library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    foreign = ctypes.cast(library.abs, ctypes.c_void_p).value
    library.signal(signal.SIGUSR2, foreign)
    try:
        with HeldSignals() as signals:
            signals.hold()
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            signal.raise_signal(signal.SIGUSR1)
    finally:
        assert library.signal(signal.SIGUSR2, signal.SIG_DFL) == foreign


def test_blocks_inside_blocks() -> None:
    with pytest.raises(KeyboardInterrupt), HeldSignals() as outer:
        outer.hold()
        with HeldSignals() as inner:
            inner.hold()
            signal.raise_signal(signal.SIGINT)
        outer.hold()
        inside = True
    assert inside and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_is_set_inside_stays() -> None:
    with HeldSignals() as signals:
        signals.hold()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_nothing_is_done() -> None:
    seen: list[object] = []

    def work() -> None:
        with HeldSignals() as signals:
            signals.hold()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_signals_at_any_moment_of_holding_and_letting_go() -> None:
    """What is between is never interrupted, and the handlers are back each time, however it went."""
    chance, alarm = random.Random(0), signal.getsignal(signal.SIGALRM)
    begun = done = 0
    for _ in range(500):
        try:
            set_off(chance.uniform(0, 60e-6))
            with HeldSignals() as signals:
                signals.hold()
                begun += 1
                done += 1
            while True:
                pass
        except TickError:
            pass
        assert begun == done
        assert signal.getsignal(signal.SIGALRM) is alarm
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert begun > 50


# Steps of the Trainer


def digest(state: dict[str, Array]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in state.values())).hexdigest()


def batches(count: int) -> list[tuple[Array, Array]]:
    chance = np.random.default_rng(0)
    return [(chance.random((6, 1, 8, 8), np.float32), chance.integers(0, 10, 6)) for _ in range(count)]


@pytest.mark.parametrize("objective", ["at", "natural"])
def test_a_signal_never_tears_a_step(tiny_artifact: Make, objective: str) -> None:
    """Interrupted at 300 random moments, the state is that of an undisturbed training at that step."""
    path = tiny_artifact(objective=objective, batch_norm="batch", attack_steps=1)
    given = batches(120)
    with Trainer(path, threads=1) as trainer:
        expected, seconds = [digest(trainer.state())], 0.0
        for batch in given:
            began = time.perf_counter()
            trainer.step(*batch)
            seconds += time.perf_counter() - began
            expected.append(digest(trainer.state()))
    chance = random.Random(0)
    steps: list[int] = []
    while len(steps) < 300:
        with Trainer(path, threads=1) as trainer:
            while len(steps) < 300 and trainer.steps < len(given):
                try:
                    set_off(chance.uniform(0, 1.5 * seconds / len(given)))
                    while trainer.steps < len(given):
                        trainer.step(*given[trainer.steps])
                    while True:
                        pass
                except TickError:
                    assert digest(trainer.state()) == expected[trainer.steps]
                    steps.append(trainer.steps)
    assert len(set(steps)) > 10


def test_a_training_that_is_interrupted_again_and_again_ends_the_same(
    tiny_artifact: Make, tmp_path: Path
) -> None:
    """Saved by hand where it was interrupted, with a batch in each epoch that is skipped: the same state, the
    same count of what was skipped, and a line of metrics for every step."""
    path, run, metrics = tiny_artifact(batch_norm="batch"), tmp_path / "run", tmp_path / "metrics.jsonl"
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(40))
    x[7, 0, 3, 3] = np.nan
    data = ArrayDataset(x, y)
    options: dict[str, Any] = {"steps": 30, "batch_size": 4, "augment": False, "progress": False}
    with Trainer(path, threads=1) as trainer:
        whole = trainer.fit(data, on_nan="skip", **options)
        expected = digest(trainer.state())
        trainer.save(run)
    chance, interrupted = random.Random(1), 0
    trainer = Trainer(path, threads=1)
    while True:
        try:
            # Later and later: on a machine that got slower the first ones may all come before a step.
            set_off(chance.uniform(0, (4 + interrupted / 8) * whole["seconds"] / 30))
            result = trainer.fit(data, on_nan="skip", metrics=metrics, **options)
            signal.setitimer(signal.ITIMER_REAL, 0)
            break
        except TickError:
            interrupted += 1
        trainer.save(tmp_path / "cut")
        trainer.close()
        trainer = Trainer.resume(tmp_path / "cut", threads=1)
    with trainer:
        assert digest(trainer.state()) == expected
    assert interrupted > 3 and result["skipped"] == whole["skipped"] == 3 and result["step"] == 30
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert sum("skipped" in line for line in lines) == 3


def at_graph(trainer: Trainer, graph: str, do: Callable[[], object]) -> None:
    """Do something when a graph has run, once."""
    left = [do]

    def ran(run: GraphRun) -> None:
        if run.graph == graph and left:
            left.pop()()

    trainer.on_run = ran


def test_two_signals_during_the_update(tiny_artifact: Make) -> None:
    """The step is done and counted, both handlers run, and both are there again."""
    given, seen = batches(2), []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    path = tiny_artifact(batch_norm="batch")
    with Trainer(path) as trainer:
        trainer.step(*given[0])
        expected = digest(trainer.state())

    def send() -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)

    with Trainer(path) as trainer:
        at_graph(trainer, "optimizer", send)
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.step(*given[0])
        assert trainer.steps == 1 and digest(trainer.state()) == expected
        assert isinstance(caught.value.__context__, KeyboardInterrupt) and seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_update_that_is_refused_while_a_signal_waits(tiny_artifact: Make) -> None:
    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        before = digest(trainer.state())

        def refuse() -> None:
            signal.raise_signal(signal.SIGINT)
            raise NotFiniteError("no")

        trainer.run_optimizer_only = refuse  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.step(*batches(1)[0])
        assert trainer.steps == 0 and digest(trainer.state()) == before


@pytest.mark.parametrize("graph", ["attack", "training"])
def test_a_handler_that_uses_the_trainer_amid_a_step(tiny_artifact: Make, tmp_path: Path, graph: str) -> None:
    """It may look at the state and save it, which are those before the step; what would spoil the step is
    refused; and the step ends as if nothing had been."""
    path, given = tiny_artifact(batch_norm="batch"), batches(2)
    with Trainer(path) as trainer:
        trainer.step(*given[0])
        first = digest(trainer.state())
        trainer.step(*given[1])
        second = digest(trainer.state())
    refused = []

    def use(number: int, frame: object) -> None:
        assert digest(trainer.state()) == first
        trainer.save(tmp_path / "run")
        for call in (
            lambda: trainer.step(*given[0]),
            lambda: trainer.predict(given[0][0]),
            lambda: trainer.evaluate(ArrayDataset(*given[0]), 0),
            lambda: trainer.fit(ArrayDataset(*given[0]), steps=1, progress=False),
        ):
            with pytest.raises(EdgeBcsError, match="step 2 is under way: call this between steps"):
                call()
            refused.append(call)

    signal.signal(signal.SIGUSR1, use)
    with Trainer(path) as trainer:
        trainer.step(*given[0])
        at_graph(trainer, graph, lambda: signal.raise_signal(signal.SIGUSR1))
        trainer.step(*given[1])
        assert len(refused) == 4 and trainer.steps == 2 and digest(trainer.state()) == second
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.steps == 1 and digest(trainer.state()) == first


def test_images_may_be_read_with_the_trainers_help(tiny_artifact: Make) -> None:
    """Such as labels that it predicts itself."""

    class Predicted(ArrayDataset):
        def read(self, positions: Array, **options: Any) -> tuple[Array, Array]:
            x, _ = super().read(positions, **options)
            return x, trainer.predict(x)

    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        data = Predicted(*batches(1)[0])
        assert trainer.fit(data, steps=2, batch_size=6, augment=False, progress=False)["step"] == 2


# Steps of the host


def test_a_signal_never_tears_a_step_of_the_host() -> None:
    torch = pytest.importorskip("torch")
    from helpers.artifacts import tiny_network

    from edge_bcs import Attack
    from edge_bcs.core.objectives import PLAIN
    from edge_bcs.method import connectivity, step

    given = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches(25)]
    attack = Attack(steps=1)

    def train(sparse: Any, number: int) -> None:
        step.training_step(sparse, *given[number], PLAIN, step=number, attack=attack)

    def fresh() -> Any:
        torch.manual_seed(0)
        return connectivity.sparsify(tiny_network(), 0.5, seed=0, distribution="uniform")

    sparse = fresh()
    expected, began = [digest(sparse.state())], time.perf_counter()
    for number in range(len(given)):
        train(sparse, number)
        expected.append(digest(sparse.state()))
    seconds = (time.perf_counter() - began) / len(given)
    chance = random.Random(0)
    steps: list[int] = []
    while len(steps) < 60:
        sparse = fresh()
        while len(steps) < 60 and sparse.step < len(given):
            try:
                set_off(chance.uniform(0, 1.5 * seconds))
                while sparse.step < len(given):
                    train(sparse, sparse.step)
                while True:
                    pass
            except TickError:
                assert digest(sparse.state()) == expected[sparse.step]
                steps.append(sparse.step)
    assert len(set(steps)) > 5


@pytest.mark.parametrize(("engine", "count"), [("torch", 8), ("sparse", 6)])
def test_a_training_of_the_host_is_left_with_whole_steps(engine: str, count: int) -> None:
    """Interrupted at random moments, `train` leaves the network with the state of the steps that it says."""
    torch = pytest.importorskip("torch")
    from helpers.artifacts import tiny_network

    from edge_bcs import Attack, Compute, Feed
    from edge_bcs.method import connectivity
    from edge_bcs.training import backends
    from edge_bcs.training import loop as training

    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(32))

    def fresh() -> Any:
        torch.manual_seed(0)
        return connectivity.sparsify(tiny_network(), 0.5, seed=0, distribution="uniform")

    options: dict[str, Any] = {"objective": "at", "attack": Attack(steps=1), "epochs": 4, "batch_size": 8}
    options |= {"feed": Feed(validation=0.0), "compute": Compute(engine, device="cpu", threads=1)}
    options |= {"progress": False}
    kind: Any = {"torch": backends.TorchBackend, "sparse": backends.CompiledBackend}[engine]
    real = kind.step
    expected: dict[int, str] = {}

    began: list[float] = []

    def remembered(self: Any, batch: Any, hyper: Any, step: int, signals: HeldSignals) -> Any:
        began.append(time.perf_counter())
        numbers = real(self, batch, hyper, step, signals)
        self.store()
        expected[step + 1] = digest(self.sparse.state())
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", remembered)
        sparse = fresh()
        expected[0] = digest(sparse.state())
        training.train(sparse, (x, y), **options)
    chance, steps = random.Random(2), set()

    # Most of the training is its first evaluation: moments drawn from all of it would nearly all lie there.
    def timed(moment: int) -> Any:
        def step(self: Any, batch: Any, hyper: Any, step: int, signals: HeldSignals) -> Any:
            if step == moment:
                set_off(chance.uniform(0, began[step + 1] - began[step]))
            return real(self, batch, hyper, step, signals)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for moment in chance.sample(range(len(began) - 1), count):
            patch.setattr(kind, "step", timed(moment))
            sparse = fresh()
            try:
                training.train(sparse, (x, y), **options)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TickError:
                steps.add(sparse.step)
                assert digest(sparse.state()) == expected[sparse.step]
    assert len(steps) > 1
