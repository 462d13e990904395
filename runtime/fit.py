"""A whole training, step after step: what each sees; saving, pausing, ending; what is reported."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from edge_bcs.runtime.batches import Batches, InOrder
from edge_bcs.runtime.board.saving import METRICS_SHARE, MetricsFile, SaveSchedule
from edge_bcs.runtime.board.thermostat import Thermostat
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.course import Course
from edge_bcs.runtime.state import state_bytes
from edge_bcs.runtime.unlabelled import Mixed
from edge_bcs.runtime.validation import Validation
from edge_bcs.runtime.watching import Watching

from edge_bcs.core.collapse import FEWEST_HELD_OUT
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import Progress
from edge_bcs.core.signals import HeldSignals
from edge_bcs.core.units import format_bytes
from edge_bcs.data.balance import Balanced, uneven
from edge_bcs.data.classes import say
from edge_bcs.data.dataset import Data, Subset, held_apart

if TYPE_CHECKING:
    from edge_bcs.runtime.trainer import Trainer

Array = np.ndarray[Any, Any]
Metrics = dict[str, Any]


class _TimeIsUpError(Exception):
    """The hours are over while something is done that no step has begun with."""


class Fit:
    """One call of `Trainer.fit`, whose arguments these are.

    Attributes:
        course: where the training begins and ends.
    """

    course: Course

    def __init__(
        self,
        trainer: Trainer,
        data: Data,
        unlabelled: Data | None,
        *,
        progress: bool,
        metrics: str | Path | None,
        on_step: Callable[[Metrics], None] | None,
        save: str | Path | None,
        save_steps: int | None,
        save_seconds: float | None,
        max_writes: int | None,
        on_nan: str,
        thermostat: Thermostat | None,
        max_hours: float | None,
        on_wait: Callable[[str], None] | None,
    ) -> None:
        if on_nan not in ("stop", "skip"):
            raise EdgeBcsError(f"on_nan is 'stop' or 'skip', not {on_nan!r}.")
        if max_hours is not None and not 0 < max_hours < float("inf"):
            raise EdgeBcsError(f"the hours of a training must be a positive number, not {max_hours}.")
        self._trainer, self._data, self._progress = trainer, data, progress
        self._unlabelled = unlabelled
        self._on_step, self._on_wait = on_step, on_wait
        self._metrics_file, self._max_writes = metrics, max_writes
        self._skips, self._thermostat, self._max_hours = on_nan == "skip", thermostat, max_hours
        self._folder = save
        self._schedule = SaveSchedule(
            state_bytes(trainer.artifact),
            step=trainer.steps,
            steps=save_steps,
            seconds=save_seconds,
            max_writes=max_writes,
        )
        self._metrics: MetricsFile | None = None
        self._saves = self._saved_bytes = 0
        self._saved: tuple[int, str] | None = None
        self._deadline = float("inf")
        self._skipped_in_a_row = 0
        self._paused_for = ""
        self._bar: Progress
        self._validation: Validation | None = None
        self._watching: Watching | None = None
        self._batches: Batches

    def run(self, course: Course, resumed: bool) -> Metrics:
        """Train to the end of the course or of the time; see `Trainer.fit`.

        ``resumed``: the training was interrupted, so the metrics file may say more than the saved state.
        """
        self._bar = Progress("training", course.total_steps, unit="steps", shown=self._progress)
        with self._bar:
            self._bar.begin(self._trainer.steps - course.first_step)
            return self._run(course, resumed)

    def _run(self, course: Course, resumed: bool) -> Metrics:
        trainer, self.course = self._trainer, course
        self._arrange(course)
        if self._folder is not None:
            trainer.claim(self._folder)  # refused now, not after the first minute
        began, first_step = time.monotonic(), trainer.steps
        paused_before = self._thermostat.paused_seconds if self._thermostat else 0.0
        if self._max_hours is not None:
            self._deadline = began + 3600 * self._max_hours
        history: deque[Metrics] = deque(maxlen=course.steps_per_epoch)  # the last epoch's worth of steps
        if self._metrics_file is not None:
            self._metrics = MetricsFile(
                self._metrics_file,
                resumed_at=first_step if resumed or self._metrics_are_of_the_run() else None,
                max_writes=self._max_writes,
            )
        try:
            validation = self._validation
            if validation is not None:
                validation.keep_again()
            while True:
                if validation is not None and validation.is_due():
                    self._bar.say(validation.measure(self._between("measuring the held-out images")))
                if self._watching is not None:
                    collapsed = self._watching.look(self._between("watching the attack"))
                    if collapsed is not None:
                        self._bar.say(collapsed)
                if course.is_over(trainer.steps - course.first_step):
                    if validation is not None:
                        validation.return_to_best()
                    break
                course.returned = False
                if self._thermostat is not None:
                    self._thermostat.wait(self._pause, self._deadline)
                if time.monotonic() >= self._deadline:
                    break
                record = self._step()
                if "skipped" not in record:
                    history.append(record)
                self._tell(record)
                if self._folder is not None and self._schedule.due(trainer.steps):
                    self._save()
        except _TimeIsUpError:
            pass
        except NotFiniteError as error:
            try:
                self._save()
            except EdgeBcsError as unsaved:
                raise EdgeBcsError(f"{error} And {unsaved}") from None
            raise
        finally:
            if self._metrics is not None:
                self._metrics.close()
        self._save()
        seconds = time.monotonic() - began
        paused = self._thermostat.paused_seconds - paused_before if self._thermostat else 0.0
        done, steps = trainer.steps - course.first_step, trainer.steps - first_step
        result = {
            **_means(history, ("loss", "accuracy", "robust_accuracy")),
            "step": trainer.steps,
            "steps": steps,
            "done": done,
            "finished": course.is_over(done),
            "skipped": course.skipped,
            "seconds": seconds,
            "paused_seconds": paused,
            "milliseconds_per_step": _means(history, ("milliseconds",)).get("milliseconds", 0.0),
            "peak_bytes": trainer.peak_bytes,
            **self._batches.report(),
        }
        if course.validation:
            result["early"] = course.is_over(done) and done < course.total_steps
            result["best"] = {"step": course.best_step, "accuracy": course.best_score}
        if self._watching is not None:
            result["fell_back"] = self._watching.fell_back
        if self._folder is not None or self._metrics is not None:
            result["writes"] = self.writes(seconds, steps)
        return result

    def _arrange(self, course: Course) -> None:
        """Hold images out and balance the others, as the course says."""
        watched = self._data
        if course.validation:
            if self._folder is None:
                raise EdgeBcsError("validation needs save=FOLDER: the best state is kept there.")
            kept, held_out = held_apart(self._data, course.validation, self._trainer.seed)
            apart = Subset(self._data, held_out)
            self._validation = Validation(self._trainer, apart, course, self._folder, self._save)
            self._data = Subset(self._data, kept)
            watched = apart if len(apart) >= FEWEST_HELD_OUT else self._data
        if self._trainer.artifact.objective.attack.single_step:
            self._watching = Watching(self._trainer, watched, course)
        labels = getattr(self._data, "labels", None)
        if labels is not None:
            say(uneven(labels, self._trainer.classes or self._data.classes, course.balance))
        if course.balance:
            self._data = Balanced(self._data)
        self._batches = InOrder(self._data, course, self._trainer.seed)
        if self._unlabelled is not None:
            self._batches = Mixed(
                self._trainer,
                self._data,
                self._unlabelled,
                course,
                between=self._between("labelling the unlabelled images", timed=True),
                tell=self._bar.say,
                progress=self._progress,
            )

    def _between(self, what: str, timed: bool = False) -> Callable[[int, int], None]:
        """What is called between micro-batches that are not trained on: it ends that if asked to, and cools
        down if need be; ``timed``: and ends it when the hours are over."""

        def between(*progress: int) -> None:
            if self._on_wait is not None:
                self._on_wait(what)
            if self._thermostat is not None:
                self._thermostat.wait(self._pause)
            if timed and time.monotonic() >= self._deadline:
                raise _TimeIsUpError

        return between

    def _metrics_are_of_the_run(self) -> bool:
        """Whether the metrics lie in the run folder, and so tell of the training whose state lies there.

        What they say of later steps is of a training that was killed before its first save.
        """
        if self._folder is None or self._metrics_file is None:
            return False
        return Path(self._metrics_file).resolve().parent == Path(self._folder).resolve()

    def writes(self, seconds: float, steps: int) -> dict[str, int | None]:
        """What was written in ``seconds`` and ``steps``, and what that comes to in an hour.

        "bytes": written by this call; "saves"; "bytes_per_save"; "bytes_per_hour": of a training that goes on
        like this; "max_bytes_per_hour": the limit, or None. File contents only: a file system adds its own.
        """
        metrics = 0 if self._metrics is None else self._metrics.bytes
        copied = 0 if self._validation is None else self._validation.copied
        schedule, per_hour = self._schedule, 3600 * metrics / max(seconds, 1e-3)
        if self._max_writes is not None:
            per_hour = min(per_hour, METRICS_SHARE * self._max_writes)
        if self._folder is not None:
            per_hour += schedule.bytes_per_hour(seconds / max(steps, 1))
        return {
            "bytes": self._saved_bytes + copied + metrics,
            "saves": self._saves,
            "bytes_per_save": schedule.size,
            "bytes_per_hour": round(per_hour),
            "max_bytes_per_hour": self._max_writes,
        }

    def _step(self) -> Metrics:
        """One step, as it is reported; one that was skipped counts, too, and has "skipped": why."""
        trainer, course = self._trainer, self.course
        done = trainer.steps - course.first_step
        batch = self._batches.batch(done)
        trainer.learning_rate, trainer.weight_decay = course.rates(done, trainer.artifact.hyper)
        began = time.perf_counter()
        # A step that is counted, done or skipped, is in the metrics, too: no signal comes between.
        with HeldSignals() as signals:
            try:
                result = trainer.step_reading(signals, batch.read, batch.count, batch.name, batch.weights)
                self._skipped_in_a_row = 0
            except NotFiniteError as error:
                if not self._skips:
                    raise
                signals.hold()
                result = self._skip(error)
            record = {
                "step": trainer.steps,
                "epoch": course.epoch(done),
                "done": done + 1,
                "total": course.total_steps,
                **result,
                **batch.noted,
                "learning_rate": trainer.learning_rate,
                **({} if self._watching is None else {"attack": trainer.attack.kind}),
                "milliseconds": 1e3 * (time.perf_counter() - began),
                "peak_bytes": trainer.peak_bytes,
            }
            if self._metrics is not None:
                self._metrics.write(record)
        return record

    def _skip(self, error: NotFiniteError) -> Metrics:
        """Count a step without an update, so that the next one takes the images after these."""
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.course.steps_per_epoch:
            raise NotFiniteError(f"every batch of an epoch was skipped; the last one, {error}") from None
        self._trainer.steps += 1
        self.course.skipped += 1
        return {"skipped": str(error)}

    def _tell(self, record: Metrics) -> None:
        if self._on_step is not None:
            self._on_step(record)
        if "skipped" in record:
            self._bar.say(f"step {record['done']}/{record['total']}  skipped: {record['skipped']}")
            self._bar.update(record["done"])
        else:
            self._bar.update(record["done"], text=self._described(record))

    def _described(self, record: Metrics) -> str:
        # Where the loss sees adversarial images alone, there is one accuracy, the robust one.
        clean = not self._trainer.artifact.objective.kind.accuracy_is_robust
        shares = {"accuracy": "accuracy"} if clean else {}
        shares |= {"robust": "robust_accuracy"} if "robust_accuracy" in record else {}
        accuracies = "".join(f", {name} {100 * record[key]:.1f} %" for name, key in shares.items())
        return (
            f"loss {record['loss']:.3f}{accuracies}, {record['milliseconds']:.0f} ms a step, "
            f"peak {format_bytes(record['peak_bytes'])}"
        )

    def _pause(self, sentence: str) -> None:
        if self._on_wait is not None:
            self._on_wait(sentence)
        if sentence != self._paused_for:
            self._bar.say(sentence)
        self._paused_for = sentence

    def _save(self) -> None:
        now = self._trainer.steps, self.course.dump()
        if self._folder is None or now == self._saved:
            return
        size = self._trainer.save(self._folder)
        self._saved = now
        self._schedule.saved(self._trainer.steps, size)
        self._saves += 1
        self._saved_bytes += size


def _means(history: deque[Metrics], names: tuple[str, ...]) -> Metrics:
    return {
        name: float(np.mean([record[name] for record in history]))
        for name in names
        if history and name in history[0]
    }
