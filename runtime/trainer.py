"""Robust sparse training on the board: one object, a few methods.

with Trainer("out/vgg16", memory="16MiB") as trainer:
    trainer.fit(data, epochs=1)
    trainer.save("run")
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.attack import softmax, start_images
from edge_bcs.runtime.board.process import resident_peak
from edge_bcs.runtime.board.saving import DEFAULT_MAX_WRITES, parse_max_writes
from edge_bcs.runtime.board.thermostat import Thermostat
from edge_bcs.runtime.checks import (
    Name,
    NotFiniteError,
    check_images,
    check_labels,
    check_statistics,
    check_update,
    in_batch,
    in_data,
)
from edge_bcs.runtime.course import Course
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.fit import Fit, Metrics
from edge_bcs.runtime.state import is_run_of, layout_of, read_state, write_run

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.units import parse_bytes
from edge_bcs.data.adapt import batch_size_of, dataset_of
from edge_bcs.data.classes import Match, Names, match, named, say
from edge_bcs.data.dataset import Data

Array = np.ndarray[Any, Any]
Reader = Callable[[int, int], tuple[Array, Array]]


class OneThread:
    """A lock that a thread may take again while it has it, and that refuses other threads: nobody waits."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Take it; EdgeBcsError if another thread has it."""
        if not self._lock.acquire(blocking=False):
            raise EdgeBcsError(
                "this Trainer is in use by another thread: call it from one thread at a time (wait for the "
                "other, or share a threading.Lock)."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        self._lock.release()


class Trainer:
    """Fine-tunes, evaluates and saves one artifact inside a byte budget.

    Args:
        path: an artifact folder or archive, or a saved run (which starts from its state but counts a new
            training); or what `Artifact.read` returned, which checks signatures.
        memory: cap on the working set, e.g. "6MiB" or bytes; default: the budget that the artifact was
            exported for,
            if any. It covers every tensor of ONNX Runtime and every bound buffer, not the interpreter.
        threads: threads of each graph; default: the processors this process may use. The result does not
            depend on it.
        seed: of all randomness; default: the artifact's.
        class_names: of the network's outputs in label order, for an artifact that has none stored.

    Attributes:
        artifact: what was read. steps: optimizer steps done. seed: see above.
        classes: names of the network's outputs: stored, given, or of the first data that it was trained on;
            None while unknown. `save` keeps them.
        resumed: whether it was opened by `resume`.
        learning_rate, weight_decay, momentum, noise: λ, λ_w, μ, σ of the next step (facts of Algorithm 1,
            line 9).

    Raises EdgeBcsError for a damaged artifact, BudgetExceeded if its buffers do not fit. One Trainer may be
    open in a process; `close` it (or leave its `with` block) before the next.

    A signal such as Ctrl-C never leaves half a step: the state is that after the last step that is counted in
    ``steps``, to the bit, and can be saved and trained on. One thread at a time may use a Trainer; another
    one is refused with a sentence, but may always read `memory` and `close` it.
    """

    def __init__(
        self,
        path: str | Path | Artifact,
        memory: int | str | None = None,
        threads: int | None = None,
        seed: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.artifact = path if isinstance(path, Artifact) else Artifact.read(path)
        cap = self.artifact.budget if memory is None else parse_bytes(memory)
        if seed is not None and not 0 <= seed < 2**64:
            raise EdgeBcsError(f"the seed must be an unsigned 64-bit number, not {seed}.")
        self.classes: Names | None = self.artifact.classes
        if class_names is not None:
            self.classes = named(self.classes, class_names, self.artifact.num_classes)
        self._engine = self._open_engine(cap, threads)
        self._finalizer = weakref.finalize(self, Engine.close, self._engine)
        self._locks: dict[str, FolderLock] = {}
        self._unlock = weakref.finalize(self, _release, self._locks)
        metadata = self._engine.metadata
        self.steps = self._opened_at = int(metadata["step"])
        self.seed = int(metadata["seed"]) if seed is None else seed
        hyper = self.artifact.hyper
        self.learning_rate, self.weight_decay = hyper["learning_rate"], hyper["weight_decay"]
        self.momentum, self.noise = hyper["momentum"], hyper["noise"]
        self._course: Course | None = None  # of the fit under way or last done, as it is saved
        self._continues = False
        self.resumed = False
        self._one_thread = OneThread()
        self._unfinished = False  # a step has begun and is not counted: running statistics are not to be had
        self._reading = False  # of such a step: its next images are being read, and the buffers are free

    def _open_engine(self, cap: int | None, threads: int | None) -> Engine:
        return Engine(self.artifact, cap, threads)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        memory: int | str | None = None,
        threads: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Trainer:
        """Open a saved run so that the next `fit` goes on where the saved one stood, to the bit."""
        trainer = cls(path, memory=memory, threads=threads, class_names=class_names)
        try:
            saved = trainer._engine.metadata.get("progress")
            if saved is not None:
                trainer._course, trainer._continues = Course.parse(saved, trainer.steps), True
            trainer.resumed = True
        except EdgeBcsError as error:
            trainer.close()
            raise EdgeBcsError(f"{path}: {error}") from None
        except BaseException:
            trainer.close()
            raise
        return trainer

    def close(self) -> None:
        """Free everything, so that another Trainer may be opened. Safe to call twice.

        While another thread uses it, this waits for the one graph that runs there; what that thread asks for
        next is refused, as of any Trainer that is closed.
        """
        with HeldSignals() as signals:  # half closed, it would keep others from being opened
            signals.hold()
            self._finalizer()
            _release(self._locks)

    def __enter__(self) -> Trainer:
        """Return the trainer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    # One step

    def step(self, x: Array, y: Array) -> Metrics:
        """Train on one logical batch of any size, as micro-batches with accumulated gradients.

        Args:
            x: images f32 [n, C, H, W] in [0, 1]. y: labels int [n].

        Returns:
            "loss"; "accuracy" over the images that the loss saw (clean ones where the objective has two
            branches); "robust_accuracy" where the objective sees adversarial images apart from clean ones.

        Raises EdgeBcsError for a wrong shape, a pixel or label out of range, and NotFiniteError for a pixel,
        a loss or a gradient that is not finite, with the image or layer that it came from; the state is then
        as before the call.
        """
        with HeldSignals() as signals:
            return self.step_holding(signals, x, y)

    def step_holding(self, signals: HeldSignals, x: Array, y: Array) -> Metrics:
        """Do `step`, with ``signals`` held from its update on: for what must not be done without it."""
        with self._one_thread:
            x, y = self._checked(x, y)
            return self._step(lambda first, end: (x[first:end], y[first:end]), len(x), signals)

    def _step(self, read: Reader, count: int, signals: HeldSignals, name: Name = in_batch) -> Metrics:
        self._refuse_inside_a_step()
        arrays, objective, size = self._engine.arrays, self.artifact.objective, self.artifact.micro_batch
        rollback = self._rollback()
        for buffer, kept in rollback.items():
            arrays[kept][...] = arrays[buffer]
        loss, correct = 0.0, np.zeros(len(arrays["correct"]))
        try:
            self._unfinished = True
            for first in range(0, count, size):
                self._reading = True
                x, y = read(first, min(first + size, count))
                self._reading = False
                self._load(x, y, 1.0 / count)
                try:
                    self._craft(len(x), first, count)
                    arrays["lazy_reset_grad"][0] = first == 0
                    self._engine.run("training")
                    loss += float(arrays["loss"])
                    if not math.isfinite(loss):
                        raise NotFiniteError(f"the loss is {loss}")
                    if rollback:
                        check_statistics(self.artifact, arrays)
                except NotFiniteError as error:
                    blamed = self._blamed(first, len(x), name)
                    raise NotFiniteError(f"{error} ({blamed}); lower the learning rate.") from None
                correct += arrays["correct"]
            check_update(self.artifact, arrays, self._hyper())
            # From here to where the step is counted no signal's handler runs, nor between that and what the
            # caller must do with it.
            signals.hold()
            self.run_optimizer_only()
            self._unfinished = False
        except NotFiniteError as error:
            raise NotFiniteError(f"in step {self.steps + 1}, {error}") from None
        finally:
            try:
                self._take_back()
            finally:  # a second signal may have come while the first one was answered
                self._take_back()
        metrics: Metrics = {"loss": loss, "accuracy": float(correct[0]) / count}
        if objective.two_branches:
            metrics["robust_accuracy"] = float(correct[1]) / count
        elif objective.kind.accuracy_is_robust:
            metrics["robust_accuracy"] = metrics["accuracy"]
        return metrics

    def _rollback(self) -> dict[str, str]:
        """Buffer → the one that keeps it during a step, of the running statistics that a step changes."""
        pairs = {f"batchnorm.{kind}": f"rollback.{kind}" for kind in ("mean", "variance")}
        return {buffer: kept for buffer, kept in pairs.items() if kept in self._engine.arrays}

    def _take_back(self) -> None:
        """Take back what the micro-batches of a step did to the running statistics, unless it is counted."""
        if not self._unfinished:
            return
        with HeldSignals() as signals:
            signals.hold()
            for buffer, kept in self._rollback().items():
                self._engine.arrays[buffer][...] = self._engine.arrays[kept]
            self._unfinished = self._reading = False

    def _refuse_inside_a_step(self, but_while_reading: bool = False) -> None:
        """Raise EdgeBcsError where the handler of a signal, or the reading of images, is inside a step."""
        if self._unfinished and not (but_while_reading and self._reading):
            raise EdgeBcsError(
                f"step {self.steps + 1} is under way: call this between steps (the handler of a signal can "
                "leave a note that on_step looks at)."
            )

    def _load(self, x: Array, y: Array, weight: float) -> None:
        """Put a micro-batch into the bound buffers; the places it leaves empty weigh nothing."""
        arrays, count = self._engine.arrays, len(x)
        arrays["input"][:count], arrays["input"][count:] = x, 0
        arrays["labels"][:count], arrays["labels"][count:] = y, 0
        arrays["sample_weight"][:count], arrays["sample_weight"][count:] = weight, 0

    def _craft(self, count: int, first: int, batch: int) -> None:
        """Fill the buffer `adversarial` for the training graph (Algorithm 1, line 5)."""
        arrays, objective = self._engine.arrays, self.artifact.objective
        attacked = objective.kind.attacked(batch)
        if first < attacked:
            self._attack(
                count,
                epsilon=objective.epsilon,
                steps=objective.attack_steps,
                step_size=objective.step_size,
                start=objective.start,
                loss=objective.attack_loss,
                noise=(self.steps, random.PGD_START, first),
            )
        clean = max(0, attacked - first)
        arrays["adversarial"][clean:] = arrays["input"][clean:]

    def _attack(
        self,
        count: int,
        *,
        epsilon: float,
        steps: int,
        step_size: float,
        start: str,
        loss: str,
        noise: tuple[int, int, int],
    ) -> None:
        """Projected gradient descent from the images in `input` to those in `adversarial`, batch norm
        frozen."""
        arrays = self._engine.arrays
        if loss == "kl":
            self._engine.run("eval")
            arrays["target"][...] = softmax(arrays["logits"])
        else:
            arrays["target"][...] = 0
            arrays["target"][np.arange(len(arrays["labels"])), arrays["labels"]] = 1
        step, purpose, position = noise
        arrays["adversarial"][...] = arrays["input"]
        arrays["adversarial"][:count] = start_images(
            arrays["input"][:count],
            start,
            epsilon,
            seed=self.seed,
            step=step,
            purpose=purpose,
            position=position,
        )
        arrays["epsilon"][0], arrays["step_size"][0] = epsilon, step_size
        for _ in range(steps):
            self._engine.run("attack")

    def _blamed(self, first: int, count: int, name: Name) -> str:
        """Name the images of the micro-batch at hand whose logits are not finite; all if it is none of
        them."""
        arrays, faulty = self._engine.arrays, np.zeros(count, bool)
        for images in ("input", "adversarial"):
            arrays["input"][...] = arrays[images]
            try:
                self._engine.run("eval")
            except EdgeBcsError:
                continue
            faulty |= ~np.isfinite(arrays["logits"][:count]).all(axis=1)
        places = np.flatnonzero(faulty)
        if len(places) in (0, count):
            several = f"{name(first)} and the {count - 1} after it" if count > 1 else name(first)
            return several
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        return f"{name(first + int(places[0]))}{more}"

    def _hyper(self) -> tuple[float, float, float, float]:
        return self.learning_rate, self.weight_decay, self.momentum, self.noise

    def run_optimizer_only(self) -> None:
        """Update and rewire with the gradients that the buffers hold, and count a step (for benchmarks)."""
        arrays = self._engine.arrays
        with self._one_thread, HeldSignals() as signals:
            signals.hold()
            arrays["hyper"][...] = self._hyper()
            arrays["counter"][...] = np.array([self.seed, self.steps], np.uint64).view(np.int64)
            self._engine.run("optimizer")
            self.steps += 1

    def _checked(self, x: Array, y: Array, name: Name = in_batch) -> tuple[Array, Array]:
        """Validate a batch and return it as f32 and i64."""
        x = check_images(x, self.artifact.input_shape, name)
        return x, check_labels(y, len(x), self.artifact.num_classes, name)

    # Whole trainings

    def fit(
        self,
        data: Any,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        augment: bool = True,
        progress: bool = True,
        metrics: str | Path | None = None,
        on_step: Callable[[Metrics], None] | None = None,
        save: str | Path | None = None,
        save_steps: int | None = None,
        save_seconds: float | None = None,
        max_writes: int | str | None = DEFAULT_MAX_WRITES,
        on_nan: Literal["stop", "skip"] = "stop",
        thermostat: Thermostat | None = None,
        max_hours: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> Metrics:
        """Train for a number of epochs or steps, streaming ``data``; after `resume`, finish the saved
        training.

        Learning rate and weight decay are divided by 10 at 50 % and again at 75 % of the steps.

        Args:
            data: a data set of `edge_bcs.data`; (images, labels), arrays or tensors: floats [N, C, H, W] in
                [0, 1], or u8, and whole numbers; "digits" or a path (its training images); a map-style torch
                Dataset of (image, label), or a DataLoader of one, whose dataset and batch size count and
                whose order does not (see `edge_bcs.data.adapt`). Read one micro-batch at a time. Its classes
                are matched with the network's by name (edge_bcs/data/classes.py); a network without names
                takes those of this data.
            epochs, steps: how long, counted from where this training began; default: one epoch.
            batch_size: images per optimizer step; default: a DataLoader's, or the artifact's.
            learning_rate: the first learning rate, to which weight decay keeps its ratio; default: the
                artifact's.
            augment: shift and flip the images.
            progress: show on standard error how far it is: a bar, or a line every ten seconds.
            metrics: file to which one JSON object per step is appended.
            on_step: called with the same object after every step; what it raises ends the training.
            save: run folder to save into, now and then and at the end; no other process may save there
                until `close`.
            save_steps, save_seconds: how often, whichever comes first; default: every 60 seconds.
            max_writes: bytes an hour (or "200MiB") that saves and metrics may write; saves come less often
                where they would write more. None or "none": no limit.
            on_nan: what happens to a batch with a pixel, a loss or a gradient that is not finite: "stop"
                saves the state before it and raises; "skip" leaves it out, counts it, and raises when a whole
                epoch was left out.
            thermostat: pauses the training while the machine is too hot.
            max_hours: return after so many hours, unfinished.
            on_wait: called once a second of a pause with a sentence; what it raises ends the training.

        Returns:
            the means over the last epoch's worth of steps; "step"; "steps" done by this call and "done" since
            this training began; "finished"; "skipped" since it began; "seconds", of which "paused_seconds";
            "milliseconds_per_step"; "peak_bytes"; "writes" (see `Fit.writes`) if it is saved or measured.

        Raises EdgeBcsError for impossible options or data, a class that the network does not know, a file
        that cannot be written, and NotFiniteError as ``on_nan`` says.
        """
        batch_size = batch_size_of(data) if batch_size is None else batch_size
        matched = self._matched(self._dataset(data, "train"), naming=True)
        data = matched.data
        fitting = Fit(
            self,
            data,
            augment=augment,
            progress=progress,
            metrics=metrics,
            on_step=on_step,
            save=save,
            save_steps=save_steps,
            save_seconds=save_seconds,
            max_writes=parse_max_writes(max_writes),
            on_nan=on_nan,
            thermostat=thermostat,
            max_hours=max_hours,
            on_wait=on_wait,
        )
        with self._one_thread:
            self._refuse_inside_a_step()
            resumed = self._continues or self.resumed  # killed before its first save, it has no course yet
            course = self._set_course(data, epochs, steps, batch_size, learning_rate)
            self.classes = matched.classes
            return fitting.run(course, resumed)

    def _set_course(
        self,
        data: Data,
        epochs: int | None,
        steps: int | None,
        batch_size: int | None,
        learning_rate: float | None,
    ) -> Course:
        """Where this training begins and ends: a new one, or after `resume` the saved one."""
        if epochs is not None and steps is not None:
            raise EdgeBcsError("give the length in epochs or in steps, not both.")
        for name, value in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise EdgeBcsError(f"{name} must be at least 1, not {value}.")
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
            raise EdgeBcsError(f"the learning rate must be a positive number, not {learning_rate}.")
        course = self._course
        if course is not None and self._continues:
            if course.samples != len(data) or batch_size not in (None, course.batch_size):
                raise EdgeBcsError(
                    f"the saved training used {course.samples} images in batches of {course.batch_size}; "
                    "resume it with the same data and batch size, or start a new one."
                )
        else:
            course = Course(
                first_step=self.steps,
                first_epoch=0 if course is None else course.next_epoch(self.steps),
                batch_size=batch_size or self.artifact.batch_size,
                samples=len(data),
                learning_rate=self.artifact.hyper["learning_rate"],
                total_steps=0,
            )
            course.total_steps = course.steps_per_epoch
        if learning_rate is not None:
            course.learning_rate = learning_rate
        if epochs is not None:
            course.total_steps = epochs * course.steps_per_epoch
        elif steps is not None:
            course.total_steps = steps
        self._course, self._continues = course, False
        return course

    def _set_rates(self, learning_rate: float, divisor: float) -> None:
        """Set λ and λ_w of the next step, for a training that began with ``learning_rate``."""
        self.learning_rate = learning_rate / divisor
        # The decay is not multiplied by the learning rate (Algorithm 1), so it must follow it here.
        hyper = self.artifact.hyper
        ratio = learning_rate / hyper["learning_rate"] if hyper["learning_rate"] else 1.0
        self.weight_decay = hyper["weight_decay"] * ratio / divisor

    def _dataset(self, data: Any, split: str) -> Data:
        """Whatever holds images, as a data set; pixels are checked when they are read, for one may be
        skipped."""
        return dataset_of(data, split=split, shape=self.artifact.input_shape, finite=False)

    def match_classes(self, data: Any, *, training: bool = False) -> Match:
        """Match the classes of ``data`` with the network's by name, as `fit` and `evaluate` do, and say once
        what is worth knowing.

        Args:
            data: what `fit` takes; of a path its test images unless ``training``.
            training: the network will be trained on it, so a network without names takes those of ``data``.

        Raises EdgeBcsError for data of another shape, without images, or with a class that the network does
        not know.
        """
        matched = self._matched(self._dataset(data, "train" if training else "test"), naming=training)
        self.classes = matched.classes
        return matched

    def _matched(self, data: Data, naming: bool) -> Match:
        if len(data) == 0:
            raise EdgeBcsError("the data set is empty.")
        if tuple(data.shape) != self.artifact.input_shape:
            raise EdgeBcsError(
                f"the network takes {self.artifact.input_shape} images; the data has {tuple(data.shape)}."
            )
        outputs = self.artifact.num_classes
        matched = match(
            data, self.classes, outputs, naming=naming, trained=self.steps > 0, resumed=self.resumed
        )
        say(matched.notes)
        return matched

    # Looking at the result

    def logits(self, x: Array) -> Array:
        """Return the logits f32 [n, classes] of images f32 [n, C, H, W] in [0, 1]."""
        x = check_images(x, self.artifact.input_shape)
        size, arrays = self.artifact.micro_batch, self._engine.arrays
        result = np.empty((len(x), self.artifact.num_classes), np.float32)
        with self._one_thread:
            self._refuse_inside_a_step(but_while_reading=True)
            for first in range(0, len(x), size):
                part = x[first : first + size]
                self._load(part, np.zeros(len(part), np.int64), 0.0)
                self._engine.run("eval")
                result[first : first + size] = arrays["logits"][: len(part)]
        return result

    def predict(self, x: Array) -> Array:
        """Return the most likely classes i64[n] of images f32 [n, C, H, W] in [0, 1]."""
        return np.asarray(self.logits(x).argmax(axis=1), np.int64)

    def evaluate(
        self,
        data: Any,
        attack_steps: int = 20,
        *,
        attack: str = "pgd",
        limit: int | None = None,
        restarts: int = 1,
        epsilon: float | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> Metrics:
        """Return clean and robust accuracy ("accuracy", "robust_accuracy", "samples"), measured on the board.

        Args:
            data: what `fit` takes; of a path its test images. Its classes are matched with the network's by
                name.
            attack_steps: of PGD on the cross-entropy, with steps of 2.5·ε/steps and a
                uniform
                start; 0 measures clean accuracy alone.
            attack: "pgd", or "fgsm" for one step of size ε from the image itself.
            limit: only so many images, the first of a fixed shuffle.
            epsilon: radius of the attack; default: the artifact's.
            restarts: an image counts as robust if none of so many attacks fools the network.
            on_batch: called with (images done, all images).
        """
        held_out: Data = self._matched(self._dataset(data, "test"), naming=False).data
        if attack not in ("pgd", "fgsm"):
            raise EdgeBcsError(f"the board evaluates with pgd or fgsm, not {attack!r}.")
        if attack == "fgsm":
            attack_steps, restarts = min(attack_steps, 1), 1
        if attack_steps < 0 or restarts < 1 or (limit is not None and limit < 1):
            raise EdgeBcsError("attack steps must be at least 0, restarts and limit at least 1.")
        epsilon = self.artifact.objective.epsilon if epsilon is None else epsilon
        if not 0 <= epsilon <= 1:
            raise EdgeBcsError(f"epsilon must lie in [0, 1], not {epsilon}.")
        order = held_out.order(0, 0, shuffle=limit is not None)[:limit]
        with self._one_thread:
            self._refuse_inside_a_step(but_while_reading=True)
            clean, robust = self._right_answers(
                held_out, order, attack == "fgsm", attack_steps, restarts, epsilon, on_batch
            )
        metrics: Metrics = {"accuracy": clean / len(order), "samples": len(order)}
        if attack_steps:
            metrics |= {
                "robust_accuracy": robust / len(order),
                "attack_steps": attack_steps,
                "restarts": restarts,
            }
        return metrics

    def _right_answers(
        self,
        data: Data,
        order: Array,
        fgsm: bool,
        attack_steps: int,
        restarts: int,
        epsilon: float,
        on_batch: Callable[[int, int], None] | None,
    ) -> tuple[int, int]:
        """How many images at ``order`` are answered rightly, clean and under attack; see `evaluate`."""
        arrays, size = self._engine.arrays, self.artifact.micro_batch
        clean = robust = 0
        for first in range(0, len(order), size):
            places = order[first : first + size]
            x, y = self._checked(*data.read(places), in_data(places))
            self._load(x, y, 0.0)
            self._engine.run("eval")
            right = arrays["logits"][: len(x)].argmax(axis=1) == y
            clean += int(right.sum())
            if attack_steps:
                for restart in range(restarts):
                    self._attack(
                        len(x),
                        epsilon=epsilon,
                        steps=attack_steps,
                        step_size=(1.0 if fgsm else 2.5 / attack_steps) * epsilon,
                        start="none" if fgsm else "uniform",
                        loss="cross_entropy",
                        noise=(restart, random.EVALUATION, first),
                    )
                    arrays["input"][...] = arrays["adversarial"]
                    self._engine.run("eval")
                    arrays["input"][: len(x)] = x
                    right &= arrays["logits"][: len(x)].argmax(axis=1) == y
                robust += int(right.sum())
            if on_batch is not None:
                on_batch(first + len(x), len(order))
        return clean, robust

    def state(self) -> dict[str, Array]:
        """Return copies of the seven tensors of the state by name ("coo.value", "coo.index", …)."""
        with self._one_thread:
            return {name: array.copy() for name, array in self._state().items()}

    def _state(self) -> dict[str, Array]:
        """The buffers that hold the state after the last step that is counted, while the next is under way,
        too."""
        kept = self._rollback() if self._unfinished else {}
        return {name: self._engine.arrays[kept.get(name, name)] for name in layout_of(self.artifact)}

    def save(self, path: str | Path) -> int:
        """Save a run folder, atomically and durably (runtime/state.py); it is itself a complete artifact.

        From the first save on the folder is this process's alone to write, until `close`.

        Returns the bytes of the state. Raises EdgeBcsError if the folder belongs to something else, another
        process trains into it, the medium is full or read-only, or the state holds a number that is not
        finite; earlier saves are then kept.
        """
        with self._one_thread:
            state = self._state()
            self._claim(path)
            return write_run(path, self.artifact, state, self._metadata(), self.classes)

    def _claim(self, folder: str | Path) -> None:
        """Keep other processes from writing into a run folder until this trainer is closed; EdgeBcsError if
        one does, if one did since this trainer read the run there, or if the folder belongs to something
        else."""
        name = os.path.realpath(folder)
        before = self._locks.get(name)
        run = before is None and is_run_of(folder, self.artifact)
        lock = FolderLock(folder)  # anew: the folder may have been moved away or deleted
        step = self._saved_step() if run and name == os.path.realpath(self.artifact.path) else 0
        if step > self._opened_at:
            lock.release()
            raise EdgeBcsError(
                f"{folder} is at step {step} and was at {self._opened_at} when it was opened here: another "
                "process trained on. Open it again, or save to another folder."
            )
        self._locks[name] = lock
        if before is not None:
            before.release()

    def _saved_step(self) -> int:
        """The step of what now lies in the run that this trainer read; 0 if that is no intact state."""
        try:
            return int(read_state(self.artifact)[1]["step"])
        except EdgeBcsError:
            return 0

    def _metadata(self) -> dict[str, str]:
        """What a saved state says beside its tensors."""
        metadata = {"step": str(self.steps), "seed": str(self.seed)}
        return metadata if self._course is None else {**metadata, "progress": self._course.dump()}

    def memory(self) -> dict[str, int | bool | None]:
        """Return what memory is in use, in bytes.

        "bound_bytes": the bound buffers; "current_bytes" and "peak_bytes": the working set now and at most
        since the Trainer was opened; "placed_bytes" and "placed_peak_bytes": the memory that it lies in, with
        the holes between tensors, which no cap covers; "cap_bytes" or None; "exact": whether every tensor is
        counted; "rss_bytes": the whole process with interpreter and libraries, which no cap covers.
        """
        budget = self._engine.budget
        return {
            "bound_bytes": self._engine.bound_bytes,
            "current_bytes": budget.current,
            "peak_bytes": budget.peak,
            "placed_bytes": budget.placed,
            "placed_peak_bytes": budget.placed_peak,
            "cap_bytes": budget.cap,
            "exact": budget.exact,
            "rss_bytes": resident_peak(),
        }

    def reset_peak(self) -> None:
        """Measure the peak anew from here."""
        self._engine.budget.reset_peak()

    @property
    def threads(self) -> int:
        """Threads of each graph."""
        return int(self._engine.threads)


def _release(locks: dict[str, FolderLock]) -> None:
    while locks:
        locks.popitem()[1].release()
