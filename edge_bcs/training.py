"""Training from scratch on the host: schedules, selection, checkpoints and resumption around `edge_bcs.step`.

Every random number is a function of the seed and the step, and a checkpoint holds the whole state, so a
training that was interrupted (by kill -9, too) and resumed on the same machine ends with the same bits as
one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edge_bcs import objectives
from edge_bcs.attacks import evaluation_mode
from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
from edge_bcs.data.dataset import ArrayDataset, Dataset
from edge_bcs.errors import EdgeBcsError
from edge_bcs.evaluation import Data, evaluate
from edge_bcs.objectives import Objective
from edge_bcs.sparse_model import SparseModel
from edge_bcs.step import REWIRE, Attack, Hyper, Outcome, accumulate, craft, update

METHODS = ("bcs", "random", "fixed", "dense")
BEST = "checkpoint.safetensors"
LAST = "last.safetensors"
STEPS = "metrics.jsonl"
EPOCHS = "epochs.jsonl"
_CACHED_BYTES = 2**31
# The shuffle of the held-out split is that of an epoch which no training reaches.
_SPLIT_EPOCH = 1 << 55


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides what a training computes; a checkpoint continues only the plan that made it."""

    objective: str
    beta: float | None
    method: str
    rewire: str
    epochs: int
    steps: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    momentum: float
    noise: float
    epsilon: float
    step_size: float
    attack_steps: int
    batch_norm: str
    augment: bool
    validation: float
    samples: int
    seed: int


def divisor(step: int, total: int) -> int:
    """Return what divides λ and λ_w at `step` of `total`: 1, then 10 from 50 % on, 100 from 75 % on."""
    return 100 if 4 * step >= 3 * total else 10 if 2 * step >= total else 1


def train(
    sparse: SparseModel,
    data: Data | tuple[NDArray[Any], NDArray[Any]],
    *,
    objective: str = "at",
    method: str = "bcs",
    rewire: str = "uniform",
    epochs: int = 200,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    noise: float = 1e-6,
    beta: float | None = None,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    attack_steps: int = 10,
    batch_norm: str = "batch",
    augment: bool = True,
    pseudo_labelled: Data | None = None,
    validation: float = 0.02,
    seed: int | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    compile: bool = False,
    output: str | Path | None = None,
    resume: bool = False,
    save_seconds: float = 60.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a sparse network (Algorithm 1), and leave it with the weights of its best epoch.

    The best epoch has the highest robust accuracy (PGD with the training attack; clean accuracy for natural
    training) on images of the training data that are held out for it. Learning rate and weight decay are
    divided by 10 at 50 % and at 75 % of all steps.

    Args:
        sparse: what `sparsify` returned; trained in place.
        data: a data set of `edge_bcs.data`, or a pair of arrays: images f32 [N, C, H, W] in [0, 1], labels.
        objective: natural, at, mixed, trades, mart or rst.
        method: "bcs", or a baseline with a static mask: "random" and "fixed" (the mask is that of `sparse`,
            see `connectivity.sparsify` and `connectivity.fixed`) or "dense" (a network of sparsity 0);
            baselines have neither rewiring nor noise nor a constraint on signs.
        rewire: "uniform" (Algorithm 1) or "by-layer" (the released code).
        epochs: passes over the data that is not held out; a last batch that is not full is left out.
        steps: end after so many steps instead.
        batch_size: images a step; 128 if None, 256 for rst, half of them from `pseudo_labelled`.
        learning_rate, weight_decay, momentum, noise: λ, λ_w (decoupled, not scaled by λ), μ and σ.
        beta: weight of the objective's second term; its default if None.
        epsilon, step_size, attack_steps: PGD while training, in units of pixels in [0, 1].
        batch_norm: "batch", or "frozen" for running statistics throughout (fine-tuning).
        augment: shift by up to ±10 % and flip.
        pseudo_labelled: the second data set of rst.
        validation: fraction of the data that is held out; with 0 the last epoch is kept.
        seed: of order, augmentation and attack; the network's if None.
        device: where to train; a GPU if there is one.
        precision: "f32" or "bf16" (autocast; weights and updates stay f32); bf16 on a GPU if None.
        compile: compile the network with torch.compile; the minutes that takes are worth it on a GPU.
        output: folder for checkpoint.safetensors (best epoch), last.safetensors (newest state),
            metrics.jsonl (a line for each step) and epochs.jsonl (a line for each epoch, with the
            connections of each layer).
        resume: continue what `output` holds.
        save_seconds: time between saves of the newest state; it is also saved at the end of each epoch.
        progress: show a progress bar.

    Returns:
        the last line of epochs.jsonl, with "best_epoch", "best_step", "best_robust_acc", "best_clean_acc",
        "step", "seconds".

    Raises:
        EdgeBcsError: an argument out of range, rst without its second data set, data that does not fit, a
            checkpoint of another plan, or a step that would make a weight that is not finite.
    """
    described = objectives.get(objective)
    if isinstance(data, tuple):
        data = ArrayDataset(*data)
    _check(described, method, rewire, batch_norm, precision, data, pseudo_labelled)
    batch_size = batch_size or (256 if objective == "rst" else 128)
    static = method != "bcs"
    plan = Plan(
        objective=objective,
        beta=described.beta if beta is None else beta,
        method=method,
        rewire="none" if static else rewire,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        noise=0.0 if static else noise,
        epsilon=epsilon,
        step_size=step_size,
        attack_steps=attack_steps,
        batch_norm=batch_norm,
        augment=augment,
        validation=validation,
        samples=len(data),
        seed=sparse.seed if seed is None else seed,
    )
    _check_numbers(plan)
    if resume and output is None:
        raise EdgeBcsError("a training can only be resumed from the output folder that it wrote")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = _Run(sparse.to(target), data, pseudo_labelled, plan, described, target, precision)
    run.output = None if output is None else Path(output)
    if run.output is not None:
        run.open(resume)
    if compile:
        sparse.network.compile()
    try:
        return run.train(save_seconds, progress)
    finally:
        sparse.network._compiled_call_impl = None
        sparse.eval()
        run.close()


def _check(
    objective: Objective,
    method: str,
    rewire: str,
    batch_norm: str,
    precision: str | None,
    data: Data,
    pseudo_labelled: Data | None,
) -> None:
    if method not in METHODS:
        raise EdgeBcsError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    if rewire not in REWIRE:
        raise EdgeBcsError(f"connections are rewired uniform or by-layer, not {rewire!r}")
    if batch_norm not in ("batch", "frozen"):
        raise EdgeBcsError(f"batch norm is either batch or frozen, not {batch_norm!r}")
    if precision not in (None, "f32", "bf16"):
        raise EdgeBcsError(f"the precision is f32 or bf16, not {precision!r}")
    if objective.name == "rst" and pseudo_labelled is None:
        raise EdgeBcsError("rst needs a second, pseudo-labelled data set (pseudo_labelled=)")
    if objective.name != "rst" and pseudo_labelled is not None:
        raise EdgeBcsError(f"{objective.name} has no use for pseudo-labelled data; choose the objective rst")
    for part in (data, pseudo_labelled):
        if part is not None and len(part) == 0:
            raise EdgeBcsError("the data set is empty")
    if pseudo_labelled is not None and tuple(pseudo_labelled.shape) != tuple(data.shape):
        raise EdgeBcsError(
            f"the pseudo-labelled images have the shape {list(pseudo_labelled.shape)}, the others "
            f"{list(data.shape)}"
        )


def _check_numbers(plan: Plan) -> None:
    for name in ("epochs", "batch_size"):
        if getattr(plan, name) < 1:
            raise EdgeBcsError(f"{name} must be at least 1, not {getattr(plan, name)}")
    if plan.steps is not None and plan.steps < 1:
        raise EdgeBcsError(f"steps must be at least 1, not {plan.steps}")
    for name in ("learning_rate", "weight_decay", "momentum", "noise", "epsilon", "step_size"):
        if not (np.isfinite(getattr(plan, name)) and getattr(plan, name) >= 0):
            raise EdgeBcsError(f"{name} must be a number of at least 0, not {getattr(plan, name)}")
    if not 0 <= plan.validation < 1:
        raise EdgeBcsError(f"the held-out fraction must be at least 0 and below 1, not {plan.validation}")


class _Run:
    """One training: where it is, what it reads, what it has written."""

    def __init__(
        self,
        sparse: SparseModel,
        data: Data,
        pseudo_labelled: Data | None,
        plan: Plan,
        objective: Objective,
        device: torch.device,
        precision: str | None,
    ) -> None:
        self.sparse, self.plan, self.objective, self.device = sparse, plan, objective, device
        held = round(plan.validation * len(data)) if plan.validation else 0
        if held >= len(data):
            raise EdgeBcsError(f"{len(data)} images are too few to hold {held} of them out")
        split = data.order(plan.seed, _SPLIT_EPOCH)
        self.data = Part(data, np.sort(split[held:]))
        self.held_out = Part(data, np.sort(split[:held])) if held else None
        self.pseudo_labelled = (
            None if pseudo_labelled is None else Part(pseudo_labelled, np.arange(len(pseudo_labelled)))
        )
        self.labelled = plan.batch_size // 2 if pseudo_labelled is not None else plan.batch_size
        self.per_epoch = max(1, len(self.data) // self.labelled)
        self.total = plan.steps or plan.epochs * self.per_epoch
        self.precision = precision or ("bf16" if device.type == "cuda" else "f32")
        self.attack = Attack(epsilon=plan.epsilon, step_size=plan.step_size, steps=plan.attack_steps)
        self._check_fit()
        self.step = 0
        self.best: dict[str, Any] = {}
        self.best_state = sparse.state()
        self.output: Path | None = None
        self._lines: IO[str] | None = None
        self._sums = np.zeros(
            4
        )  # loss, correct answers of up to two branches, deaths; over the steps of an epoch

    def _check_fit(self) -> None:
        """Raise `EdgeBcsError` unless the network takes these images and has an answer for every class."""
        x = torch.from_numpy(self.data.read(np.arange(1))[0]).to(self.device)
        try:
            with evaluation_mode(self.sparse), torch.no_grad():
                answers = self.sparse(x).shape[1]
        except RuntimeError:
            raise EdgeBcsError(
                f"the network does not take images of the shape {list(self.data.shape)}"
            ) from None
        if len(self.data.classes) > answers:
            raise EdgeBcsError(f"the data has {len(self.data.classes)} classes, the network only {answers}")

    # The output folder.

    def open(self, resume: bool) -> None:
        """Start a folder, or continue the one that is there."""
        assert self.output is not None
        last = self.output / LAST
        if resume:
            self._continue(last)
        elif last.exists():
            raise EdgeBcsError(f"{self.output} holds a training already; resume it, or choose another folder")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            for name in (STEPS, EPOCHS):
                _keep_lines(self.output / name, self.step)
            self._lines = (self.output / STEPS).open("a", encoding="utf-8")
        except OSError as error:
            raise EdgeBcsError(f"{self.output} cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _continue(self, last: Path) -> None:
        checkpoint = read_checkpoint(last)
        try:
            plan = json.loads(checkpoint.metadata["plan"])
            best = json.loads(checkpoint.metadata["best"])
            sums = np.array(json.loads(checkpoint.metadata["sums"]))
        except (KeyError, ValueError):
            raise EdgeBcsError(f"{last} was not written by a training") from None
        for name, value in asdict(self.plan).items():
            if plan.get(name) != value:
                raise EdgeBcsError(
                    f"{last.parent} was begun with {name} {plan.get(name)!r}, not {value!r}; resume it as it "
                    "was begun, or choose another folder"
                )
        if (
            json.loads(checkpoint.metadata["network"]) != self.sparse.record
            or checkpoint.seed != self.sparse.seed
        ):
            raise EdgeBcsError(f"{last.parent} holds a training of another network or seed")
        self.sparse.load_state(checkpoint.tensors)
        self.step, self.best, self._sums = checkpoint.step, best, sums
        self.sparse.step = self.step
        if best:
            self.best_state = read_checkpoint(last.parent / BEST).tensors

    def _save(self, name: str, **metadata: str) -> None:
        if self.output is not None:
            save_checkpoint(
                self.output / name,
                self.sparse,
                metadata={
                    "objective": self.plan.objective,
                    "plan": json.dumps(asdict(self.plan)),
                    "sums": json.dumps(self._sums.tolist()),
                    "best": json.dumps(self.best),
                    **metadata,
                },
            )

    # The loop.

    def train(self, save_seconds: float, progress: bool) -> dict[str, Any]:
        began = saved = time.monotonic()
        report: dict[str, Any] = dict(self.best)
        order: NDArray[Any] | None = None
        with _bar(progress) as bar:
            task = bar.add_task(self.plan.objective, total=self.total, completed=self.step, shown="")
            while self.step < self.total:
                epoch, batch = divmod(self.step, self.per_epoch)
                if order is None or batch == 0:
                    order = self.data.order(self.plan.seed, epoch)
                line = self._one_step(epoch, order[batch * self.labelled : (batch + 1) * self.labelled])
                if self._lines is not None:
                    self._lines.write(json.dumps(line) + "\n")
                shown = f"loss {line['loss']:.3f}  accuracy {line['accuracy']:.1%}"
                bar.update(task, advance=1, shown=shown)
                if batch + 1 == self.per_epoch or self.step == self.total:
                    report = self._end_of_epoch(epoch, batch + 1)
                    saved = time.monotonic()
                elif time.monotonic() - saved >= save_seconds:
                    self._flush()
                    self._save(LAST)
                    saved = time.monotonic()
        if self.best:
            self.sparse.load_state(self.best_state)
            self.sparse.step = self.best["best_step"]
        return {**report, **self.best, "step": self.step, "seconds": time.monotonic() - began}

    def _one_step(self, epoch: int, positions: NDArray[Any]) -> dict[str, Any]:
        """Do one step of Algorithm 1, and return its line of metrics."""
        started = time.perf_counter()
        x, labels = self._read(epoch, positions)
        divided = divisor(self.step, self.total)
        rate = self.plan.learning_rate / divided
        hyper = Hyper(
            learning_rate=rate,
            weight_decay=self.plan.weight_decay / divided,
            momentum=self.plan.momentum,
            noise=self.plan.noise,
        )
        outcome = self._gradients(x, labels)
        deaths = update(self.sparse, hyper, step=self.step, rewire=self.plan.rewire)
        self.step += 1
        self.sparse.step = self.step
        correct = outcome.correct.tolist()
        loss = float(outcome.loss)
        line = {"step": self.step, "epoch": epoch, "loss": loss, "accuracy": correct[0] / len(x)}
        if self.objective.two_branches:
            line["robust_accuracy"] = correct[1] / len(x)
        elif self.objective.name == "at":
            line["robust_accuracy"] = line["accuracy"]
        self._sums += [loss, correct[0] / len(x), correct[-1] / len(x), deaths]
        seconds = time.perf_counter() - started
        return {**line, "deaths": deaths, "learning_rate": rate, "milliseconds": 1e3 * seconds}

    def _gradients(self, x: torch.Tensor, labels: torch.Tensor) -> Outcome:
        sparse, plan = self.sparse, self.plan
        # One context for the attack and one for the loss: autocast keeps its bf16 weights until it is left,
        # and those made where no gradient was wanted would give none.
        with self._autocast():
            adversarial = craft(
                sparse, x, labels, self.objective, self.attack, step=self.step, seed=plan.seed
            )
        sparse.zero_gradients()
        with self._autocast():
            return accumulate(
                sparse,
                x,
                adversarial,
                labels,
                self.objective,
                beta=plan.beta,
                batch_norm=plan.batch_norm,
            )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "f32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _read(self, epoch: int, positions: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        seed, augment = self.plan.seed, self.plan.augment
        x, labels = self.data.read(positions, seed=seed, epoch=epoch, augment=augment)
        if self.pseudo_labelled is not None:
            more = self.plan.batch_size - self.labelled
            parts = [(x, labels)]
            for lap, chosen in _laps(self.pseudo_labelled, seed, self.step * more, more):
                parts.append(self.pseudo_labelled.read(chosen, seed=seed + 1, epoch=lap, augment=augment))
            x = np.concatenate([images for images, _ in parts])
            labels = np.concatenate([targets for _, targets in parts])
        images = torch.from_numpy(x).to(self.device)
        if self.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(labels).to(self.device)

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
        if self.held_out is not None:
            natural = self.objective.name == "natural"
            report = evaluate(
                self.sparse,
                self.held_out,
                attack="none" if natural else "pgd",
                epsilon=self.plan.epsilon,
                steps=max(1, self.plan.attack_steps),
                step_size=self.plan.step_size,
                restarts=1,
                seed=self.plan.seed,
                batch_size=self.plan.batch_size,
            )
            line |= {"validation_clean_acc": report["clean_acc"], "validation_robust_acc": report["adv_acc"]}
            chosen = report["clean_acc"] if natural else report["adv_acc"]
            better = chosen >= self.best.get("best_score", -1.0)
            if better:
                self.best = {
                    "best_epoch": epoch,
                    "best_step": self.step,
                    "best_score": chosen,
                    "best_clean_acc": report["clean_acc"],
                    "best_robust_acc": report["adv_acc"],
                }
        else:
            self.best = {"best_epoch": epoch, "best_step": self.step}
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
    """Some positions of a data set; pixels that are multiples of 1/255 stay in memory once read."""

    def __init__(self, data: Data, positions: NDArray[Any]) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels[positions]
        self._data, self._where = data, positions
        fits = len(positions) * math.prod(data.shape) <= _CACHED_BYTES
        self._pixels = np.empty((len(positions), *data.shape), np.uint8) if fits else None
        self._known = np.zeros(len(positions), dtype=bool)

    def images(self, positions: NDArray[Any]) -> NDArray[Any]:
        """Return the images f32 [m, C, H, W] in [0, 1] at positions i64[m] of this part, as they are."""
        missing = positions[~self._known[positions]]
        if self._pixels is not None and len(missing):
            images = self._data.read(self._where[missing])[0]
            pixels = np.rint(images * 255).astype(np.uint8)
            if np.array_equal(pixels.astype(np.float32) / np.float32(255), images):
                self._pixels[missing], self._known[missing] = pixels, True
            else:
                self._pixels = None
        if self._pixels is None:
            return self._data.read(self._where[positions])[0]
        known: NDArray[Any] = self._pixels[positions].astype(np.float32) / np.float32(255)
        return known


def _laps(data: Part, seed: int, first: int, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (pass, positions) for images first to first + count of endless shuffled passes over `data`."""
    while count > 0:
        lap, begin = divmod(first, len(data))
        chosen = data.order(seed + 1, lap)[begin : begin + count]
        yield lap, chosen
        first, count = first + len(chosen), count - len(chosen)


def _keep_lines(path: Path, step: int) -> None:
    """Drop the lines that a resumed training writes again: those beyond `step`, and one torn by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[shown]}"), disable=not shown)
