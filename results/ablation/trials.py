"""What was tried beside the options of `edge-bcs train`, and is none: patches of the sparse engine's steps.

    python results/ablation/trials.py results/ablation --data cifar10 --out out --candidates averaging

"distilled" has a teacher: TEACHER=FOLDER in the environment, a checkpoint of a dense robust network.

The other arguments are those of `edge_bcs.bench.ablation`, whose candidates are there, too. A training that
is cut off is not resumed to the bit: what a patch remembers is not saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_bcs.bench import ablation, commands
from edge_bcs.core.random import signs
from edge_bcs.core.state import NEWBORN
from edge_bcs.training.backends import CompiledBackend

Array = np.ndarray[Any, Any]
_WORD = "--trial="
_DECAY, _FROM = 0.999, 0.5
_WINDOW = 100
_SMOOTHING = 0.1


def averaging() -> None:
    """Exponential mean of all weights and running statistics, over a thousand steps, from half of the
    training on; it is evaluated and kept. A connection's mean begins where the connection does."""
    step, evaluate, store = CompiledBackend.step, CompiledBackend.evaluate, CompiledBackend.store

    def fill(backend: Any, state: dict[str, Array]) -> None:
        def take(arrays: dict[str, Array]) -> None:
            for name, array in state.items():
                arrays[name][...] = array

        backend._trainer.replace_state(take)

    def stepping(self: Any, batch: Any, hyper: Any, number: int, signals: Any) -> Any:
        numbers = step(self, batch, hyper, number, signals)
        total = self.plan.schedule.epochs * ((self.plan.samples * 9 // 10) // self.plan.batch_size)
        if number + 1 >= _FROM * total:
            state = {name: array.copy() for name, array in self._trainer.state().items()}
            mean = getattr(self, "mean", None)
            self.mean = state if mean is None else _moved(mean, state)
        return numbers

    def _moved(mean: dict[str, Array], state: dict[str, Array]) -> dict[str, Array]:
        moved = dict(state)
        for name in ("dense.value", "batchnorm.mean", "batchnorm.variance"):
            moved[name] = (_DECAY * mean[name] + (1 - _DECAY) * state[name]).astype(np.float32)
        place = np.searchsorted(mean["coo.index"], state["coo.index"]).clip(max=len(mean["coo.index"]) - 1)
        value = state["coo.value"]
        stays = (mean["coo.index"][place] == state["coo.index"]) & (mean["coo.value"][place] * value > 0)
        averaged = _DECAY * mean["coo.value"][place] + (1 - _DECAY) * value
        moved["coo.value"] = np.where(stays, averaged, value).astype(np.float32)
        return moved

    def evaluating(self: Any, data: Any) -> Any:
        if getattr(self, "mean", None) is None:
            return evaluate(self, data)
        state = {name: array.copy() for name, array in self._trainer.state().items()}
        fill(self, self.mean)
        try:
            return evaluate(self, data)
        finally:
            fill(self, state)

    def storing(self: Any) -> None:
        store(self)
        if getattr(self, "mean", None) is not None:
            self.sparse.load_state(self._artifact.trained.whole(self.mean))

    CompiledBackend.step, CompiledBackend.evaluate = stepping, evaluating  # type: ignore[method-assign]
    CompiledBackend.store = storing  # type: ignore[method-assign]


def survival_window() -> None:
    """A connection that dies within a hundred steps of its birth is newborn again where it is; as many of
    those that were born instead are not."""
    step = CompiledBackend.step

    def stepping(self: Any, batch: Any, hyper: Any, number: int, signals: Any) -> Any:
        before = self._trainer.state()["coo.index"].copy()
        if not hasattr(self, "born"):
            self.born = np.full(len(before), -_WINDOW - 1)
        numbers = step(self, batch, hyper, number, signals)
        after = self._trainer.state()["coo.index"].copy()
        value, momentum = (self._trainer.state()[f"coo.{name}"].copy() for name in ("value", "momentum"))
        age = {int(place): int(birth) for place, birth in zip(before, self.born, strict=True)}
        died, new = np.setdiff1d(before, after), np.setdiff1d(after, before)
        young = np.array([place for place in died if number - age[int(place)] <= _WINDOW], before.dtype)
        if len(young):
            given = np.isin(after, new[-len(young) :])
            after[given] = young
            value[given] = signs(young.astype(np.int32), seed=self.sparse.seed) * NEWBORN
            momentum[given] = 0
            order = np.argsort(after)
            after, value, momentum = after[order], value[order], momentum[order]

            def take(arrays: dict[str, Array]) -> None:
                arrays["coo.index"][...], arrays["coo.value"][...] = after, value
                arrays["coo.momentum"][...] = momentum

            self._trainer.replace_state(take)
        self.born = np.array([age.get(int(place), number) for place in after])
        return numbers

    CompiledBackend.step = stepping  # type: ignore[method-assign]


def label_noise() -> None:
    """A tenth of the labels is drawn at random once the attack is made: label smoothing, in the mean."""
    from edge_bcs.runtime import step as steps

    craft: Callable[..., Any] = steps.craft
    generator = np.random.default_rng(0)

    def crafting(engine: Any, *given: Any, **named: Any) -> Any:
        made = craft(engine, *given, **named)
        labels = engine.arrays["labels"]
        drawn = generator.random(len(labels)) < _SMOOTHING
        labels[drawn] = generator.integers(0, 10, drawn.sum())
        return made

    steps.craft = crafting


def distilled() -> None:
    """The loss sees labels drawn from the probabilities that a dense robust network gives the clean image: in
    the mean, the cross-entropy with these. The attack keeps the true ones."""
    from edge_bcs.runtime import Trainer
    from edge_bcs.runtime import step as steps

    from edge_bcs import export, load
    from edge_bcs.core.scratch import ScratchFolder

    folder = ScratchFolder("teacher")
    teacher = Trainer(export(load(os.environ["TEACHER"]), folder.path / "a", validate=False), engine="native")
    craft: Callable[..., Any] = steps.craft
    generator = np.random.default_rng(0)

    def crafting(engine: Any, *given: Any, **named: Any) -> Any:
        made = craft(engine, *given, **named)
        shares = teacher.probabilities(np.array(engine.arrays["input"]))
        drawn = (shares.cumsum(axis=1) < generator.random((len(shares), 1))).sum(axis=1)
        engine.arrays["labels"][...] = drawn.clip(max=shares.shape[1] - 1)
        return made

    steps.craft = crafting


TRIALS = {
    "averaging": averaging,
    "survival window": survival_window,
    "label noise": label_noise,
    "distilled": distilled,
}


def main() -> None:
    """Run a training with its patch, or the ablation, which calls it."""
    patch = next((word for word in sys.argv if word.startswith(_WORD)), None)
    if patch is not None:
        from edge_bcs.cli import main as edge_bcs

        sys.argv.remove(patch)
        TRIALS[patch.removeprefix(_WORD).replace("-", " ")]()
        edge_bcs()
        return
    ablation.CANDIDATES |= {name: (f"{_WORD}{name.replace(' ', '-')}",) for name in TRIALS}
    run = commands.subprocess.run

    def running(arguments: list[str], **options: Any) -> Any:
        if any(word.startswith(_WORD) for word in arguments):
            arguments = [sys.executable, __file__, *arguments[3:]]
        return run(arguments, **options)

    commands.subprocess.run = running  # type: ignore[assignment]
    ablation.main()


if __name__ == "__main__":
    main()
