"""Training from scratch on the host: schedules, selection, checkpoints and resumption around one step.

Every random number is a function of the seed and the step, and a checkpoint holds the whole state, so a
training that was interrupted (by kill -9, too) and resumed on the same machine ends with the same bits as
one that was not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.metadata import parse_json, parse_object
from edge_bcs.core.metrics import keep_lines
from edge_bcs.core.objectives import PSEUDO_LABELLED, Objective, objective_named
from edge_bcs.core.progress import Progress
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.adapt import batch_size_of, dataset_of
from edge_bcs.data.classes import check_names, completed, match, say, shown
from edge_bcs.data.dataset import Data, Dataset, check_finite, check_pixels
from edge_bcs.data.pseudo_labelled import open_pseudo_labelled
from edge_bcs.exportable import warn_if_not_exportable
from edge_bcs.method.attacks import evaluation_mode, input_gradient
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import REWIRE, Hyper
from edge_bcs.training.backends import Backend, Batch, Numbers, open_backend
from edge_bcs.training.devices import choose_device
from edge_bcs.training.plan import TrainingPlan, default_precision, divisor
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.updates import Rewiring, Update

__all__ = ["METHODS", "Part", "TrainingPlan", "divisor", "run_plan", "train"]

METHODS = ("bcs", "random", "fixed", "dense")
BEST = "checkpoint.safetensors"
LAST = "last.safetensors"
STEPS = "metrics.jsonl"
EPOCHS = "epochs.jsonl"
_CACHED_BYTES = 2**31
_CHECKED_IMAGES = 64
_LONGEST_LINE = 1 << 20
_CUT = (
    "the network is cut: its answers do not depend on the image, and no gradient will reach its first "
    "layers; choose a lower sparsity, a wider network, another distribution or another seed"
)
# The shuffle of the held-out split is that of an epoch which no training reaches.
_SPLIT_EPOCH = 1 << 55


def train(
    sparse: SparseModel,
    data: Any,
    *,
    input_shape: Sequence[int] | None = None,
    objective: str = "at",
    method: str = "bcs",
    rewire: str = "uniform",
    engine: str = "torch",
    epochs: int = 200,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    schedule: str = "steps",
    momentum: float = 0.9,
    noise: float = 1e-6,
    beta: float | None = None,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    attack_steps: int = 10,
    batch_norm: str = "batch",
    augment: bool = True,
    pseudo_labelled: Any = None,
    validation: float = 0.02,
    seed: int | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    compile: bool = False,
    threads: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    save_seconds: float = 60.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a sparse network (Algorithm 1), and leave it with the weights of its best epoch.

    The best epoch has the highest robust accuracy (PGD with the training attack; clean accuracy for natural
    training) on images of the training data that are held out for it. Under torchrun all processes train one
    network (see `edge_bcs.training.replicas`), and the first writes.

    Args:
        sparse: what `sparsify` returned; trained in place. Its `classes` are matched with the data's by name
            (edge_bcs/data/classes.py); where it has none, it gets the data's.
        data: a data set of `edge_bcs.data`; (images, labels), arrays or tensors: floats [N, C, H, W] in
            [0, 1], or u8, which are divided by 255, and whole numbers; "digits" or a path; a map-style torch
            Dataset of (image, label), or a DataLoader of one. Of a loader its dataset and its batch size
            count, its order does not: every epoch has one of its own (see `edge_bcs.data.adapt`).
        input_shape: (C, H, W) to which the images of a path are brought; what the network was made for if
            None, which networks of `edge_bcs.models` say.
        objective: natural, at, mixed, trades, rst or mart.
        method: "bcs", or a baseline with a static mask: "random" and "fixed" (the mask is that of `sparse`,
            see `connectivity.sparsify` and `connectivity.fixed`) or "dense" (a network of sparsity 0);
            baselines have neither rewiring nor noise nor a constraint on signs.
        rewire: "uniform" (Algorithm 1) or "by-layer" (the released code).
        engine: "torch", or "sparse": through the compiled artifact, many times faster on a CPU for a sparse
            network, with the same options and the same checkpoints (see `training.backends.CompiledBackend`).
        epochs: passes over the data that is not held out; a last batch that is not full is left out.
        steps: end after so many steps instead.
        batch_size: images a step; if None that of the DataLoader, or 128, or 256 for rst, half of them from
            `pseudo_labelled`.
        learning_rate, weight_decay, momentum, noise: λ, λ_w (decoupled, not scaled by λ), μ and σ.
        schedule: "steps" (both rates divided by 10 at 50 % and at 75 %) or "cosine" (λ falls to 0).
        beta: weight of the objective's second term; its default if None.
        epsilon, step_size, attack_steps: PGD while training, in units of pixels in [0, 1].
        batch_norm: "batch", or "frozen" for running statistics throughout (fine-tuning).
        augment: shift by up to ±10 % and flip.
        pseudo_labelled: the second data set of rst, of the same kinds; a path is read whole (an .npz).
        validation: fraction of the data that is held out; with 0 the last epoch is kept.
        seed: of order, augmentation and attack; the network's if None.
        device: where to train; a GPU if there is one.
        precision: "f32" or "bf16" (autocast; weights and updates stay f32); bf16 on a GPU if None.
        compile: compile the network with torch.compile; the minutes that takes are worth it on a GPU.
        threads: of the sparse engine; all processors of this process if None.
        output: folder for checkpoint.safetensors (best epoch), last.safetensors (newest state),
            metrics.jsonl (a line for each step) and epochs.jsonl (a line for each epoch, with the
            connections of each layer).
        resume: continue what `output` holds; what was interrupted before its first save begins anew.
        save_seconds: time between saves of the newest state; it is also saved at the end of each epoch.
        progress: show on standard error how far it is: a bar, or a line every ten seconds.

    Returns:
        the last line of epochs.jsonl, with "best_epoch", "best_step", "best_robust_acc", "best_clean_acc",
        "step", "seconds", "warnings" (sentences: a network in which nothing leads from image to answer),
        "classes", "matched_by" and "missing_classes" (see `classes.Match`).

    Raises:
        EdgeBcsError: an argument out of range, a device that is not there, rst without its second data set,
            data that does not fit, a class that the network does not know, a pixel beyond [0, 1] or not
            finite, a checkpoint of another plan, an output folder into which another process trains or in
            which something would be written over, or a step that would make a weight that is not finite.
    """
    described = objective_named(objective)
    batch_size = batch_size_of(data) if batch_size is None else batch_size
    data = dataset_of(data, shape=input_shape or sparse.input_shape)
    if pseudo_labelled is not None:
        pseudo_labelled = _second(pseudo_labelled, data.shape)
    _check(described, method, rewire, batch_norm, data, pseudo_labelled)
    target = choose_device("cpu" if device is None and engine == "sparse" else device)
    replicas = Replicas.join(target)
    static = method != "bcs"
    plan = TrainingPlan(
        objective=objective,
        beta=described.beta if beta is None else beta,
        method=method,
        rewire="none" if static else rewire,
        engine=engine,
        processes=replicas.count,
        epochs=epochs,
        steps=steps,
        batch_size=described.batch_size if batch_size is None else batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        momentum=momentum,
        noise=0.0 if static else noise,
        epsilon=epsilon,
        step_size=step_size,
        attack_steps=attack_steps,
        batch_norm=batch_norm,
        precision=precision or default_precision(target),
        augment=augment,
        validation=validation,
        samples=len(data),
        seed=sparse.seed if seed is None else seed,
    )
    return run_plan(
        sparse,
        data,
        plan,
        Rewiring(plan.rewire),
        pseudo_labelled=pseudo_labelled,
        device=target,
        compile=compile,
        threads=threads,
        output=output,
        resume=resume,
        save_seconds=save_seconds,
        progress=progress,
    )


def _second(pseudo_labelled: Any, shape: tuple[int, int, int]) -> Data:
    if isinstance(pseudo_labelled, (str, PathLike)):
        return open_pseudo_labelled(Path(pseudo_labelled), shape)
    return dataset_of(pseudo_labelled)


def run_plan(
    sparse: SparseModel,
    data: Data,
    plan: TrainingPlan,
    update: Update,
    *,
    pseudo_labelled: Data | None = None,
    device: torch.device,
    compile: bool = False,
    threads: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    save_seconds: float = 60.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train as `plan` says, with any update; arguments, result and refusals are those of `train`."""
    if resume and output is None:
        raise EdgeBcsError("a training can only be resumed from the output folder that it wrote")
    replicas = Replicas.join(device)
    sparse.to(device)
    replicas.start_alike(sparse)
    run = _Run(sparse, data, pseudo_labelled, plan, update, replicas)
    if sparse.own:
        sparse.input_shape = data.shape
    if replicas.first:
        warn_if_not_exportable(sparse, data.shape, depth=4)
    names_before, sparse.classes = sparse.classes, run.classes
    began = False
    try:
        run.begin(
            open_backend(
                sparse,
                plan,
                run.objective,
                update,
                shape=data.shape,
                replicas=replicas,
                threads=threads,
            )
        )
        if output is not None:
            run.open(Path(output), resume)
        if compile:
            sparse.network.compile()
        run.backend.load(run.step)
        began = True
        return run.train(save_seconds, progress and replicas.first)
    except BaseException:  # such as KeyboardInterrupt: the network is left with the steps that were done
        if began:
            with contextlib.suppress(EdgeBcsError):
                run.backend.store()
        raise
    finally:
        with HeldSignals() as signals:
            signals.hold()
            if not began:
                sparse.classes = names_before
            sparse.network._compiled_call_impl = None
            sparse.eval()
            run.close()


def _check(
    objective: Objective,
    method: str,
    rewire: str,
    batch_norm: str,
    data: Data,
    pseudo_labelled: Data | None,
) -> None:
    if method not in METHODS:
        raise EdgeBcsError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    if rewire not in REWIRE:
        raise EdgeBcsError(f"rewire is 'uniform' or 'by-layer', not {rewire!r}")
    if batch_norm not in ("batch", "frozen"):
        raise EdgeBcsError(f"batch norm is either batch or frozen, not {batch_norm!r}")
    if objective.pseudo_labelled and pseudo_labelled is None:
        raise EdgeBcsError(f"{objective.name} needs a second, pseudo-labelled data set (pseudo_labelled=)")
    if pseudo_labelled is not None and not objective.pseudo_labelled:
        choices = " or ".join(PSEUDO_LABELLED)
        raise EdgeBcsError(
            f"{objective.name} has no use for pseudo-labelled data; choose the objective {choices}"
        )
    for part in (data, pseudo_labelled):
        if part is not None and len(part) == 0:
            raise EdgeBcsError("the data set is empty")
    if pseudo_labelled is not None and tuple(pseudo_labelled.shape) != tuple(data.shape):
        raise EdgeBcsError(
            f"the pseudo-labelled images have the shape {list(pseudo_labelled.shape)}, the others "
            f"{list(data.shape)}"
        )


class _Run:
    """One training: where it is, what it reads, what it has written."""

    def __init__(
        self,
        sparse: SparseModel,
        data: Data,
        pseudo_labelled: Data | None,
        plan: TrainingPlan,
        update: Update,
        replicas: Replicas,
    ) -> None:
        self.sparse, self.plan, self.update, self.replicas = sparse, plan, update, replicas
        self.objective: Objective = objective_named(plan.objective)
        self._backend: Backend | None = None
        held = round(plan.validation * len(data)) if plan.validation else 0
        if held >= len(data):
            raise EdgeBcsError(f"{len(data)} images are too few to hold {held} of them out")
        split = data.order(plan.seed, _SPLIT_EPOCH)
        kept, held_out = np.sort(split[held:]), np.sort(split[:held])
        self.warnings: list[str] = []
        outputs = self._outputs(data, kept[:_CHECKED_IMAGES])
        known = sparse.classes
        if known is not None:
            known = completed(check_names(known, "the network's classes"), outputs)
        matched = match(data, known, outputs, naming=True, trained=sparse.step > 0)
        self.classes, self.matching = matched.classes, matched.report()
        self.data = Part(matched.data, kept)
        self.held_out = Part(matched.data, held_out) if held else None
        self.pseudo_labelled = None
        notes = matched.notes
        if pseudo_labelled is not None:
            second = match(pseudo_labelled, self.classes, outputs)
            self.pseudo_labelled = Part(second.data, np.arange(len(pseudo_labelled)))
            notes += tuple(f"the pseudo-labelled data: {note}" for note in second.notes)
        if replicas.first:
            say(notes)
        self.labelled = plan.batch_size // 2 if pseudo_labelled is not None else plan.batch_size
        self.per_epoch = max(1, len(self.data) // max(1, self.labelled))
        self.total = plan.steps or plan.epochs * self.per_epoch
        self._check_batches()
        self.step = 0
        self.best: dict[str, Any] = {}
        self.best_state = sparse.state()
        self.output: Path | None = None
        self._lines: IO[str] | None = None
        self._lock: FolderLock | None = None
        # Loss, correct answers of up to two branches, deaths; over the steps of an epoch.
        self._sums = np.zeros(4)
        # Steps whose numbers have not been read: what they are about, when they began, how to read them.
        self._pending: deque[tuple[dict[str, Any], int, float, Callable[[], Numbers]]] = deque()
        self._settled_at = 0.0

    def _outputs(self, data: Data, positions: NDArray[Any]) -> int:
        """Return how many answers the network has; raise `EdgeBcsError` unless it takes these images.

        Also warn of a network in which no path leads from the image to the answer. Rewiring cannot mend it:
        without a gradient no connection dies.
        """
        images = Part(data, positions).images(np.arange(len(positions)))
        x = torch.from_numpy(images).to(self.sparse.index.device)
        try:
            with evaluation_mode(self.sparse):
                outputs = int(self.sparse(x[:1]).shape[1])
                # Of differently weighted logits: those of equally weighted ones might cancel.
                if not input_gradient(self.sparse, x, lambda logits: logits.cumsum(1)).any():
                    self.warnings.append(_CUT)
        except RuntimeError:
            raise EdgeBcsError(f"the network does not take images of the shape {list(data.shape)}") from None
        return outputs

    def _check_batches(self) -> None:
        images = min(self.labelled, len(self.data)) + self.plan.batch_size - self.labelled
        normalised = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in self.sparse.modules())
        if normalised and self.plan.batch_norm == "batch" and images < 2 * self.replicas.count:
            raise EdgeBcsError(
                f"a batch of 1 image has no statistics ({len(self.data)} images to train on, batches of "
                f"{self.plan.batch_size}): take larger batches, more images, or batch norm frozen"
            )
        smallest = self.plan.batch_size // (2 if len(self._bounds(self.plan.batch_size)) == 3 else 1)
        if smallest < self.replicas.count:
            raise EdgeBcsError(
                f"batches of {self.plan.batch_size} images are too few for {self.replicas.count} processes"
            )

    # The output folder.

    def open(self, output: Path, resume: bool) -> None:
        """Start a folder, or continue the one that is there; only the first replica writes.

        A training that was killed before its first save left lines of metrics alone: it begins anew.
        """
        if self.replicas.first:
            self._lock = FolderLock(output)
        last = output / LAST
        if resume and (last.exists() or not (output / STEPS).exists()):
            if not last.exists():
                raise EdgeBcsError(f"{output} holds no training to resume; without resume one begins there")
            self._continue(last)
        else:
            _check_new(output, self.plan)
        if not self.replicas.first:
            return
        self.output = output
        try:
            output.mkdir(parents=True, exist_ok=True)
            for name in (STEPS, EPOCHS):
                keep_lines(output / name, self.step)
            self._lines = (output / STEPS).open("a", encoding="utf-8")
        except OSError as error:
            raise EdgeBcsError(f"{output} cannot be written: {error.strerror or error}") from None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the backend is opened before anything is asked of it"
        return self._backend

    def begin(self, backend: Backend) -> None:
        self._backend = backend

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        if self._lines is not None:
            self._lines.close()
        if self._lock is not None:
            self._lock.release()

    def _continue(self, last: Path) -> None:
        checkpoint = read_checkpoint(last)
        try:
            plan = parse_object(checkpoint.metadata["plan"])
            best = parse_object(checkpoint.metadata["best"])
            sums = np.array(parse_json(checkpoint.metadata["sums"]), np.float64)
            network = checkpoint.network()
            if sums.shape != self._sums.shape or (best and type(best["best_step"]) is not int):
                raise ValueError
        except (KeyError, ValueError, TypeError):
            raise EdgeBcsError(f"{last} was not written by a training") from None
        for name, value in asdict(self.plan).items():
            if plan.get(name) != value:
                raise EdgeBcsError(
                    f"{last.parent} was begun with {name} {plan.get(name)!r}, not {value!r}; resume it as it "
                    "was begun, or choose another folder"
                )
        names = ("name", "arguments")
        same = all(network.get(name) == self.sparse.record.get(name) for name in names)
        if not same or checkpoint.seed != self.sparse.seed:
            begun = str(network.get("name"))[:60]
            if isinstance(made := network.get("factory"), str):
                begun += f" (made by {made[:200]})"
            raise EdgeBcsError(
                f"{last.parent} was begun with the network {begun} and the seed {checkpoint.seed}, not with "
                f"{self.sparse.record['name']} and the seed {self.sparse.seed}; resume it as it was begun, "
                "or choose another folder"
            )
        stored = checkpoint.classes
        if stored is not None and stored != self.classes:
            raise EdgeBcsError(
                f"{last.parent} was begun with the classes {shown(stored)}, not {shown(self.classes or ())}; "
                "resume it as it was begun, or choose another folder"
            )
        self.sparse.load_state(checkpoint.tensors)
        self.update.load_state(checkpoint.tensors)
        self.step, self.best, self._sums = checkpoint.step, best, sums
        self.sparse.step = self.step
        if best:
            self.best_state = read_checkpoint(last.parent / BEST).tensors

    def _save(self, name: str) -> None:
        if self.output is not None:
            save_checkpoint(
                self.output / name,
                self.sparse,
                metadata={
                    "objective": self.plan.objective,
                    "plan": json.dumps(asdict(self.plan)),
                    "sums": json.dumps(self._sums.tolist()),
                    "best": json.dumps(self.best),
                },
                more=self.update.state() if name == LAST else None,
            )

    # The loop.

    def train(self, save_seconds: float, progress: bool) -> dict[str, Any]:
        began = saved = time.monotonic()
        report: dict[str, Any] = dict(self.best)
        order: NDArray[Any] | None = None
        with Progress("training", self.total, done=self.step, unit="steps", shown=progress) as bar:
            for text in self.warnings:
                bar.say(f"warning: {text}")

            def settle(allowed: int) -> None:
                while len(self._pending) > allowed:
                    line = self._settle()
                    described = f"epoch {line['epoch'] + 1}, loss {line['loss']:.3f}"
                    bar.update(line["step"], text=f"{described}, accuracy {100 * line['accuracy']:.1f} %")

            while self.step < self.total:
                epoch, batch = divmod(self.step, self.per_epoch)
                if order is None or batch == 0:
                    order = self.data.order(self.plan.seed, epoch)
                self._one_step(epoch, order[batch * self.labelled : (batch + 1) * self.labelled])
                settle(self.backend.lag)
                if batch + 1 == self.per_epoch or self.step == self.total:
                    settle(0)
                    report = self._end_of_epoch(epoch, batch + 1)
                    saved = time.monotonic()
                elif time.monotonic() - saved >= save_seconds:
                    settle(0)
                    self._flush()
                    self.backend.store()
                    self._save(LAST)
                    saved = time.monotonic()
        if self.best:
            with HeldSignals() as signals:
                signals.hold()
                self.sparse.load_state(self.best_state)
                self.sparse.step = self.best["best_step"]
        seconds = time.monotonic() - began
        about = {"seconds": seconds, "warnings": self.warnings, **self.matching}
        return {**report, **self.best, "step": self.step, **about}

    def _one_step(self, epoch: int, positions: NDArray[Any]) -> None:
        """Begin one step of Algorithm 1; `_settle` tells how it went."""
        started = time.perf_counter()
        batch = self._read(epoch, positions)
        rate, decay = self.plan.rates(self.step, self.total)
        hyper = Hyper(
            learning_rate=rate, weight_decay=decay, momentum=self.plan.momentum, noise=self.plan.noise
        )
        with HeldSignals() as signals:
            numbers = self.backend.step(batch, hyper, self.step, signals)
            self.step += 1
            about = {"step": self.step, "epoch": epoch, "learning_rate": rate}
            self._pending.append((about, batch.whole, started, numbers))

    def _settle(self) -> dict[str, Any]:
        """Read the numbers of the oldest step whose numbers are unread, and write its line of metrics."""
        about, images, started, read = self._pending.popleft()
        numbers = read()
        shares = [count / images for count in numbers.correct]
        line = {"step": about["step"], "epoch": about["epoch"], "loss": numbers.loss, "accuracy": shares[0]}
        if self.objective.two_branches:
            line["robust_accuracy"] = shares[1]
        elif self.objective.accuracy_is_robust:
            line["robust_accuracy"] = shares[0]
        self._sums += [numbers.loss, shares[0], shares[-1], numbers.deaths]
        now = time.perf_counter()
        seconds, self._settled_at = now - max(started, self._settled_at), now
        line |= {"deaths": numbers.deaths, "learning_rate": about["learning_rate"]}
        line["milliseconds"] = 1e3 * seconds
        if self._lines is not None:
            self._lines.write(json.dumps(line) + "\n")
        return line

    def _bounds(self, whole: int) -> list[int]:
        """Return where the parts of a batch begin and end that replicas share one by one: all, or two halves.

        Mixed batches are half adversarial, those of rst half pseudo-labelled: every replica gets of both.
        """
        halves = self.objective.adversarial_part == 0.5 or self.pseudo_labelled is not None
        return [0, whole // 2, whole] if halves and self.replicas.count > 1 else [0, whole]

    def _read(self, epoch: int, positions: NDArray[Any]) -> Batch:
        """Return this replica's share of a batch."""
        seed, augment = self.plan.seed, self.plan.augment
        labelled = len(positions)
        more = self.plan.batch_size - self.labelled
        bounds = self._bounds(labelled + more)
        segments = [self.replicas.share(begin, end) for begin, end in itertools.pairwise(bounds)]
        parts = []
        for begin, end in segments:
            if begin < labelled:
                chosen = positions[begin : min(end, labelled)]
                parts.append(self.data.read(chosen, seed=seed, epoch=epoch, augment=augment))
            if end > labelled and self.pseudo_labelled is not None:
                first = max(begin, labelled) - labelled
                for lap, chosen in _laps(
                    self.pseudo_labelled, seed, self.step * more + first, end - labelled - first
                ):
                    parts.append(self.pseudo_labelled.read(chosen, seed=seed + 1, epoch=lap, augment=augment))
        images = parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        places = [(begin, end - begin) for begin, end in segments]
        return Batch(images, labels, places, labelled + more)

    def _end_of_epoch(self, epoch: int, steps: int) -> dict[str, Any]:
        """Evaluate on the held-out images, keep the best state, write everything."""
        mean = self._sums / steps
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "loss": float(mean[0]),
            "accuracy": float(mean[1]),
            "deaths": float(mean[3]),
        }
        if self.objective.two_branches:
            line["robust_accuracy"] = float(mean[2])
        self._sums = np.zeros(4)
        better = True
        self.update.end_of_epoch(self.sparse, epoch)
        if self.held_out is not None:
            clean, robust = self.backend.evaluate(self.held_out)
            line |= {"validation_clean_acc": clean, "validation_robust_acc": robust}
            chosen = clean if robust is None else robust
            better = chosen >= self.best.get("best_score", -1.0)
            if better:
                self.best = {
                    "best_epoch": epoch,
                    "best_step": self.step,
                    "best_score": chosen,
                    "best_clean_acc": clean,
                    "best_robust_acc": robust,
                }
        else:
            self.best = {"best_epoch": epoch, "best_step": self.step}
        self.backend.store()
        self.replicas.check_agreement(self.sparse)
        line["connections"] = self.sparse.layer_counts()
        if better:
            self.best_state = self.sparse.state()
            self._save(BEST)
        if self.output is not None:
            self._flush()
            with (self.output / EPOCHS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        self._save(LAST)
        return line

    def _flush(self) -> None:
        if self._lines is not None:
            self._lines.flush()


class Part(Dataset):
    """Some positions of a data set, whose pixels are checked when they are read.

    Pixels that are multiples of 1/255 stay in memory, unless the data may give others the next time.
    """

    def __init__(self, data: Data, positions: NDArray[Any]) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels[positions]
        self._data, self._where = data, positions
        kept = len(positions) * math.prod(data.shape) <= _CACHED_BYTES and not getattr(data, "varies", False)
        self._pixels = np.empty((len(positions), *data.shape), np.uint8) if kept else None
        self._known = np.zeros(len(positions), dtype=bool)

    def images(self, positions: NDArray[Any]) -> NDArray[Any]:
        """Return the images f32 [m, C, H, W] in [0, 1] at positions i64[m] of this part, as they are."""
        missing = positions[~self._known[positions]]
        if self._pixels is not None and len(missing):
            images = self._read(missing)
            pixels = np.rint(images * 255).astype(np.uint8)
            if np.array_equal(pixels.astype(np.float32) / np.float32(255), images):
                self._pixels[missing], self._known[missing] = pixels, True
            else:
                self._pixels = None
        if self._pixels is None:
            return self._read(positions)
        known: NDArray[Any] = self._pixels[positions].astype(np.float32) / np.float32(255)
        return known

    def _read(self, positions: NDArray[Any]) -> NDArray[Any]:
        places = self._where[positions]
        images = self._data.read(places)[0]
        check_finite(images, lambda number: f"image {places[number]} of the data")
        check_pixels(images, "the images of the data")
        return images


def _laps(data: Part, seed: int, first: int, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (pass, positions) for images first to first + count of endless shuffled passes over `data`."""
    while count > 0:
        lap, begin = divmod(first, len(data))
        chosen = data.order(seed + 1, lap)[begin : begin + count]
        yield lap, chosen
        first, count = first + len(chosen), count - len(chosen)


def _check_new(output: Path, plan: TrainingPlan) -> None:
    """Raise `EdgeBcsError` if a training that starts in the folder would write over anything but what the
    same one left there that was killed before its first save, in its first epoch at the latest."""
    try:
        if (output / LAST).exists():
            raise EdgeBcsError(f"{output} holds a training already; resume it, or choose another folder")
        left: dict[str, Callable[[], bool]] = {
            STEPS: lambda: _lines_with(output / STEPS, "step", "deaths", "milliseconds") is not None,
            EPOCHS: lambda: _lines_with(output / EPOCHS, "epoch", "step", "connections") in (0, 1),
            BEST: lambda: _is_of_first_epoch(output / BEST, plan),
        }
        if (output / "manifest.json").exists():
            raise EdgeBcsError(
                f"{output} has a manifest.json, so it would be taken for an artifact; choose another folder"
            )
        for name, is_left in left.items():
            if (output / name).exists() and not is_left():
                raise EdgeBcsError(
                    f"{output} has a {name} that a training there would write over; choose another folder"
                )
    except OSError as error:
        raise EdgeBcsError(f"{output} cannot be read: {error.strerror or error}") from None


def _lines_with(path: Path, *names: str) -> int | None:
    """How many whole lines a file of metrics has; None if one of them lacks a name, and is thus another's."""
    count = 0
    with path.open("rb") as stream:
        while (line := stream.readline(_LONGEST_LINE)).endswith(b"\n"):
            try:
                if not parse_object(line).keys() >= set(names):
                    return None
            except ValueError:
                return None
            count += 1
    return None if len(line) == _LONGEST_LINE else count  # what has no end was cut off, or is none of ours


def _is_of_first_epoch(path: Path, plan: TrainingPlan) -> bool:
    """Whether a checkpoint is what a training of this plan saves after its first epoch."""
    try:
        metadata = read_checkpoint(path).metadata
        best = parse_object(metadata.get("best", ""))
        return parse_object(metadata.get("plan", "")) == asdict(plan) and best.get("best_epoch") == 0
    except (EdgeBcsError, ValueError):
        return False
