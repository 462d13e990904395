"""Robust sparse training on the board: one object, a few methods.

with Trainer("out/vgg16", memory="16MiB") as trainer:
    trainer.fit(data, epochs=1)
    trainer.save("run")
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.board.saving import DEFAULT_MAX_WRITES, parse_max_writes
from edge_bcs.runtime.board.thermostat import Thermostat
from edge_bcs.runtime.checks import Name, check_batch, in_batch
from edge_bcs.runtime.claims import Claims
from edge_bcs.runtime.connections import Connections, connections, layer_counts
from edge_bcs.runtime.course import Course, Wishes, begin_or_continue
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.engines import check_engine, open_engine
from edge_bcs.runtime.evaluation import watch
from edge_bcs.runtime.fit import Fit, Metrics
from edge_bcs.runtime.guard import Guard
from edge_bcs.runtime.precision import FULL, HALF, half_attack
from edge_bcs.runtime.predictor import Predictor, matched, opened
from edge_bcs.runtime.state import layout_of, write_run
from edge_bcs.runtime.step import Reader, accumulate, take_step
from edge_bcs.runtime.unlabelled import beside, wished

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import images_seen
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.units import parse_bytes
from edge_bcs.data.adapt import batch_size_of
from edge_bcs.data.augmentation import Augment
from edge_bcs.data.classes import named
from edge_bcs.data.dataset import Data

Array = np.ndarray[Any, Any]
_OWN = ("format", "version", "step", "seed", "images", "progress")  # of a state's metadata, no notes


class Trainer(Predictor):
    """Fine-tunes, evaluates and saves one artifact inside a byte budget.

    Args:
        path: an artifact folder or archive, or a saved run (which starts from its state but counts a new
            training); or what `Artifact.read` returned, which checks signatures.
        memory: cap on the working set, e.g. "6MiB" or bytes; default: the budget that the artifact was
            exported for, if any. It covers every tensor of ONNX Runtime and every bound buffer, not the
            interpreter.
        threads: threads of each graph; default: the processors this process may use. The result does not
            depend on it.
        seed: of all randomness; default: the artifact's.
        class_names: of the network's outputs in label order, for an artifact that has none stored.
        engine: "onnxruntime", or "native": our own runner, whose working set is one arena. Both give the same
            bits, and each goes on from the other's runs. Default: ONNX Runtime where it is installed.
        attack_precision: "f32"; "half": activations of the attack are of two bytes, where the processor has
            arithmetic in them (AVX-512 BF16, ARM's FP16); "auto": half where it has. What is learned is
            float32 in any case. Default: as the artifact says; of a run, what it was begun with.

    Attributes:
        artifact: what was read. steps: optimizer steps done. seed: see above.
        images: that this training saw, a step's after each step; with `resume` those before it, too.
        notes: texts by name that are saved with the state, and are those of the run with `resume`.
        classes: names of the network's outputs: stored, given, or of the first data that it was trained on;
            None while unknown. `save` keeps them.
        resumed: whether it was opened by `resume`.
        attack: with which the next step crafts its images; the artifact's, until a training in which it has
            collapsed falls back on PGD.
        attack_precision: "f32" or "half", in which attacks are; runs that are saved say so.
        learning_rate, weight_decay, momentum, noise: λ, λ_w, μ, σ of the next step (facts of Algorithm 1,
            line 9).
        on_run: called with a `GraphRun` (which engine ran which graph on how many images, how long) after
            every run of a graph, by the thread that runs it; None by default. What it raises ends the step,
            which is then as if it had not begun; after the optimizer's graph the step is counted.

    Raises EdgeBcsError for a damaged artifact, BudgetExceeded if its buffers do not fit. One Trainer over
    ONNX Runtime may be open in a process: `close` it (or leave its `with` block) before the next. Any number
    of native ones may.

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
        engine: str | None = None,
        attack_precision: str | None = None,
    ) -> None:
        self.artifact = path if isinstance(path, Artifact) else Artifact.read(path)
        cap = self.artifact.budget if memory is None else parse_bytes(memory)
        if seed is not None and not 0 <= seed < 2**64:
            raise EdgeBcsError(f"the seed must be an unsigned 64-bit number, not {seed}.")
        classes = self.artifact.classes
        if class_names is not None:
            classes = named(classes, class_names, self.artifact.num_classes)
        self._kind = check_engine(engine)
        self.attack_precision = HALF if half_attack(self.artifact, attack_precision) else FULL
        self._engine = self.open_engine(cap, threads)
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._guard = Guard(self._engine.arrays)
        super().__init__(self.artifact, self._engine, self._guard, classes, seed)
        self.images = 0
        self.attack = self.artifact.objective.attack
        self.notes: dict[str, str] = {}
        self._claims = Claims(self.artifact, self.steps)
        self._unlock = weakref.finalize(self, Claims.release, self._claims)
        hyper = self.artifact.hyper
        self.learning_rate, self.weight_decay = hyper["learning_rate"], hyper["weight_decay"]
        self.momentum, self.noise = hyper["momentum"], hyper["noise"]
        self._course: Course | None = None  # of the fit under way or last done, as it is saved
        self._continues = False
        self._counts_before: Array | None = None  # of each layer's connections, before the last update

    def open_engine(self, cap: int | None, threads: int | None) -> Engine:
        """Return what runs the graphs; a Trainer over another engine overrides it.

        Args:
            cap: bytes of the working set, None for no limit. threads: of each graph, None for all processors.
        """
        return open_engine(self._kind, self.artifact, cap, threads, self.attack_precision == HALF)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        memory: int | str | None = None,
        threads: int | None = None,
        class_names: Sequence[str] | None = None,
        engine: str | None = None,
        attack_precision: str | None = None,
    ) -> Trainer:
        """Open a saved run so that the next `fit` goes on where the saved one stood, to the bit."""
        # A Trainer that has one engine alone takes no name of it, and no precision.
        make: Callable[..., Trainer] = cls
        if engine is not None:
            make = partial(make, engine=engine)
        if attack_precision is not None:
            make = partial(make, attack_precision=attack_precision)
        trainer = make(path, memory=memory, threads=threads, class_names=class_names)
        try:
            trainer._go_on()
        except BaseException as error:
            trainer.close()
            if isinstance(error, EdgeBcsError):
                raise EdgeBcsError(f"{path}: {error}") from None
            raise
        return trainer

    def _go_on(self) -> None:
        """Let the next `fit` go on where the saved one stood."""
        saved, seen = self._engine.metadata.get("progress"), images_seen(self._engine.metadata)
        if saved is not None:
            self._course, self._continues = Course.parse(saved, self.steps), True
            if seen is None:  # of a run that an earlier release wrote
                seen = (self.steps - self._course.first_step) * self._course.batch_size
        self.images = seen or 0
        self.notes = {name: text for name, text in self._engine.metadata.items() if name not in _OWN}
        self.resumed = True

    def begin_anew(self) -> None:
        """Let the next `fit` begin a training of its own after the one that was saved, in the epoch after its
        last: what was saved is over."""
        self._continues, self.images = False, 0

    def close(self) -> None:
        """Free everything, so that another Trainer may be opened. Safe to call twice.

        While another thread uses it, this waits for the one graph that runs there; what that thread asks for
        next is refused, as of any Trainer that is closed.
        """
        with HeldSignals() as signals:  # half closed, it would keep others from being opened
            signals.hold()
            self._finalizer()
            self._claims.release()

    def __enter__(self) -> Trainer:
        """Return the trainer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def watch(self, data: Data, on_batch: Callable[[int, int], None] | None = None) -> tuple[float, float]:
        """Return which shares of the images are right under the training's own attack and under PGD-20.

        Args:
            data: a data set with the network's labels. on_batch: called with (images done, all images).
        """
        with self.between_steps(or_while_reading=True):
            return watch(self._engine, data, self.attack, seed=self.seed, on_batch=on_batch)

    def gradient(self, x: Array, y: Array) -> Array:
        """Return the gradient f32[κ] of the loss of a batch by the weights of the connections that are
        trained, as a step would see it; nothing changes.

        Args:
            x, y: as of `step`.
        """
        x, y = check_batch(self.artifact, x, y, training=True)
        with self._guard:
            accumulate(
                self, self._engine, self._guard, lambda first, end: (x[first:end], y[first:end]), len(x)
            )
            return np.array(self._engine.arrays["coo.value_grad.accumulation.buffer"])

    # One step

    def step(self, x: Array, y: Array) -> Metrics:
        """Train on one logical batch of any size, as micro-batches with accumulated gradients.

        Args:
            x: images f32 [n, C, H, W] in [0, 1]. y: labels int [n]; with trades and rst an image may have
                none, −1: it takes part in the second term alone.

        Returns:
            "loss"; of the images with labels, if there are any, "accuracy" as the loss saw them (clean where
            the objective has two branches) and "robust_accuracy" where the objective sees adversarial images
            apart from clean ones.

        Raises EdgeBcsError for a wrong shape, a pixel or label out of range, and NotFiniteError for a pixel,
        a loss or a gradient that is not finite, with the image or layer that it came from; the state is then
        as before the call.
        """
        with HeldSignals() as signals:
            return self.step_holding(signals, x, y)

    def step_holding(self, signals: HeldSignals, x: Array, y: Array) -> Metrics:
        """Do `step`, with ``signals`` held from its update on: for what must not be done without it."""
        with self._guard:
            x, y = check_batch(self.artifact, x, y, training=True)

            def read(first: int, end: int) -> tuple[Array, Array]:
                return x[first:end], y[first:end]

            return take_step(self, self._engine, self._guard, signals, read, len(x), in_batch)

    def step_reading(
        self,
        signals: HeldSignals,
        read: Reader,
        count: int,
        name: Name = in_batch,
        weights: Array | None = None,
    ) -> Metrics:
        """Do `step_holding` on images that are read when their micro-batch comes, so that memory holds no
        more of them.

        Args:
            signals: as for `step_holding`.
            read: called with (first, end); returns images f32 and labels at these places of the batch, which
                are checked. It may ask the Trainer for `logits`, `predict` and `evaluate`.
            count: images of the whole batch.
            name: says in messages which image stands at a place of the batch.
            weights: of the images in the loss, f64[count], at least 0; default: 1 each.
        """

        def checked(first: int, end: int) -> tuple[Array, Array]:
            images, labels = read(first, end)
            return check_batch(
                self.artifact, images, labels, lambda place: name(first + place), training=True
            )

        with self._guard:
            return take_step(self, self._engine, self._guard, signals, checked, count, name, weights)

    def coefficients(self) -> tuple[float, float, float, float]:
        """λ, λ_w, μ, σ of the next step."""
        return self.learning_rate, self.weight_decay, self.momentum, self.noise

    def run_optimizer_only(self) -> None:
        """Update and rewire with the gradients that the buffers hold, and count a step (for benchmarks)."""
        arrays = self._engine.arrays
        with self._guard, HeldSignals() as signals:
            signals.hold()
            arrays["hyper"][...] = self.coefficients()
            arrays["counter"][...] = np.array([self.seed, self.steps], np.uint64).view(np.int64)
            before = layer_counts(self.artifact, arrays["coo.index"])

            def counted() -> None:
                self._counts_before = before
                self.steps += 1
                self._guard.counted()

            self._engine.run("optimizer", counted)

    # Whole trainings

    def fit(
        self,
        data: Any,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        schedule: str | None = None,
        warmup: float | None = None,
        augment: Augment | None = None,
        balance: bool | None = None,
        validation: float | None = None,
        patience: int | None = None,
        unlabelled: Any = None,
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

        Args:
            data: a data set of `edge_bcs.data`; (images, labels), arrays or tensors: floats [N, C, H, W] in
                [0, 1], or u8, and whole numbers; "digits" or a path (its training images); a map-style torch
                Dataset of (image, label), or a DataLoader of one, whose dataset and batch size count and
                whose order does not (see `edge_bcs.data.adapt`). Read one micro-batch at a time. Its classes
                are matched with the network's by name (edge_bcs/data/classes.py); a network without names
                takes those of this data.
            epochs, steps: how long, counted from where this training began; default: one epoch.
            batch_size: images per optimizer step; default: a DataLoader's, or the artifact's.
            learning_rate: the highest learning rate, to which weight decay keeps its ratio; default: the
                artifact's.
            schedule, warmup: how both change, see `edge_bcs.Schedule`. Default, of these and the next four:
                what a training that is resumed had, else "steps", without a rise.
            augment: "shift" or True, "photo", "zoom", "mix", "mirror", "none" or False
                (`edge_bcs.data.augmentation`); default: shift.
            balance: draw images so that the classes come up evenly (`edge_bcs.data.balance`); default: no.
            validation: share of the images that is held out and measured after each epoch, under attack
                where the training has one; at the end the state is that of the best epoch. Needs ``save``.
            patience: end after so many epochs that were no better.
            unlabelled: images without labels, an `edge_bcs.Unlabelled` or what its ``data`` may be: robust
                self-training.
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
            on_wait: called once a second of a pause, and between micro-batches of held-out images, with a
                sentence; what it raises ends the training.

        Returns:
            the means over the last epoch's worth of steps; "step"; "steps" done by this call and "done" since
            this training began; "finished"; "skipped" since it began; "seconds", of which "paused_seconds";
            "milliseconds_per_step"; "peak_bytes"; "writes" (see `Fit.writes`) if it is saved or measured;
            with ``validation`` "best" ("step", "accuracy") and "early": whether patience ended it; with a
            single-step attack "fell_back": the steps done when it collapsed and PGD took its place, or None
            (see `edge_bcs.core.collapse`); with
            ``unlabelled`` of its last epoch "unlabelled" ("images", "labelled" by the network, "classes").

        Raises EdgeBcsError for impossible options or data, a class that the network does not know, a file
        that cannot be written, and NotFiniteError as ``on_nan`` says.
        """
        wishes = Wishes(
            epochs=epochs,
            steps=steps,
            batch_size=batch_size_of(data) if batch_size is None else batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            augment=augment,
            balance=balance,
            validation=validation,
            patience=patience,
            unlabelled=unlabelled if unlabelled is None else wished(unlabelled),
        )
        data = opened(self, data, "train")
        found = matched(self, data, "train", naming=True)
        more = None if wishes.unlabelled is None else beside(data, wishes.unlabelled, self.artifact)
        fitting = Fit(
            self,
            found.data,
            more,
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
        with self.between_steps():
            resumed = self._continues or self.resumed  # killed before its first save, it has no course yet
            self._course = course = begin_or_continue(
                self._course,
                self._continues,
                self.artifact,
                wishes,
                step=self.steps,
                images=len(found.data),
                unlabelled=0 if more is None else len(more),
            )
            self._continues = False
            self.classes = found.classes
            return fitting.run(course, resumed)

    def connections(self) -> Connections:
        """How many connections each layer has, and how many of them the last update of this Trainer drew and
        removed there; none before the first one."""
        with self._guard:
            return connections(self.artifact, self._engine.arrays, self._counts_before)

    def state(self) -> dict[str, Array]:
        """Return copies of the seven tensors of the state by name ("coo.value", "coo.index", …)."""
        with self._guard:
            state = self._guard.counted_state(layout_of(self.artifact))
            return {name: array.copy() for name, array in state.items()}

    def replace_state(self, fill: Callable[[dict[str, Array]], None]) -> None:
        """Replace the state by what ``fill`` writes into the buffers, by name; steps and seed stay."""
        with self._guard, HeldSignals() as signals:
            signals.hold()
            self._engine.reload(fill)
            self._counts_before = None

    def save(self, path: str | Path) -> int:
        """Save a run folder, atomically and durably (runtime/state.py); it is itself a complete artifact.

        From the first save on the folder is this process's alone to write, until `close`.

        Returns the bytes of the state. Raises EdgeBcsError if the folder belongs to something else, another
        process trains into it, the medium is full or read-only, or the state holds a number that is not
        finite; earlier saves are then kept.
        """
        with self._guard:
            state = self._guard.counted_state(layout_of(self.artifact))
            self.claim(path)
            return write_run(path, self.artifact, state, self.metadata(), self.classes, self.attack_precision)

    def claim(self, folder: str | Path) -> None:
        """Keep other processes from writing into a run folder until `close`, as the first `save` there does.

        Raises EdgeBcsError if another process trains into it, if one did since this Trainer read the run
        there, or if the folder belongs to something else.
        """
        self._claims.claim(folder)

    def metadata(self) -> dict[str, str]:
        """What a saved state says beside its tensors: "step", "seed", the "images" that its training saw,
        where in a training it stands, and the notes."""
        numbers = {"step": self.steps, "seed": self.seed, "images": self.images}
        metadata = {**self.notes, **{name: str(number) for name, number in numbers.items()}}
        return metadata if self._course is None else {**metadata, "progress": self._course.dump()}
