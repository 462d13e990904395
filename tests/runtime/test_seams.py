"""What a Trainer lets others see of its work: the runs of its graphs, the connections, the buffers."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.engine import GraphRun

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.state import STATE_NAMES
from edge_bcs.data import ArrayDataset

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
Batch = tuple[Array, Array]


def digest(trainer: Trainer) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in trainer.state().values())).hexdigest()


def test_every_run_of_a_graph_is_told_of(tiny_artifact: Make, batch: Batch) -> None:
    """Ten images in micro-batches of four: the last one has two, whose empty places do not count."""
    runs: list[GraphRun] = []
    with Trainer(tiny_artifact(micro_batch=4, attack_steps=2)) as trainer:
        trainer.step(*batch)
        trainer.on_run = runs.append
        trainer.step(*batch)
        expected = [("attack", n) if again < 2 else ("training", n) for n in (4, 4, 2) for again in range(3)]
        assert [(run.graph, run.images) for run in runs] == [*expected, ("optimizer", 0)]
        assert all(run.engine == "onnxruntime" and 0 < run.seconds < 10 for run in runs)
        runs.clear()
        trainer.predict(batch[0][:5])
        assert [(run.graph, run.images) for run in runs] == [("eval", 4), ("eval", 1)]
        trainer.on_run = None
        trainer.step(*batch)
        assert len(runs) == 2


@pytest.mark.parametrize(("graph", "done"), [("attack", 0), ("training", 0), ("optimizer", 1)])
def test_what_a_hook_raises_leaves_whole_steps(
    tiny_artifact: Make, batch: Batch, graph: str, done: int
) -> None:
    """A step that is taken back, or one that is counted; training goes on as if nothing had been."""
    path = tiny_artifact(batch_norm="batch")
    with Trainer(path) as trainer:
        states = [digest(trainer)]
        for _ in range(2):
            trainer.step(*batch)
            states.append(digest(trainer))

    def hook(run: GraphRun) -> None:
        if run.graph == graph:
            raise InterruptedError

    handler = signal.getsignal(signal.SIGINT)
    with Trainer(path) as trainer:
        trainer.on_run = hook
        with pytest.raises(InterruptedError):
            trainer.step(*batch)
        assert trainer.steps == done and digest(trainer) == states[done]
        assert signal.getsignal(signal.SIGINT) is handler
        trainer.on_run = None
        trainer.step(*batch)
        assert digest(trainer) == states[done + 1]


def test_connections_are_counted_layer_by_layer(tiny_artifact: Make, batch: Batch) -> None:
    """Against the positions before and after; with large steps many die and are born."""
    with Trainer(tiny_artifact()) as trainer:
        layers, kappa = trainer.artifact.layers, trainer.artifact.kappa

        def split(positions: Array) -> dict[str, int]:
            return {
                layer.name: int(((layer.offset <= positions) & (positions < layer.span.stop)).sum())
                for layer in layers
            }

        first = trainer.connections()
        assert first.active == split(trainer.state()["coo.index"]) and sum(first.active.values()) == kappa
        assert {*first.born.values(), *first.died.values()} == {0}
        trainer.learning_rate = 1.0
        total = 0
        for _ in range(3):
            before = trainer.state()["coo.index"]
            trainer.step(*batch)
            after, found = trainer.state()["coo.index"], trainer.connections()
            assert found.active == split(after)
            # A position may be drawn in the step in which its connection died: neither set shows it.
            born, died = split(np.setdiff1d(after, before)), split(np.setdiff1d(before, after))
            again = {name: found.born[name] - born[name] for name in born}
            assert again == {name: found.died[name] - died[name] for name in died}
            assert all(0 <= number < 20 for number in again.values())
            assert sum(found.born.values()) == sum(found.died.values())
            total += sum(born.values())
        assert total > 10 and list(found.active) == [layer.name for layer in layers]
        refused = trainer.connections()
        with pytest.raises(EdgeBcsError):
            trainer.step(np.full_like(batch[0], np.nan), batch[1])
        assert trainer.connections() == refused


def test_images_may_be_read_while_a_step_is_under_way(tiny_artifact: Make, batch: Batch) -> None:
    x, y = batch
    asked: list[tuple[int, int]] = []

    def read(first: int, end: int) -> Batch:
        asked.append((first, end))
        return x[first:end], y[first:end]

    path = tiny_artifact(micro_batch=4)
    with Trainer(path) as trainer:
        expected = trainer.step(x, y), digest(trainer)
    with Trainer(path) as trainer, HeldSignals() as signals:
        assert (trainer.step_reading(signals, read, len(x)), digest(trainer)) == expected
        assert asked == [(0, 4), (4, 8), (8, 10)]
        bad = np.array(x)
        bad[6] = 2
        with pytest.raises(EdgeBcsError, match="the sixth"), HeldSignals() as inner:
            bad[6, 0, 0, 0] = np.nan
            trainer.step_reading(
                inner,
                lambda *place: (bad[slice(*place)], y[slice(*place)]),
                len(x),
                {6: "the sixth"}.__getitem__,
            )
        assert trainer.steps == 1 and digest(trainer) == expected[1]


def test_buffers_are_the_memory_itself(tiny_artifact: Make, batch: Batch) -> None:
    with Trainer(tiny_artifact()) as trainer:
        buffers = trainer.buffers
        assert set(STATE_NAMES) <= buffers.keys()
        before = trainer.logits(batch[0])
        buffers["dense.value"][...] = 0
        assert not trainer.state()["dense.value"].any()
        assert not np.array_equal(trainer.logits(batch[0]), before)
        with pytest.raises(TypeError):
            buffers["dense.value"] = np.zeros(3)  # type: ignore[index]


def test_a_block_between_steps(tiny_artifact: Make, batch: Batch) -> None:
    """It may train inside; a step does not let it in."""
    told: list[str] = []

    class Asks(ArrayDataset):
        def read(self, positions: Array, **options: Any) -> Batch:
            with pytest.raises(EdgeBcsError, match="step 2 is under way") as error, trainer.between_steps():
                pass
            told.append(str(error.value))
            return super().read(positions, **options)

    with Trainer(tiny_artifact()) as trainer:
        with trainer.between_steps():
            trainer.step(*batch)
        trainer.fit(Asks(*batch), steps=1, batch_size=10, progress=False)
        assert trainer.steps == 2 and told
