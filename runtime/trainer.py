"""Robust sparse training on the board: one object, a few methods.

with Trainer("out/vgg16", memory="16MiB") as trainer:
    trainer.fit(data, epochs=1)
    trainer.save("run")
"""

from __future__ import annotations

import json
import math
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.attack import softmax, start_images
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.process import resident_peak
from edge_bcs.runtime.state import state_layout, write_run
from edge_bcs.runtime.units import parse_bytes

from edge_bcs import random
from edge_bcs.errors import EdgeBcsError

Array = np.ndarray[Any, Any]
Reader = Callable[[int, int], tuple[Array, Array]]
Metrics = dict[str, float]
_LARGEST_GRADIENT = 1e30


class Data(Protocol):
    """What `fit` and `evaluate` read from (every data set of `edge_bcs.data`)."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        """Positions i64[N] in the order of one epoch."""
        ...

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: bool = False
    ) -> tuple[Array, Array]:
        """Images f32 [m, C, H, W] in [0, 1] and labels i64[m]."""
        ...


class Trainer:
    """Fine-tunes, evaluates and saves one artifact inside a byte budget.

    Args:
        path: an artifact folder, or a saved run (which starts from its state but counts a new training).
        memory: cap on the working set, e.g. "6MiB" or bytes; default: the budget that the artifact was
            exported for,
            if any. It covers every tensor of ONNX Runtime and every bound buffer, not the interpreter.
        threads: threads of each graph; default: the processors this process may use. The result does not
            depend on it.
        seed: of all randomness; default: the artifact's.

    Attributes:
        artifact: what was read. steps: optimizer steps done. seed: see above.
        learning_rate, weight_decay, momentum, noise: λ, λ_w, μ, σ of the next step (facts of Algorithm 1,
            line 9).

    Raises EdgeBcsError for a damaged artifact, BudgetExceeded if its buffers do not fit. One Trainer may be
    open in a process; `close` it (or leave its `with` block) before the next.
    """

    def __init__(
        self,
        path: str | Path,
        memory: int | str | None = None,
        threads: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.artifact = Artifact.read(path)
        cap = self.artifact.budget if memory is None else parse_bytes(memory)
        if seed is not None and not 0 <= seed < 2**64:
            raise EdgeBcsError(f"the seed must be an unsigned 64-bit number, not {seed}.")
        self._engine = self._open_engine(cap, threads)
        self._finalizer = weakref.finalize(self, Engine.close, self._engine)
        metadata = self._engine.metadata
        self.steps = int(metadata["step"])
        self.seed = int(metadata["seed"]) if seed is None else seed
        hyper = self.artifact.hyper
        self.learning_rate, self.weight_decay = hyper["learning_rate"], hyper["weight_decay"]
        self.momentum, self.noise = hyper["momentum"], hyper["noise"]
        self._progress: dict[str, Any] | None = None  # the fit under way, as it is saved
        self._continues = False

    def _open_engine(self, cap: int | None, threads: int | None) -> Engine:
        return Engine(self.artifact, cap, threads)

    @classmethod
    def resume(cls, path: str | Path, memory: int | str | None = None, threads: int | None = None) -> Trainer:
        """Open a saved run so that the next `fit` goes on where the saved one stood, to the bit."""
        trainer = cls(path, memory=memory, threads=threads)
        try:
            trainer._restore_progress(trainer._engine.metadata.get("progress"))
        except BaseException:
            trainer.close()
            raise
        return trainer

    def close(self) -> None:
        """Free everything, so that another Trainer may be opened. Safe to call twice."""
        self._finalizer()

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

        Raises EdgeBcsError for a wrong shape, a pixel or label out of range, or a loss or gradient that is
        not finite; the state is then as before the call.
        """
        x, y = self._checked(x, y)
        return self._step(lambda first, end: (x[first:end], y[first:end]), len(x))

    def _step(self, read: Reader, count: int) -> Metrics:
        arrays, objective, size = self._engine.arrays, self.artifact.objective, self.artifact.micro_batch
        rollback = [name for name in ("mean", "variance") if f"rollback.{name}" in arrays]
        for name in rollback:
            arrays[f"rollback.{name}"][...] = arrays[f"batchnorm.{name}"]
        loss, correct = 0.0, np.zeros(len(arrays["correct"]))
        try:
            for first in range(0, count, size):
                x, y = read(first, min(first + size, count))
                self._load(x, y, 1.0 / count)
                self._craft(len(x), first, count)
                arrays["lazy_reset_grad"][0] = first == 0
                self._engine.run("training")
                loss += float(arrays["loss"])
                correct += arrays["correct"]
            if not math.isfinite(loss):
                raise EdgeBcsError(f"the loss of step {self.steps} is {loss}; lower the learning rate.")
            self._check_gradients()
            self.run_optimizer_only()
        except BaseException:
            for name in rollback:
                arrays[f"batchnorm.{name}"][...] = arrays[f"rollback.{name}"]
            raise
        metrics = {"loss": loss, "accuracy": float(correct[0]) / count}
        if objective.two_branches:
            metrics["robust_accuracy"] = float(correct[1]) / count
        elif objective.name == "at":
            metrics["robust_accuracy"] = metrics["accuracy"]
        return metrics

    def _load(self, x: Array, y: Array, weight: float) -> None:
        """Put a micro-batch into the bound buffers; the places it leaves empty weigh nothing."""
        arrays, count = self._engine.arrays, len(x)
        arrays["input"][:count], arrays["input"][count:] = x, 0
        arrays["labels"][:count], arrays["labels"][count:] = y, 0
        arrays["sample_weight"][:count], arrays["sample_weight"][count:] = weight, 0

    def _craft(self, count: int, first: int, batch: int) -> None:
        """Fill the buffer `adversarial` for the training graph (Algorithm 1, line 5)."""
        arrays, objective = self._engine.arrays, self.artifact.objective
        attacked = {"natural": 0, "mixed": batch // 2}.get(objective.name, batch)
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

    def _check_gradients(self) -> None:
        """Refuse what would make the update overflow, before the optimizer changes anything."""
        for name in ("coo", "dense"):
            gradient = self._engine.arrays[f"{name}.value_grad.accumulation.buffer"]
            if gradient.size and not max(-float(gradient.min()), float(gradient.max())) < _LARGEST_GRADIENT:
                raise EdgeBcsError(
                    f"the gradient of {name}.value in step {self.steps} is not finite or beyond "
                    f"{_LARGEST_GRADIENT:g}; lower the learning rate."
                )

    def run_optimizer_only(self) -> None:
        """Update and rewire with the gradients that the buffers hold, and count a step (for benchmarks)."""
        arrays = self._engine.arrays
        arrays["hyper"][...] = (self.learning_rate, self.weight_decay, self.momentum, self.noise)
        arrays["counter"][...] = np.array([self.seed, self.steps], np.uint64).view(np.int64)
        self._engine.run("optimizer")
        self.steps += 1

    def _checked(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Validate a batch and return it as f32 and i64."""
        x = self._checked_images(x)
        y = np.asarray(y)
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise EdgeBcsError(
                f"labels must be whole numbers of shape [{len(x)}], not {y.dtype}{list(y.shape)}."
            )
        if y.min() < 0 or y.max() >= self.artifact.num_classes:
            wrong = y[(y < 0) | (y >= self.artifact.num_classes)][0]
            raise EdgeBcsError(
                f"label {wrong} is out of range: the network has {self.artifact.num_classes} classes."
            )
        return x, y.astype(np.int64)

    def _checked_images(self, x: Array) -> Array:
        x, shape = np.asarray(x), self.artifact.input_shape
        if x.ndim != 4 or x.shape[1:] != shape or len(x) == 0:
            raise EdgeBcsError(
                f"images must have the shape [n, {', '.join(map(str, shape))}], not {list(x.shape)}."
            )
        if x.dtype.kind != "f":
            raise EdgeBcsError(
                f"images must be floating-point numbers in [0, 1], not {x.dtype}: divide by 255."
            )
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            found = (
                "a pixel is not a finite number"
                if not math.isfinite(low + high)
                else f"they reach {low} to {high}"
            )
            raise EdgeBcsError(f"images must lie in [0, 1], but {found}.")
        return x.astype(np.float32, copy=False)

    # Whole trainings

    def fit(
        self,
        data: Data,
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
        save_seconds: float = 60.0,
    ) -> Metrics:
        """Train for a number of epochs or steps, streaming ``data``; after `resume`, finish the saved
        training.

        Learning rate and weight decay are divided by 10 at 50 % and again at 75 % of the steps.

        Args:
            data: see `Data`; read one micro-batch at a time.
            epochs, steps: how long, counted from where this training began; default: one epoch.
            batch_size: images per optimizer step; default: the artifact's.
            learning_rate: the first learning rate, to which weight decay keeps its ratio; default: the
                artifact's.
            augment: shift and flip the images.
            progress: write a line of progress to standard error.
            metrics: file to which one JSON object per step is appended.
            on_step: called with the same object after every step.
            save: run folder to save into, at most every ``save_seconds`` and at the end.

        Returns:
            the means over the last epoch's worth of steps, "step", "seconds", "milliseconds_per_step",
            "peak_bytes".
        """
        plan = self._plan(data, epochs, steps, batch_size, learning_rate)
        batch, samples = int(plan["batch_size"]), int(plan["samples"])
        per_epoch = -(-samples // batch)
        began = saved = time.monotonic()
        history: deque[Metrics] = deque(maxlen=per_epoch)  # the last epoch's worth of steps
        order, order_epoch = None, -1
        stream = None if metrics is None else _open_for_lines(Path(metrics))
        try:
            while (done := self.steps - plan["first_step"]) < plan["total_steps"]:
                epoch = plan["first_epoch"] + done // per_epoch
                if order is None or order_epoch != epoch:
                    order, order_epoch = data.order(self.seed, epoch), epoch
                chosen = order[done % per_epoch * batch :][:batch]
                self._schedule(plan, done)
                started = time.perf_counter()
                result = self._step(self._reader(data, chosen, epoch, augment), len(chosen))
                record = {
                    "step": self.steps,
                    "epoch": epoch,
                    "done": done + 1,
                    "total": plan["total_steps"],
                    **result,
                    "learning_rate": self.learning_rate,
                    "milliseconds": 1e3 * (time.perf_counter() - started),
                    "peak_bytes": self._engine.budget.peak,
                }
                history.append(record)
                if stream is not None:
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
                if on_step is not None:
                    on_step(record)
                if progress:
                    _show_progress(record)
                if save is not None and time.monotonic() - saved >= save_seconds:
                    self.save(save)
                    saved = time.monotonic()
        finally:
            if stream is not None:
                stream.close()
            if progress and history:
                sys.stderr.write("\n")
        if save is not None:
            self.save(save)
        seconds = time.monotonic() - began
        names = ("loss", "accuracy", "robust_accuracy")
        return {
            **{
                name: float(np.mean([r[name] for r in history]))
                for name in names
                if history and name in history[0]
            },
            "step": self.steps,
            "seconds": seconds,
            "milliseconds_per_step": float(np.mean([r["milliseconds"] for r in history])) if history else 0.0,
            "peak_bytes": self._engine.budget.peak,
        }

    def _plan(
        self,
        data: Data,
        epochs: int | None,
        steps: int | None,
        batch_size: int | None,
        learning_rate: float | None,
    ) -> dict[str, Any]:
        """Where this training begins and ends: a new one, or after `resume` the saved one."""
        self._check_data(data)
        saved = self._progress if self._continues else None
        previous = self._progress
        if epochs is not None and steps is not None:
            raise EdgeBcsError("give the length in epochs or in steps, not both.")
        for name, value in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise EdgeBcsError(f"{name} must be at least 1, not {value}.")
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
            raise EdgeBcsError(f"the learning rate must be a positive number, not {learning_rate}.")
        if saved is not None:
            if saved["samples"] != len(data) or batch_size not in (None, saved["batch_size"]):
                raise EdgeBcsError(
                    f"the saved training used {saved['samples']} images in batches of {saved['batch_size']}; "
                    "resume it with the same data and batch size, or start a new one."
                )
            plan = dict(saved)
        else:
            batch = batch_size or self.artifact.batch_size
            first_epoch = 0
            if previous is not None:
                behind = self.steps - previous["first_step"]
                first_epoch = previous["first_epoch"] + -(
                    -behind // -(-previous["samples"] // previous["batch_size"])
                )
            plan = {
                "first_step": self.steps,
                "first_epoch": first_epoch,
                "batch_size": batch,
                "samples": len(data),
                "learning_rate": self.artifact.hyper["learning_rate"],
                "total_steps": -(-len(data) // batch),
            }
        if learning_rate is not None:
            plan["learning_rate"] = learning_rate
        if epochs is not None:
            plan["total_steps"] = epochs * -(-plan["samples"] // plan["batch_size"])
        elif steps is not None:
            plan["total_steps"] = steps
        self._progress, self._continues = plan, False
        return plan

    def _schedule(self, plan: dict[str, Any], done: int) -> None:
        """Set λ and λ_w of the next step: a tenth from 50 % on, a hundredth from 75 % on."""
        divisor = (
            100.0 if 4 * done >= 3 * plan["total_steps"] else 10.0 if 2 * done >= plan["total_steps"] else 1.0
        )
        self.learning_rate = plan["learning_rate"] / divisor
        # The decay is not multiplied by the learning rate (Algorithm 1), so it must follow it here.
        hyper = self.artifact.hyper
        ratio = plan["learning_rate"] / hyper["learning_rate"] if hyper["learning_rate"] else 1.0
        self.weight_decay = hyper["weight_decay"] * ratio / divisor

    def _reader(self, data: Data, chosen: Array, epoch: int, augment: bool) -> Reader:
        def read(first: int, end: int) -> tuple[Array, Array]:
            return self._checked(*data.read(chosen[first:end], seed=self.seed, epoch=epoch, augment=augment))

        return read

    def _check_data(self, data: Data) -> None:
        if len(data) == 0:
            raise EdgeBcsError("the data set is empty.")
        if tuple(data.shape) != self.artifact.input_shape:
            raise EdgeBcsError(
                f"the network takes {self.artifact.input_shape} images; the data has {tuple(data.shape)}."
            )
        if len(data.classes) > self.artifact.num_classes:
            raise EdgeBcsError(
                f"the data has {len(data.classes)} classes and the network "
                f"{self.artifact.num_classes}; export it with --classes {len(data.classes)}."
            )

    # Looking at the result

    def logits(self, x: Array) -> Array:
        """Return the logits f32 [n, classes] of images f32 [n, C, H, W] in [0, 1]."""
        x = self._checked_images(x)
        size, arrays = self.artifact.micro_batch, self._engine.arrays
        result = np.empty((len(x), self.artifact.num_classes), np.float32)
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
        data: Data,
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
            data: see `Data`.
            attack_steps: of PGD on the cross-entropy, with steps of 2.5·ε/steps and a
                uniform
                start; 0 measures clean accuracy alone.
            attack: "pgd", or "fgsm" for one step of size ε from the image itself.
            limit: only so many images, the first of a fixed shuffle.
            epsilon: radius of the attack; default: the artifact's.
            restarts: an image counts as robust if none of so many attacks fools the network.
            on_batch: called with (images done, all images).
        """
        self._check_data(data)
        if attack not in ("pgd", "fgsm"):
            raise EdgeBcsError(f"the board evaluates with pgd or fgsm, not {attack!r}.")
        if attack == "fgsm":
            attack_steps, restarts = min(attack_steps, 1), 1
        if attack_steps < 0 or restarts < 1 or (limit is not None and limit < 1):
            raise EdgeBcsError("attack steps must be at least 0, restarts and limit at least 1.")
        order = data.order(0, 0, shuffle=limit is not None)[:limit]
        arrays, size = self._engine.arrays, self.artifact.micro_batch
        epsilon = self.artifact.objective.epsilon if epsilon is None else epsilon
        if not 0 <= epsilon <= 1:
            raise EdgeBcsError(f"epsilon must lie in [0, 1], not {epsilon}.")
        clean = robust = 0
        for first in range(0, len(order), size):
            x, y = self._checked(*data.read(order[first : first + size]))
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
                        step_size=(1.0 if attack == "fgsm" else 2.5 / attack_steps) * epsilon,
                        start="none" if attack == "fgsm" else "uniform",
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
        metrics: Metrics = {"accuracy": clean / len(order), "samples": len(order)}
        if attack_steps:
            metrics |= {
                "robust_accuracy": robust / len(order),
                "attack_steps": attack_steps,
                "restarts": restarts,
            }
        return metrics

    def state(self) -> dict[str, Array]:
        """Return copies of the seven tensors of the state by name ("coo.value", "coo.index", …)."""
        return {name: self._engine.arrays[name].copy() for name in state_layout(self.artifact)}

    def save(self, path: str | Path) -> None:
        """Save a run folder, atomically and durably (runtime/state.py); it is itself a complete artifact.

        Raises EdgeBcsError if the folder belongs to something else, or the medium is full or read-only.
        """
        metadata = {"step": str(self.steps), "seed": str(self.seed)}
        if self._progress is not None:
            metadata["progress"] = json.dumps(self._progress, sort_keys=True)
        write_run(path, self.artifact, self._engine.arrays, metadata)

    def memory(self) -> dict[str, int | bool | None]:
        """Return what memory is in use, in bytes.

        "bound_bytes": the bound buffers; "current_bytes" and "peak_bytes": the working set now and at most
        since the Trainer was opened; "cap_bytes" or None; "exact": whether every tensor is counted;
        "rss_bytes": the whole process with interpreter and libraries, which no cap covers.
        """
        budget = self._engine.budget
        return {
            "bound_bytes": self._engine.bound_bytes,
            "current_bytes": budget.current,
            "peak_bytes": budget.peak,
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

    def _restore_progress(self, text: str | None) -> None:
        if text is None:
            return
        names = {"first_step", "first_epoch", "batch_size", "samples", "total_steps"}
        try:
            progress = json.loads(text)
            valid = set(progress) == names | {"learning_rate"} and math.isfinite(progress["learning_rate"])
            valid = valid and all(type(progress[name]) is int and progress[name] >= 0 for name in names)
            valid = valid and progress["batch_size"] > 0 and progress["first_step"] <= self.steps
        except (ValueError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise EdgeBcsError(f"{self.artifact.path}: the saved position of the training is damaged.")
        self._progress, self._continues = progress, True


def _open_for_lines(file: Path) -> TextIO:
    try:
        return file.open("a", encoding="utf-8")
    except OSError as error:
        raise EdgeBcsError(f"the metrics file {file} cannot be written: {error.strerror}.") from None


def _show_progress(record: Metrics) -> None:
    """Rewrite one line on a terminal; elsewhere write one line every tenth of the way."""
    done, total = int(record["done"]), int(record["total"])
    terminal = sys.stderr.isatty()
    if not terminal and done % max(1, total // 10) and done != total:
        return
    robust = f"  robust {100 * record['robust_accuracy']:.1f} %" if "robust_accuracy" in record else ""
    line = (
        f"step {done}/{total}  loss {record['loss']:.4f}  accuracy {100 * record['accuracy']:.1f} %{robust}"
    )
    sys.stderr.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
    sys.stderr.flush()
