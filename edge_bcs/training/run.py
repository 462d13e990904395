"""One training: steps in their order, the choice of the best epoch, what is saved and what is said."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_bcs.core.collapse import FEWEST_HELD_OUT, WATCHED_IMAGES
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.progress import Progress
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.balance import Balanced, uneven
from edge_bcs.data.classes import check_names, completed, match, say
from edge_bcs.data.dataset import Data, Subset, held_apart, some_of
from edge_bcs.method.attacks import evaluation_mode, input_gradient
from edge_bcs.method.growth import is_due, moved_at
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training import checkpoints, lines
from edge_bcs.training.backends import Backend, Batch, Numbers
from edge_bcs.training.checkpoints import BEST, LAST, Standing
from edge_bcs.training.lines import EPOCHS, STEPS, Lines
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.reading import Batches, Part
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.updates import Update

_CHECKED_IMAGES = 64
_CUT = (
    "the network is cut: its answers do not depend on the image, and no gradient will reach its first "
    "layers; choose a lower sparsity, a wider network, another distribution or another seed"
)


class Run:
    """One training: where it is, what it reads, what it has written.

    Attributes:
        classes: names of the network's outputs, matched with those of the data.
        warnings: sentences about the network.
        over: whether all steps are done, and the network has its best epoch.
    """

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
        self.over = False
        self._backend: Backend | None = None
        kept, held_out = held_apart(data, plan.validation, plan.seed)
        self.warnings: list[str] = []
        outputs = self._outputs(data, kept[:_CHECKED_IMAGES])
        known = sparse.classes
        if known is not None:
            known = completed(check_names(known, "the network's classes"), outputs)
        matched = match(data, known, outputs, naming=True, trained=sparse.step > 0)
        self.classes, self.matching = matched.classes, matched.report()
        self._held_out = Part(matched.data, held_out) if len(held_out) else None
        self._watched: Part | None = None
        if plan.attack.single_step:
            places = held_out if len(held_out) >= FEWEST_HELD_OUT else kept
            some = some_of(Subset(matched.data, places), WATCHED_IMAGES, plan.seed)
            self._watched = Part(matched.data, places[some])
        second, notes = None, matched.notes
        if pseudo_labelled is not None:
            also = match(pseudo_labelled, self.classes, outputs)
            second = Part(also.data, np.arange(len(pseudo_labelled)))
            notes += tuple(f"the pseudo-labelled data: {note}" for note in also.notes)
        if replicas.first:
            labels = matched.data.labels[kept]
            say((*notes, *uneven(labels, self.classes or data.classes, plan.balance)))
        part = Part(matched.data, kept)
        self._batches = Batches(plan, replicas, Balanced(part) if plan.balance else part, second)
        self._batches.check(sparse)
        update.begin(sparse, self._batches.total)
        self._standing = Standing()
        self._best_state = sparse.state()
        self._output: Path | None = None
        self._lines: Lines | None = None
        self._lock: FolderLock | None = None
        # Steps whose numbers have not been read: what they are about, when they began, how to read them.
        self._pending: deque[tuple[dict[str, Any], int, float, Callable[[], Numbers]]] = deque()
        self._settled_at = 0.0
        self._whole = True  # the state is that of the steps that are counted, and may be saved as that

    @property
    def step(self) -> int:
        """Steps done."""
        return self._standing.step

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
            self._standing, best = checkpoints.resumed(
                last, self.sparse, self.plan, self.update, self.classes
            )
            self._best_state = self._best_state if best is None else best
        else:
            _check_new(output, self.plan)
        if self.replicas.first:
            self._output, self._lines = output, Lines(output, self.step, self._standing.ended)

    @property
    def backend(self) -> Backend:
        """What computes the steps."""
        assert self._backend is not None, "the backend is opened before anything is asked of it"
        return self._backend

    def begin(self, backend: Backend) -> None:
        """Take what computes the steps and has the plan's attack; it is closed with the run."""
        self._backend = backend

    def close(self) -> None:
        """Give back the backend, the files and the folder."""
        if self._backend is not None:
            self._backend.close()
        if self._lines is not None:
            self._lines.close()
        if self._lock is not None:
            self._lock.release()

    def train(self, save_seconds: float, progress: bool) -> dict[str, Any]:
        """Do all steps that are left, and return the report; see `loop.train`."""
        began = saved = time.monotonic()
        batches = self._batches
        report = {} if self._lines is None else self._lines.last_epoch()
        with Progress("training", batches.total, done=self.step, unit="steps", shown=progress) as bar:
            for text in self.warnings:
                bar.say(f"warning: {text}")

            def settle(allowed: int) -> None:
                while len(self._pending) > allowed:
                    line = self._settle()
                    described = f"epoch {line['epoch'] + 1}, loss {line['loss']:.3f}"
                    bar.update(line["step"], text=f"{described}, accuracy {100 * line['accuracy']:.1f} %")

            self._take_attack()
            if self._standing.watch.step < 0:
                self._look(bar, over=False)
            while True:
                if self._epoch_is_over:
                    self._save_newest()  # what follows may take long, and is done again after an interruption
                    report = self._end_of_epoch(bar)
                    saved = time.monotonic()
                if self.step >= batches.total or self._gives_up:
                    break
                self._one_step()
                settle(0 if self._epoch_is_over else self.backend.lag)
                if not self._epoch_is_over and time.monotonic() - saved >= save_seconds:
                    settle(0)
                    self._save_newest()
                    saved = time.monotonic()
        best = self._standing.best
        if best:
            with HeldSignals() as signals:
                signals.hold()
                self.over = True
                self.sparse.load_state(self._best_state)
                self.sparse.step = best["best_step"]
        seconds = time.monotonic() - began
        about = {"seconds": seconds, "warnings": self.warnings, **self.matching}
        about["early"] = self.step < batches.total
        if self._watched is not None:
            about["fell_back"] = self._standing.watch.fell_back
        return {**report, **best, "step": self.step, **about}

    def leave(self, *, keep: bool) -> None:
        """Give the network what was done before it ends early; to ``keep`` it, the folder, too, unless that
        is between two steps' states; then it holds an earlier one."""
        with HeldSignals() as signals:
            signals.hold()
            alone = self.replicas.count == 1  # the other processes may be gone
            if not (keep and alone and self._whole and self.step):
                self.backend.store()
                return
            while self._pending:
                self._settle()
            self._save_newest()

    @property
    def _epoch_is_over(self) -> bool:
        """Whether all steps of an epoch are done, but not what comes at its end."""
        step, batches = self.step, self._batches
        at_end = step % batches.per_epoch == 0 or step == batches.total
        return at_end and step != self._standing.ended

    @property
    def _gives_up(self) -> bool:
        """Whether the epoch that has just ended was the last one that patience allows."""
        epochs, within = divmod(self.step, self._batches.per_epoch)
        patience, best = self.plan.schedule.patience, self._standing.best
        if patience is None or within or not best:
            return False
        return bool(epochs - 1 - best["risen_epoch"] >= patience)

    def _one_step(self) -> None:
        """Begin one step of Algorithm 1; `_settle` tells how it went."""
        started = time.perf_counter()
        batch = self._batches.read(self.step)
        hyper = self.plan.schedule.at(self.plan.hyper, self.step, self._batches.total)
        self._take_attack()
        moved = self._grow(batch)
        with HeldSignals() as signals:
            try:
                numbers = self.backend.step(batch, hyper, self.step, signals)
            except BaseException:
                self._whole = self._whole and not signals.held
                raise
            epoch = self.step // self._batches.per_epoch
            self._standing.step += 1
            self._whole = True
            about = {"step": self.step, "epoch": epoch, "learning_rate": hyper.learning_rate}
            if self.plan.growth is not None:
                about["moved"] = moved
            self._pending.append((about, batch.whole, started, numbers))

    def _take_attack(self) -> None:
        """Let the backend have the attack of the next step."""
        attack = self.plan.attack_at(self.step, self._batches.total)
        self.backend.attack = attack if self._standing.watch.fell_back is None else attack.pgd

    def _grow(self, batch: Batch) -> int:
        """Move connections before the next step, if it is time; return how many."""
        growth, step, total = self.plan.growth, self.step, self._batches.total
        if growth is None or not is_due(growth.every, growth.until, step, total):
            return 0
        count = moved_at(growth.share, growth.until, self.sparse.kappa, step, total)
        self._whole = False
        return self.backend.grow(batch, count, growth, step) if count or growth.recycle else 0

    def _settle(self) -> dict[str, Any]:
        """Read the numbers of the oldest step whose numbers are unread, and write its line of metrics."""
        about, images, started, read = self._pending[0]
        numbers = read()
        shares = [count / images for count in numbers.correct]
        line = {"step": about["step"], "epoch": about["epoch"], "loss": numbers.loss, "accuracy": shares[0]}
        if self.plan.objective.two_branches:
            line["robust_accuracy"] = shares[1]
        elif self.plan.objective.accuracy_is_robust:
            line["robust_accuracy"] = shares[0]
        now = time.perf_counter()
        seconds, self._settled_at = now - max(started, self._settled_at), now
        line |= {"deaths": numbers.deaths, "learning_rate": about["learning_rate"]}
        if "moved" in about:
            line["moved"] = about["moved"]
        line["milliseconds"] = 1e3 * seconds
        with HeldSignals() as signals:
            signals.hold()
            self._pending.popleft()
            self._standing.sums += [numbers.loss, shares[0], shares[-1], numbers.deaths]
            if self._lines is not None:
                self._lines.step(line)
        return line

    def _look(self, bar: Progress, *, over: bool) -> dict[str, float]:
        """Look, if it is time, whether a single-step attack has collapsed, and then fall back on PGD; return
        what is to be said of it in the line of the epoch."""
        watch, watched, attack = self._standing.watch, self._watched, self.backend.attack
        size = self.plan.batch_size
        if watched is None or not attack.single_step:
            return {}
        if not watch.is_due(self.step, size, len(watched), over=over):
            return {}
        own, pgd = self.backend.watch(watched)
        if watch.note(self.step, own, pgd, len(watched)):
            bar.say(watch.sentence(attack.kind, own, pgd))
        return {"watched_own_acc": own, "watched_pgd_acc": pgd}

    def _end_of_epoch(self, bar: Progress) -> dict[str, Any]:
        """Evaluate on the held-out images, keep the best state, write everything."""
        self._whole = False
        epoch = (self.step - 1) // self._batches.per_epoch
        mean = self._standing.sums / (self.step - epoch * self._batches.per_epoch)
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "loss": float(mean[0]),
            "accuracy": float(mean[1]),
            "deaths": float(mean[3]),
        }
        if self.plan.objective.two_branches:
            line["robust_accuracy"] = float(mean[2])
        self._standing.sums = np.zeros(4)
        better = settled = self.update.is_settled(self.step)
        self.update.end_of_epoch(self.sparse, epoch)
        line |= self._look(bar, over=self.step == self._batches.total)
        if self._held_out is not None:
            clean, robust = self.backend.evaluate(self._held_out)
            line |= {"validation_clean_acc": clean, "validation_robust_acc": robust}
            chosen = clean if robust is None else robust
            before = self._standing.best
            better = settled and chosen >= before.get("best_score", -1.0)
            if better:
                # Patience does not begin anew where an epoch is only as good as the best.
                level = before and chosen == before["best_score"]
                risen = before.get("risen_epoch", before["best_epoch"]) if level else epoch
                self._standing.best = {
                    "best_epoch": epoch,
                    "best_step": self.step,
                    "best_score": chosen,
                    "best_clean_acc": clean,
                    "best_robust_acc": robust,
                    **({} if self.plan.schedule.patience is None else {"risen_epoch": risen}),
                }
        elif settled:
            self._standing.best = {"best_epoch": epoch, "best_step": self.step}
        self.backend.store()
        self.replicas.check_agreement(self.sparse)
        line["connections"] = self.sparse.layer_counts()
        if better:
            self._best_state = self.sparse.state()
            self._save(BEST)
        if self._lines is not None:
            self._lines.epoch(line)
        self._standing.ended = self.step
        self._save(LAST)
        self._whole = True
        return line

    def _save_newest(self) -> None:
        """Give the network what was done, and the folder that and the lines of all steps."""
        if self._lines is not None:
            self._lines.flush()
        self.backend.store()
        self._save(LAST)

    def _save(self, name: str) -> None:
        if self._output is not None:
            update = self.update if name == LAST else None
            checkpoints.save(self._output / name, self.sparse, self.plan, self._standing, update)


def _check_new(output: Path, plan: TrainingPlan) -> None:
    """Raise `EdgeBcsError` if a training that starts in the folder would write over anything but what the
    same one left there that was killed before its first save, in its first epoch at the latest."""
    try:
        if (output / LAST).exists():
            raise EdgeBcsError(f"{output} holds a training already; resume it, or choose another folder")
        left: dict[str, Callable[[], bool]] = {
            STEPS: lambda: lines.count_of_steps(output) is not None,
            EPOCHS: lambda: lines.count_of_epochs(output) in (0, 1),
            BEST: lambda: checkpoints.is_of_first_epoch(output / BEST, plan),
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
